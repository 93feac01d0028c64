"""How large a checkpoint of a run is, or will be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from huggingface_hub import try_to_load_from_cache

from eetrain.backbones.loading import fresh_backbone
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.planning.memory import TrainingState
from eetrain.planning.shapes import find_config
from eetrain.training.building import adapt
from eetrain.training.placing import standing_in
from eetrain.training.settings import BackboneConfig, LoraSettings, ModelSettings

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_WITH_MASTERS = ("PipelineStrategy", "ZeroStrategy")  # DeepSpeed's optimizer


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint.

    Args:
        count: bytes.
        source: the checkpoint measured, or what the number was worked out from.
        exists: whether it was measured.
    """

    count: int
    source: str
    exists: bool


def read_recipe(run: Path, recipe: Path | None = None) -> dict[str, Any]:
    """The settings of ``recipe``, else of ``RUN/config.yaml``; empty if there are none that can be read."""
    path = recipe or run / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def largest_checkpoint(run: Path) -> CheckpointSize | None:
    """The largest checkpoint of a run, file or folder."""
    places = standing_in(run / "checkpoints", ".ckpt")
    if not places:
        return None
    count, place = max((_on_disk(place), place) for place in places)
    return CheckpointSize(count, str(place), True)


def estimated_bytes(recipe: Mapping[str, Any]) -> int | None:
    """What a checkpoint with these settings will have, without loading a weight.

    With ``n`` stored parameters, ``t`` trained ones and ``b`` bytes of a number: ``n b + 2 t b`` with AdamW's two
    moments; DeepSpeed keeps moments and a master in float32 where numbers are shorter: ``n b + 12 t``.

    Returns:
        Nothing if the settings name no backbone, or one that is not on this machine.

    Raises:
        ConfigError, CheckpointError, TypeError: settings from which no model can be built.
    """
    model, trainer = recipe.get("model") or {}, recipe.get("trainer") or {}
    backbone = {key: value for key, value in (model.get("backbone") or {}).items() if value is not None}
    fields = _fields(backbone)
    if fields is None:
        return None
    exits = ExitConfig.from_dict(model.get("exits") or {"layers": []})
    lora = LoraSettings(**(model.get("lora") or {}))
    settings = ModelSettings(BackboneConfig(**backbone), exits, model.get("tuning") or "full", lora)
    with torch.device("meta"):
        built = fresh_backbone(fields)
    hollow = MultiExitModel(built, exits)
    with torch.device("meta"):
        adapt(hollow, settings)
    frozen = sum(weight.numel() for weight in hollow.backbone.parameters() if not weight.requires_grad)
    stored = sum(weight.numel() for weight in hollow.parameters())
    trained = sum(weight.numel() for weight in hollow.parameters() if weight.requires_grad)
    if settings.omits_backbone:
        stored -= frozen
    number = _number_bytes(settings.backbone.dtype, str(trainer.get("precision") or ""), fields)
    state = TrainingState("bfloat16").optimizer_bytes if number == 2 and _has_masters(trainer) else 2 * number
    return int(stored * number + trained * state)


def _fields(backbone: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the backbone, if it is on this machine: asking the hub can take minutes."""
    if backbone.get("config") is not None:
        return dict(backbone["config"])
    path = backbone.get("path")
    if path is None:
        return None
    if not (Path(path) / "config.json").is_file():
        cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
        if not isinstance(cached, str):
            return None
        path = str(Path(cached).parent)
    fields = find_config(path)
    fields.pop("exits", None)
    return fields


def _number_bytes(dtype: str, precision: str, fields: Mapping[str, Any]) -> int:
    if precision.endswith("16-true"):
        return 2
    name = fields.get("dtype") or "float32" if dtype == "auto" else dtype
    return _BYTES.get(str(name), 4)


def _has_masters(trainer: Mapping[str, Any]) -> bool:
    strategy = trainer.get("strategy")
    path = strategy.get("class_path", "") if isinstance(strategy, Mapping) else str(strategy or "")
    return path.rpartition(".")[2] in _WITH_MASTERS or path.startswith("deepspeed")


def _on_disk(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())
