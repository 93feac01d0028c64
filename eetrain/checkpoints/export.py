"""From a training run to a Hugging Face folder, and proof that what was written is what was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor
from transformers import AutoTokenizer

from eetrain.checkpoints.folder import load_checkpoint, save_checkpoint
from eetrain.errors import CheckpointError
from eetrain.exits import MultiExitModel
from eetrain.training.building import build_model
from eetrain.training.checkpoint_fallback import whole_checkpoint
from eetrain.training.checkpoint_manifest import is_checkpoint_folder
from eetrain.training.checkpoint_reading import read_checkpoint
from eetrain.training.placing import standing
from eetrain.training.settings import ModelSettings

_PREFIX = "model."


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "last",
    exit_policy: str | None = None,
    keep_adapter: bool = False,
    results: str | Path | None = None,
) -> Path:
    """Write a run's model as a multi-exit checkpoint and check it by loading and running it.

    Where a run's ``last`` is damaged, its newest whole checkpoint is written, with a warning; one that is named is not
    replaced by another.

    Args:
        run: a run's folder, or one of its checkpoints (``.ckpt`` files, or folders of runs of several processes).
        out: the folder to write.
        checkpoint: which one of the run's ``checkpoints`` folder, without its ending.
        exit_policy: becomes the default of ``generate``; if left out, the one the run's objective trained for.
        keep_adapter: write a LoRA adapter and refer to its base instead of merging it.
        results: ``results.json`` of ``eetrain evaluate``, for the model card.

    Raises:
        CheckpointError: no such run, a checkpoint cut short or of another model, or a folder that cannot be written.
    """
    file = _checkpoint_file(Path(run), checkpoint)
    stored = read_lightning_checkpoint(file)
    model = rebuild(stored, file)
    save_checkpoint(
        model,
        out,
        tokenizer=_tokenizer(file, stored),
        exit_policy=exit_policy or stored.get("eetrain", {}).get("exit_policy"),
        keep_adapter=keep_adapter,
        results=None if results is None else _read_results(Path(results)),
    )
    verify(model, out)
    return Path(out)


def read_lightning_checkpoint(file: Path) -> dict[str, Any]:
    """A run's checkpoint as plain tensors and data; nothing in it is executed.

    Raises:
        CheckpointError: it is damaged, or another program wrote it.
    """
    stored = read_checkpoint(file)
    if "hyper_parameters" not in stored or "state_dict" not in stored:
        raise CheckpointError(f"{file} was not written by `eetrain fit`.", hint="Give a run's folder.")
    return stored


def rebuild(stored: dict[str, Any], file: Path) -> MultiExitModel:
    """The model of a checkpoint, its backbone whole, in eval mode.

    Raises:
        CheckpointError: the weights do not fit the settings stored with them.
    """
    settings = ModelSettings.from_dict(stored["hyper_parameters"])
    # A run may have loaded the blocks up to its deepest exit only; the rest is as it was.
    settings = replace(settings, backbone=replace(settings.backbone, load="full"))
    model = build_model(settings)
    trained = {
        name.removeprefix(_PREFIX): tensor for name, tensor in stored["state_dict"].items() if name.startswith(_PREFIX)
    }
    _copy_into(model, trained, settings.omits_backbone, file)
    return model.eval()


def verify(model: MultiExitModel, folder: str | Path) -> None:
    """Load ``folder`` and compare the logits of every exit and of the full depth with those of ``model``.

    Raises:
        CheckpointError: they differ.
    """
    written = load_checkpoint(folder, device_map=None)
    ids = torch.arange(1, 17).remainder(model.anatomy.vocab_size).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = model(ids), written(ids)
    for layer in (*model.exit_layers, None):
        one, two = model.logits(ours, layer).float(), written.logits(theirs, layer).float()
        # Merging an adapter rounds once more than adding it while running.
        tolerance = 1e-4 if hasattr(model.backbone, "peft_config") else 0.0
        if not torch.allclose(one, two, atol=tolerance * one.abs().max().item(), rtol=0.0, equal_nan=True):
            name = "the full depth" if layer is None else f"exit {layer}"
            raise CheckpointError(
                f"{folder}: {name} gives other logits than the run it was exported from.",
                hint="Do not use this folder; please report it with the model's type and versions.",
            )


def _checkpoint_file(run: Path, checkpoint: str) -> Path:
    if run.is_file() or is_checkpoint_folder(run):
        return run
    file = run / "checkpoints" / f"{checkpoint}.ckpt"
    if standing(file).exists():
        return whole_checkpoint(file) if checkpoint == "last" else file
    found = ", ".join(sorted(path.stem for path in file.parent.glob("*.ckpt"))) or "none"
    raise CheckpointError(
        f"{run}: no checkpoint {checkpoint!r}; found {found}.",
        hint="Give the folder named by `eetrain fit --run`, or a .ckpt file.",
    )


def _copy_into(model: MultiExitModel, trained: Mapping[str, Tensor], partial: bool, file: Path) -> None:
    own = model.state_dict()
    wrong = sorted(set(trained) - set(own))
    wrong += [name for name in trained.keys() & own.keys() if trained[name].shape != own[name].shape]
    if not partial:
        wrong += sorted(set(own) - set(trained))
    if wrong:
        raise CheckpointError(
            f"{file}: {len(wrong)} weights do not fit the backbone of the run, first {wrong[0]!r}.",
            hint="The backbone's folder has changed since the run; put the old one back.",
        )
    for name, tensor in trained.items():
        own[name].copy_(tensor)


def _tokenizer(file: Path, stored: dict[str, Any]) -> Any:
    """The run's tokenizer, or its backbone's; ``None`` where neither can be had."""
    source = stored["hyper_parameters"]["backbone"].get("path")
    config = file.parent.parent / "config.yaml"
    if config.is_file():
        named = yaml.safe_load(config.read_text(encoding="utf-8")).get("data", {}).get("tokenizer")
        source = named if isinstance(named, str) else source
    if source is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None


def _read_results(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [{key: row[key] for key in _CARD_COLUMNS if key in row} for row in content["policies"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as results: {error}.", hint="Give the results.json of `eetrain evaluate`."
        ) from error


_CARD_COLUMNS = (
    *("policy", "bleu", "bleu_low", "bleu_high", "rouge_l", "exact_match"),
    *("mean_depth", "blocks_per_token", "decode_tokens_per_second", "speedup"),
)
