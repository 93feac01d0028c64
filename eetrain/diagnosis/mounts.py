"""Which file system a folder is on, as the kernel tells it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from eetrain.diagnosis.check import Check

_NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "9p", "virtiofs"),
    *(
        "panfs",
        "wekafs",
        "orangefs",
        "pvfs2",
        "ocfs2",
        "gfs2",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.ceph",
        "fuse.quobyte",
    ),
    *("fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs", "fuse.beegfs", "fuse.mfs"),
}
_IN_MEMORY = {"tmpfs", "ramfs"}
_OF_CONTAINER = {"overlay", "fuse.fuse-overlayfs", "aufs"}


class Mount(NamedTuple):
    """A line of ``/proc/mounts``: where, of what kind, with which options."""

    point: str
    kind: str
    options: tuple[str, ...]


def mount_of(folder: Path, table: str) -> Mount | None:
    """The mount that holds a folder.

    Args:
        folder: absolute, links resolved.
        table: content of ``/proc/mounts``.
    """
    best: Mount | None = None
    for line in table.splitlines():
        _, point, kind, options, *_ = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), point)
        # Of mounts on one point the last one counts.
        if folder.is_relative_to(point) and (best is None or len(point) >= len(best.point)):
            best = Mount(point, kind, tuple(options.split(",")))
    return best


def check_file_system(folder: Path, table: str) -> list[Check]:
    """Say if the folder is on a network disk, in memory, in a container's layer, or read-only."""
    mount = mount_of(folder, table)
    if mount is None:
        return []
    found = f"{mount.kind} at {mount.point}"
    if "ro" in mount.options:
        hint = "Choose a folder on another disk by --run, or mount this one for writing."
        return [Check("file system", f"{found}, read-only", "error", hint)]
    if mount.kind in _IN_MEMORY:
        hint = "What is written there is lost when the machine stops, and takes from its memory."
        return [Check("file system", f"{found}, in memory", "note", hint)]
    if mount.kind in _OF_CONTAINER:
        hint = "What is written there is lost with the container: bind a folder of the host for runs."
        return [Check("file system", f"{found}, a container's own layer", "note", hint)]
    if mount.kind in _NETWORK:
        return [Check("file system", f"{found}, over the network; a quota does not show here")]
    return [Check("file system", found)]
