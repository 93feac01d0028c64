"""Folders that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from eetrain.errors import CheckpointError
from eetrain.training.placing import move_into_place


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Give an empty folder to write into; on success it becomes ``target``, on failure nothing is left.

    An existing ``target`` is replaced only if it is empty or holds a model (a ``config.json``), and only at the end.

    Raises:
        CheckpointError: the target is something else, or the disk is full.
    """
    target = Path(target).absolute()
    _check_replaceable(target)
    staged = target.with_name(f".{target.name}.part-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        yield staged
        move_into_place(staged, target)
    except (OSError, SafetensorError) as error:
        raise _explained(error, target) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if target.is_file():
        raise CheckpointError(f"{target} is a file.", hint="Name a folder to write the checkpoint to.")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
        raise CheckpointError(
            f"{target} exists and holds something that is not a model.", hint="Name a new or empty folder."
        )


def _explained(error: OSError | SafetensorError, target: Path) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)
    hint = "Check the path and your rights to write there."
    # safetensors reports a full disk as an error of its own, with the system's text in it.
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in reason:
        hint = "The disk is full; free some space or write elsewhere. What was there before is untouched."
    return CheckpointError(f"Cannot write {target}: {reason}.", hint=hint)
