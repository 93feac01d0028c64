"""What processes talk with: gloo, NCCL, shared memory; and whether two of them can talk here."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from eetrain.diagnosis.all_reduce import check_all_reduce
from eetrain.diagnosis.check import Check, size
from eetrain.diagnosis.versions import nccl_version

_LITTLE_SHARED = 512 * 2**20


def communication_checks() -> list[Check]:
    """Backends, shared memory, and whether two processes can add up their numbers."""
    if not dist.is_available():
        hint = "Install a build of torch with distributed; this one trains on one process only."
        return [Check("backends", "torch is built without distributed", "error", hint)]
    tried = [check_all_reduce()] if dist.is_gloo_available() else []
    return [_backends(), *check_shared_memory(Path("/dev/shm")), *tried]


def check_shared_memory(folder: Path) -> list[Check]:
    """Whether shared memory is large enough for NCCL and for data loader workers; containers often have 64 MB."""
    if not folder.is_dir():
        return []
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    text = f"{size(free)} of {size(found.f_blocks * found.f_frsize)} free"
    if free < _LITTLE_SHARED:
        hint = "Start the container with a larger one, such as --shm-size=8g, or free what is left in it."
        return [Check("shared memory", text, "note", hint, {"free_bytes": free})]
    return [Check("shared memory", text, measured={"free_bytes": free})]


def _backends() -> Check:
    nccl, gloo = nccl_version(), dist.is_gloo_available()
    found = f"{'gloo' if gloo else 'no gloo'}, {f'NCCL {nccl}' if nccl else 'no NCCL'}"
    if not gloo:
        return Check("backends", found, "error", "Install a build of torch with gloo.")
    if nccl is None and torch.cuda.device_count() > 1:
        return Check("backends", found, "error", "Several GPUs need NCCL: install a build of torch that has it.")
    return Check("backends", found)
