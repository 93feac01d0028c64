"""The run folder and the room in it: free space and limits against the size of a checkpoint."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from eetrain.diagnosis.check import GIB, Check, reason, size
from eetrain.diagnosis.checkpoint_size import CheckpointSize, estimated_bytes, largest_checkpoint
from eetrain.diagnosis.mounts import check_file_system
from eetrain.diagnosis.writing import writing_checks

_LITTLE_DISK = GIB
_FEW_FILES = 1000
_MOUNTS = Path("/proc/mounts")


def storage_checks(run: Path, recipe: dict[str, Any]) -> list[Check]:
    """Everything about the folder of a run.

    Args:
        run: it need not be there yet; its nearest parent is looked at then.
        recipe: settings of the run, empty if they are not known.
    """
    folder = run.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return [Check("run folder", f"{folder} is a file", "error", "Name a folder by --run.")]
    folder = folder.resolve()
    present = folder == run.resolve()
    where = Check("run folder", f"{folder}" if present else f"{run} is not there yet; a fit makes it in {folder}")
    wanted, unknown = checkpoint_size(run, recipe)
    table = _MOUNTS.read_text(encoding="utf-8", errors="replace") if _MOUNTS.exists() else ""
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    return [
        where,
        *check_file_system(folder, table),
        *unknown,
        check_disk(free, room.f_blocks * room.f_frsize, wanted),
        *check_files(room.f_favail, room.f_files),
        *check_file_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[0], wanted),
        *writing_checks(folder, free, None if wanted is None else wanted.count),
    ]


def checkpoint_size(run: Path, recipe: dict[str, Any]) -> tuple[CheckpointSize | None, list[Check]]:
    """The largest checkpoint of the run, else an estimate; with a line that says why there is none, if so."""
    found = largest_checkpoint(run)
    if found is not None or not recipe:
        return found, []
    try:
        count = estimated_bytes(recipe)
    except Exception as error:  # settings are the user's, and models may fail to build in any way
        return None, [Check("checkpoint size", f"the settings give none: {reason(error)}", "note")]
    if count is None:
        hint = "Name the backbone in model.backbone.path, a folder of this machine, to have it worked out."
        return None, [Check("checkpoint size", "the backbone is not on this machine", "note", hint)]
    return CheckpointSize(count, "worked out from its settings", False), []


def check_disk(free: int, total: int, wanted: CheckpointSize | None) -> Check:
    """Whether the next checkpoints fit: it is written beside the one before, so two must have room.

    Args:
        free: bytes that this user may still write.
        total: bytes of the disk.
        wanted: a checkpoint of the run. One that is there already is the first of the two.
    """
    found = f"{size(free)} of {size(total)} free"
    if wanted is None:
        if free < _LITTLE_DISK:
            hint = "Free some space: a checkpoint does not fit."
            return Check("disk", found, "error", hint, {"free_bytes": free})
        return Check("disk", found, measured={"free_bytes": free})
    fit = free // max(1, wanted.count)
    found += f"; a checkpoint has {size(wanted.count)} ({wanted.source}), {fit if fit < 1000 else 'over 1000'} fit"
    measured = {"free_bytes": free, "checkpoint_bytes": wanted.count, "checkpoints_that_fit": fit}
    if fit < (1 if wanted.exists else 2):
        hint = "Free space or set another folder by --run: a checkpoint is written beside the one before."
        return Check("disk", found, "error", hint, measured)
    return Check("disk", found, measured=measured)


def check_files(free: int, total: int) -> list[Check]:
    """Whether files can still be made; some file systems do not count them."""
    if total == 0:
        return []
    if free < _FEW_FILES:
        hint = "Delete files there: the disk has room, but no entries for more of them."
        return [Check("files", f"{free} of {total} entries free", "error", hint, {"free_files": free})]
    return [Check("files", f"{free} of {total} entries free", measured={"free_files": free})]


def check_file_limit(limit: int, wanted: CheckpointSize | None) -> list[Check]:
    """Whether the limit on the size of a file (``ulimit -f``) is in the way; nothing if there is none."""
    if limit == resource.RLIM_INFINITY:
        return []
    found = f"files are limited to {size(limit)} (ulimit -f)"
    if wanted is not None and limit < wanted.count:
        return [Check("file size", f"{found}, a checkpoint has {size(wanted.count)}", "error", "ulimit -f unlimited")]
    return [Check("file size", found, "note", "ulimit -f unlimited")]
