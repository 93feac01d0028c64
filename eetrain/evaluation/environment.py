"""Where numbers were measured: machine, threads, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("eetrain", "torch", "transformers", "lightning", "sacrebleu", "rouge-score")


def package_version(name: str) -> str | None:
    """Installed version of a distribution, ``None`` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Plain data that belongs next to every measured number.

    Args:
        device: where the model is; its name is reported if it is a GPU.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else "cpu",
        "versions": {name: package_version(name) for name in _PACKAGES},
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def usable_cores() -> int:
    """Cores this process may run on, which a container or a batch system can limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
