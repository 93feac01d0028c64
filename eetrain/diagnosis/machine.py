"""The machine: its GPUs, cores and memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from eetrain.diagnosis.check import GIB, Check
from eetrain.evaluation.environment import processor, usable_cores

_DRIVER = Path("/proc/driver/nvidia/version")
_NONE_VISIBLE = ("", "-1", "NoDevFiles")


def machine_checks(environ: Mapping[str, str]) -> list[Check]:
    """GPUs, cores against threads, memory."""
    return [_cuda(), *check_visible(environ), _cores(), _memory()]


def check_visible(environ: Mapping[str, str]) -> list[Check]:
    """Whether ``CUDA_VISIBLE_DEVICES`` hides all GPUs, which looks like a machine that has none."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None or value.split(",")[0].strip() not in _NONE_VISIBLE:
        return []
    given = environ.get("SLURM_GPUS_ON_NODE", "0")
    found = f"CUDA_VISIBLE_DEVICES={value!r} hides all GPUs"
    if given.isdigit() and int(given):
        hint = "Leave CUDA_VISIBLE_DEVICES to Slurm: remove it from the script and from your shell's start-up files."
        return [Check("visible gpus", f"{found}, but Slurm gave {given} on this node", "error", hint)]
    return [Check("visible gpus", found, "note", "unset CUDA_VISIBLE_DEVICES, unless a CPU run is meant.")]


def _cuda() -> Check:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
        return Check("cuda", ", ".join(f"{device.name} {device.total_memory / GIB:.0f} GiB" for device in devices))
    if torch.version.cuda is None:
        hint = "Install a build of torch for CUDA." if _DRIVER.exists() else "Training and decoding run on the CPU."
        return Check("cuda", "no device; torch is built without CUDA", "note", hint)
    found = f"no device; torch is built for CUDA {torch.version.cuda}"
    if _DRIVER.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        hint = "Update the driver, or install a torch built for its CUDA version (nvidia-smi shows it)."
        return Check("cuda", f"{found}, and there is an NVIDIA driver", "error", hint)
    return Check("cuda", found, "note", "Training and decoding run on the CPU.")


def _cores() -> Check:
    cores, threads = usable_cores(), torch.get_num_threads()
    found = f"{cores} cores, {threads} threads, {processor()}"
    if threads > cores:
        return Check("cores", found, "note", f"Set OMP_NUM_THREADS={cores}: more threads than cores are slow.")
    return Check("cores", found)


def _memory() -> Check:
    try:
        page, pages, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return Check("memory", "unknown on this system", "note")
    measured = {"free_bytes": free * page, "total_bytes": pages * page}
    return Check("memory", f"{free * page / GIB:.1f} of {pages * page / GIB:.1f} GiB free", measured=measured)
