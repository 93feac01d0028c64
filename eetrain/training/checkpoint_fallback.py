"""Going on from the newest whole checkpoint where the wanted one is damaged."""

from __future__ import annotations

import warnings
from pathlib import Path

from eetrain.errors import CheckpointError
from eetrain.training.checkpoint_reading import CheckpointFolder, check_checkpoint, read_trainer_state
from eetrain.training.placing import standing, standing_in
from eetrain.training.processes import ALONE, Processes

LAST = "last.ckpt"


def whole_checkpoint(path: str | Path, processes: Processes = ALONE) -> Path:
    """``path`` if it is whole, else the newest whole checkpoint of the same folder, with a warning.

    A checkpoint of more steps than the wanted one is passed over, as far as its number of steps can still be read.

    Args:
        path: a checkpoint folder or file.
        processes: share the work and come to one answer; all of them call this.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        CheckpointError: it is damaged, and no other is whole.
    """
    path = standing(Path(path))
    problem = _problem(path, processes)
    if problem is None:
        return path
    # What the others read counts for nothing: all must try the same ones in the same order.
    wanted, older = processes.gather(_older(path) if processes.rank == 0 else (None, []))[0]
    for step, other in older:
        if _problem(other, processes) is None:
            if processes.rank == 0:
                lost = "an unknown number of" if wanted is None else str(wanted - step)
                warnings.warn(
                    f"{problem.message} Going on from {other} at step {step} instead; {lost} steps are lost.",
                    stacklevel=2,
                )
            return other
    raise CheckpointError(f"{problem.message} No other checkpoint in {path.parent} is whole.", hint=problem.hint)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of most steps in a folder, whole or not; of equal steps that written last.

    Returns:
        ``last.ckpt`` if it is there and its number of steps cannot be read, so that :func:`whole_checkpoint` tells what
        is wrong with it; ``None`` if there is no checkpoint at all.
    """
    folder = Path(folder)
    last = standing(folder / LAST)
    if last.exists() and _step(last) is None:
        return last
    return next((path for _, path in _by_step(folder)), None)


def _problem(path: Path, processes: Processes) -> CheckpointError | None:
    try:
        check_checkpoint(path, processes)
    except CheckpointError as error:
        return error
    return None


def _older(path: Path) -> tuple[int | None, list[tuple[int, Path]]]:
    """The step of the checkpoint at ``path``, if it can be read, and those of its folder up to it, newest first."""
    wanted = _step(path)
    others = [(step, other) for step, other in _by_step(path.parent) if other.resolve() != path.resolve()]
    return wanted, [(step, other) for step, other in others if wanted is None or step <= wanted]


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """All checkpoints of a folder whose step can be read, newest first; of equal steps, that written last."""
    steps = [(step, path) for path in standing_in(folder, ".ckpt") if (step := _step(path)) is not None]
    return sorted(steps, key=lambda found: (found[0], found[1].stat().st_mtime), reverse=True)


def _step(path: Path) -> int | None:
    try:
        if path.is_dir():
            return CheckpointFolder.open(path, check=False).global_step
        return int(read_trainer_state(path)["global_step"])
    except (CheckpointError, FileNotFoundError, KeyError, TypeError):
        return None
