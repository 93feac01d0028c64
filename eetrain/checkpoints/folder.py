"""The checkpoint folder: the backbone's own files, ``exit_heads.safetensors``, an ``exits`` entry in ``config.json``.

``AutoModelForCausalLM`` opens the folder as the plain model, because nothing it reads has changed in form.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from eetrain.backbones.loading import load_backbone, load_config
from eetrain.checkpoints.atomic import new_folder
from eetrain.checkpoints.card import model_card
from eetrain.checkpoints.fingerprint import fingerprint
from eetrain.decoding.policies import parse_policy
from eetrain.errors import CheckpointError, ConfigError
from eetrain.exits.config import ExitConfig

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel

HEADS_FILE = "exit_heads.safetensors"
FORMAT = 1


def save_checkpoint(
    model: MultiExitModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    exit_policy: str | None = None,
    keep_adapter: bool = False,
    results: list[dict[str, Any]] | None = None,
) -> Path:
    """Write ``folder``, whole or not at all.

    Args:
        model: with its whole backbone loaded.
        folder: new, empty, or an older checkpoint, which is replaced.
        tokenizer: saved along.
        exit_policy: becomes the default of ``generate``; one that is stored with the model stays unless given.
        keep_adapter: with a PEFT backbone, write the adapter and refer to its base instead of merging; plain
            ``AutoModelForCausalLM`` does not open such a folder.
        results: rows of ``eetrain evaluate`` for the model card.

    Raises:
        ConfigError: a policy that does not parse or does not fit the model's exits.
        CheckpointError: only part of the backbone is loaded, the disk is full, or the folder holds something else.
    """
    if not model.full_depth_loaded:
        raise CheckpointError(
            f"Only blocks 1..{model.num_blocks} of the backbone are loaded; a checkpoint needs all.",
            hint="Load the whole backbone (depth=None); `eetrain export` does.",
        )
    exit_policy = _default_policy(model, exit_policy)
    with new_folder(folder) as staged:
        _write_backbone(model.backbone, staged, keep_adapter)
        save_file(_head_tensors(model), staged / HEADS_FILE, metadata={"format": "pt"})
        _write_exits_entry(model, staged)
        _write_generation_config(model.causal_lm, staged, exit_policy)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        (staged / "README.md").write_text(model_card(model, exit_policy, results), encoding="utf-8")
    return Path(folder)


def load_checkpoint(folder: str | Path, *, depth: int | None = None, **loading: Any) -> MultiExitModel:
    """Load a multi-exit checkpoint, in eval mode.

    Args:
        folder: written by :func:`save_checkpoint`.
        depth: load blocks ``1..depth`` and the exits among them only.
        **loading: see :func:`eetrain.backbones.loading.load_backbone`.

    Raises:
        CheckpointError: not a multi-exit checkpoint, cut short, or exits that do not fit the backbone.
    """
    from eetrain.exits import MultiExitModel

    folder = Path(folder)
    entry = _read_exits_entry(folder)
    found = fingerprint(folder)
    if entry.pop("fingerprint") != found:
        raise CheckpointError(
            f"{folder}: the exits were trained with other backbone weights than those in the folder.",
            hint="Export again; to put exits on changed weights, train them there.",
        )
    config = ExitConfig.from_dict(entry)
    backbone = load_backbone(folder, depth=depth, **loading)
    if depth is not None:
        config = replace(config, layers=[layer for layer in config.layers or () if layer <= depth])
    model = MultiExitModel(backbone, config)
    _load_heads(model, folder, partial=depth is not None)
    return model.eval()


def open_model(path: str | Path, **loading: Any) -> MultiExitModel:
    """Open a multi-exit checkpoint, or a plain backbone as a model without exits."""
    from eetrain.exits import MultiExitModel

    config = load_config(path, trust_remote_code=loading.get("trust_remote_code", False))
    if getattr(config, "exits", None) is not None:
        return load_checkpoint(path, **loading)
    return MultiExitModel.attach(path, ExitConfig(layers=[]), **loading).eval()


def _default_policy(model: MultiExitModel, given: str | None) -> str | None:
    """The policy to store: the one given, else the backbone's own if it fits these exits."""
    inherited = getattr(getattr(model.causal_lm, "generation_config", None), "exit_policy", None)
    wanted = given or inherited
    if wanted is None:
        return None
    try:
        policy = parse_policy(wanted)
        policy.check(model)
    except ConfigError:
        if given is not None:
            raise
        return None
    return str(policy)


def _write_backbone(backbone: nn.Module, staged: Path, keep_adapter: bool) -> None:
    if not hasattr(backbone, "merge_and_unload"):
        backbone.save_pretrained(staged)  # type: ignore[operator]
    elif keep_adapter:
        backbone.save_pretrained(staged)  # type: ignore[operator]
        backbone.get_base_model().config.save_pretrained(staged)  # type: ignore[operator]
    else:
        copy.deepcopy(backbone).merge_and_unload().save_pretrained(staged)  # type: ignore[operator]


def _head_tensors(model: MultiExitModel) -> dict[str, Tensor]:
    state = {f"exits.{name}": tensor for name, tensor in model.exits.state_dict().items()}
    state |= {f"gates.{name}": tensor for name, tensor in model.gates.state_dict().items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _write_exits_entry(model: MultiExitModel, staged: Path) -> None:
    path = staged / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["exits"] = {**model.config.to_dict(), "format": FORMAT, "fingerprint": fingerprint(staged)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_exits_entry(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # text that is no JSON and bytes that are no text are ValueErrors
        raise CheckpointError(
            f"{path} cannot be read: {error}.", hint="Give a folder that `eetrain export` wrote."
        ) from error
    entry = config.get("exits") if isinstance(config, dict) else None
    if not isinstance(entry, dict) or "fingerprint" not in entry:
        raise CheckpointError(
            f"{folder} is a model without exits.",
            hint="Attach exits with MultiExitModel.attach, or train them with `eetrain fit`.",
        )
    if entry.pop("format", None) != FORMAT:
        raise CheckpointError(f"{folder}: an unknown format of exits.", hint="Load it with the eetrain that wrote it.")
    return entry


def _load_heads(model: MultiExitModel, folder: Path, partial: bool) -> None:
    try:
        stored = load_file(folder / HEADS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / HEADS_FILE} cannot be read: {error}.", hint="It is missing or cut short; export again."
        ) from error
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("exits.", "gates."))}
    if partial:
        stored = {name: tensor for name, tensor in stored.items() if name in wanted}
    wrong = sorted(set(stored) ^ set(wanted))
    wrong += [name for name, tensor in wanted.items() if name in stored and stored[name].shape != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors of the exits do not fit this backbone, first {wrong[0]!r}.",
            hint="config.json and exit_heads.safetensors are of different models; export again.",
        )
    for name, tensor in wanted.items():
        tensor.copy_(stored[name])


def _write_generation_config(causal_lm: Any, staged: Path, exit_policy: str | None) -> None:
    given = getattr(causal_lm, "generation_config", None)
    values = {} if given is None else given.to_diff_dict()
    # transformers drops keys it does not know from a file that says it was derived from the model's config.
    values.pop("_from_model_config", None)
    values.pop("exit_policy", None)
    if exit_policy is not None:
        values["exit_policy"] = exit_policy
    GenerationConfig.from_dict(values).save_pretrained(staged)
