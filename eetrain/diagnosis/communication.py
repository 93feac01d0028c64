"""What processes talk with: gloo, NCCL, shared memory; and a real all-reduce between two of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from eetrain.diagnosis.check import Check, reason, size
from eetrain.diagnosis.versions import nccl_version
from eetrain.testing.processes import run_on_processes

_SECONDS = 20.0
_NUMBERS = 2**20
_LITTLE_SHARED = 512 * 2**20


def communication_checks() -> list[Check]:
    """Backends, shared memory, and whether two processes can add up their numbers."""
    if not dist.is_available():
        hint = "Install a build of torch with distributed; this one trains on one process only."
        return [Check("backends", "torch is built without distributed", "error", hint)]
    return [_backends(), *check_shared_memory(Path("/dev/shm")), _all_reduce()]


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


def _all_reduce() -> Check:
    if not dist.is_gloo_available():
        return Check("all-reduce", "not tried", "note")
    start = time.perf_counter()
    try:
        with _without_agent():
            seconds = run_on_processes(_sum_up, 2, timeout=_SECONDS)
    except Exception as error:  # gloo reports all its troubles as RuntimeError, and its processes can die
        hint = "See the gloo interface above, and whether a firewall or container closes the loopback."
        return Check("all-reduce", f"two processes over gloo failed: {reason(error)}", "error", hint)
    whole = time.perf_counter() - start
    found = f"two processes over gloo: 4 MiB in {max(seconds) * 1e3:.1f} ms, started and done in {whole:.1f} s"
    return Check("all-reduce", found, measured={"seconds": max(seconds), "whole_seconds": whole})


def _sum_up() -> float:
    """Seconds of one all-reduce; the first one, which also connects the processes, is not counted."""
    dist.all_reduce(torch.zeros(1))
    values = torch.full((_NUMBERS,), float(dist.get_rank() + 1))
    start = time.perf_counter()
    dist.all_reduce(values)
    seconds = time.perf_counter() - start
    if not bool((values == 3).all()):
        raise RuntimeError(f"1 + 2 came out as {values[0].item():g}")
    return seconds


@contextmanager
def _without_agent() -> Iterator[None]:
    """Without torchrun's variables: with them the two processes would look for its store instead of their own."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("TORCHELASTIC_")}
    try:
        yield
    finally:
        os.environ.update(taken)
