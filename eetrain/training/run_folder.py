"""The folder of a run: which checkpoint a fit goes on from, and whether the folder is this run's at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from eetrain.errors import ConfigError
from eetrain.training.checkpoint_fallback import newest_checkpoint

CONFIG_FILE = "config.yaml"
# What makes a run this run: with another value of one of these its checkpoints are those of something else.
IDENTITY = (
    "model.backbone.path",
    "model.backbone.config",
    "model.exits",
    "model.objective",
    "model.tuning",
    "model.lora",
    "data.train",
    "data.template",
    "data.tokenizer",
    "data.max_length",
    "data.packing",
)


def start_from(folder: Path, checkpoints: Path, resume: str, ckpt_path: str | None) -> str | None:
    """The checkpoint a fit begins with.

    Args:
        folder: of the run.
        checkpoints: where its checkpoints are.
        resume: ``auto`` takes the newest of the folder and, if there is none, ``ckpt_path``; ``never`` takes
            ``ckpt_path``.
        ckpt_path: a path, ``last``, or ``None`` to begin anew.

    Raises:
        ConfigError: the fit would begin anew in a folder that holds a run already.
    """
    newest = newest_checkpoint(checkpoints)
    if newest is not None and (resume == "auto" or ckpt_path == "last"):
        return str(newest)
    if newest is not None and ckpt_path is None:
        raise ConfigError(
            f"{folder} holds a run already ({newest}), which a new one would overwrite.",
            hint="Go on with it by --resume auto, set another folder by --run, or delete this one.",
        )
    return ckpt_path


def check_same_run(folder: Path, checkpoints: Path, config: Mapping[str, Any]) -> None:
    """Check that the checkpoints of a folder were made with the recipe of this fit.

    The optimizer, the strategy, the length of the run and everything else may differ.

    Args:
        folder: of the run.
        checkpoints: where its checkpoints are.
        config: of this fit, as plain data.

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    written = folder / CONFIG_FILE
    if newest_checkpoint(checkpoints) is None or not written.is_file():
        return
    try:
        stored = yaml.safe_load(written.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{written} cannot be read: {error}.", hint="Set another folder by --run.") from error
    for key in IDENTITY:
        for name, before, now in _differences(key, _at(stored, key), _at(config, key)):
            raise ConfigError(
                f"{folder} is the folder of another recipe: its run has {name}={_shown(before)}, this one "
                f"{name}={_shown(now)}.",
                hint="Set another folder by --run, or go back to the recipe of this one.",
            )


def _differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping | None) and isinstance(now, Mapping | None):
        before, now = before or {}, now or {}
        for key in sorted({*before, *now}, key=str):
            yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now and not _same_place(before, now):
        yield name, before, now


def _same_place(before: Any, now: Any) -> bool:
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    return Path(before).exists() and Path(before).resolve() == Path(now).resolve()


def _at(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
