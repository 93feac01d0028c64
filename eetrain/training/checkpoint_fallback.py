"""Going on from the newest whole checkpoint where the wanted one is damaged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from eetrain.errors import CheckpointError
from eetrain.training.checkpoint_manifest import is_checkpoint_folder
from eetrain.training.checkpoint_reading import CheckpointFolder, check_checkpoint, read_trainer_state
from eetrain.training.placing import standing, standing_in
from eetrain.training.processes import ALONE, Processes

LAST = "last.ckpt"


class Mend(Protocol):
    """Tells whether a damaged checkpoint will do; all processes ask it together and hear the same."""

    def __call__(self, path: Path, problem: CheckpointError) -> CheckpointError | None:
        """``None`` if the checkpoint at ``path`` will do; else its problem, perhaps with the reason why not."""


def _as_it_is(path: Path, problem: CheckpointError) -> CheckpointError | None:
    return problem


def whole_checkpoint(path: str | Path, processes: Processes = ALONE, *, mend: Mend = _as_it_is) -> Path:
    """``path`` if it is whole, else the newest whole checkpoint of the same folder, with a warning.

    A checkpoint of more steps than the wanted one is passed over, as far as its number of steps can still be read.

    Args:
        path: a checkpoint folder or file.
        processes: share the work and come to one answer; all of them call this.
        mend: what it lets pass is taken if no whole one has as many steps.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        CheckpointError: it is damaged, and no other is whole.
    """
    path = standing(Path(path))
    problem = _problem(path, processes)
    if problem is None:
        return path
    unmended = mend(path, problem)
    # What the others read counts for nothing: all must try the same ones in the same order.
    wanted, older = processes.gather(_older(path) if processes.rank == 0 else (None, []))[0]
    found = _best(None if unmended else (wanted, path), older, processes, mend)
    problem = unmended or problem
    if found is None:
        raise CheckpointError(f"{problem.message} No other checkpoint in {path.parent} is whole.", hint=problem.hint)
    step, best = found
    if best != path and processes.rank == 0:
        lost = "an unknown number of" if wanted is None or step is None else str(wanted - step)
        warnings.warn(
            f"{problem.message} Going on from {best} at step {step} instead; {lost} steps are lost.", stacklevel=2
        )
    return best


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of most steps in a folder, whole or not.

    Returns:
        ``last.ckpt`` if none has more steps, or its number of steps cannot be read: :func:`whole_checkpoint` tells then
        what is wrong with it. ``None`` if there is no checkpoint at all.
    """
    folder = Path(folder)
    last, by_step = standing(folder / LAST), _by_step(folder)
    if (last.is_file() or is_checkpoint_folder(last)) and _step(last) in (None, *(step for step, _ in by_step[:1])):
        return last
    return next((path for _, path in by_step), None)


def _best(
    mended: tuple[int | None, Path] | None, older: Sequence[tuple[int, Path]], processes: Processes, mend: Mend
) -> tuple[int | None, Path] | None:
    """The newest that is whole or will do, whole ones first among those of equal steps."""
    for step, path in older:
        if mended is not None and step != mended[0]:
            break
        problem = _problem(path, processes)
        if problem is None:
            return step, path
        if mended is None and mend(path, problem) is None:
            mended = step, path
    return mended


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
