"""A real all-reduce between two short-lived processes; this module loads torch only, because they load it too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from eetrain.diagnosis.check import Check, reason
from eetrain.testing.processes import run_on_processes

_SECONDS = 20.0
_NUMBERS = 2**20


def check_all_reduce() -> Check:
    """Whether two processes of this machine can add up 4 MiB of numbers over gloo, and how long it takes."""
    start = time.perf_counter()
    try:
        with _without_agent():
            seconds = max(run_on_processes(_sum_up, 2, timeout=_SECONDS))
    except Exception as error:  # gloo reports all its troubles as RuntimeError, and its processes can die
        hint = "See the gloo interface above, and whether a firewall or container closes the loopback."
        return Check("all-reduce", f"two processes over gloo failed: {reason(error)}", "error", hint)
    whole = time.perf_counter() - start
    found = f"two processes over gloo: 4 MiB in {seconds * 1e3:.1f} ms, started and done in {whole:.1f} s"
    return Check("all-reduce", found, measured={"seconds": seconds, "whole_seconds": whole})


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
