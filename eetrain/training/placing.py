"""Files and folders put in their place so that a kill at any moment leaves the old or the new one whole.

Beside a target ``X`` two hidden names are used: ``.X.part`` while it is written, which is never read, and ``.X.old``
for what a new folder replaces. A folder cannot be renamed over another one, so between two renames only ``.X.old`` is
there; readers look for it with :func:`standing`.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path


def part_of(target: Path) -> Path:
    """Where ``target`` is written before it is moved into its place."""
    return target.with_name(f".{target.name}.part")


def aside_of(target: Path) -> Path:
    """Where the folder at ``target`` stands while another one takes its place."""
    return target.with_name(f".{target.name}.old")


def standing(target: Path) -> Path:
    """Where ``target`` can be read: in its place, or aside if a kill came between the two renames."""
    aside = aside_of(target)
    return aside if os.path.lexists(aside) and not os.path.lexists(target) else target


def standing_in(folder: Path, ending: str) -> list[Path]:
    """Where everything of ``folder`` whose name has this ending can be read, in the order of names."""
    names = {path.name for path in folder.glob(f"[!.]*{ending}")}
    names |= {path.name[1:].removesuffix(".old") for path in folder.glob(f".*{ending}.old")}
    return [standing(folder / name) for name in sorted(names)]


def move_into_place(staged: Path, target: Path) -> None:
    """Rename ``staged`` to ``target``, whatever is there, and flush the renaming to the disk.

    Raises:
        OSError: it cannot be done; ``target`` is as before.
    """
    aside, moved = aside_of(target), False
    if os.path.lexists(target) and (target.is_dir() or staged.is_dir()):
        remove(aside)
        os.replace(target, aside)
        moved = True
    try:
        os.replace(staged, target)
    except OSError:
        if moved:
            os.replace(aside, target)
        raise
    sync(target.parent)
    remove(aside)


def take_away(target: Path) -> None:
    """Delete ``target`` so that a kill in the middle leaves nothing that looks like it."""
    part = part_of(target)
    for path in (aside_of(target), target):
        if os.path.lexists(path):
            remove(part)
            os.replace(path, part)
            remove(part)


def remove(path: Path) -> None:
    """Delete a file, link or folder, as far as it is there and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Flush a file, or the list of names of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def reason_of(error: BaseException) -> str:
    """The system's words for a failed write, wherever a library has put them; else the first line of the error."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
