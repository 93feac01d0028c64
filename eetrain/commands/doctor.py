"""`eetrain doctor`: is this machine ready, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import torch

from eetrain.commands.output import print_json, print_table
from eetrain.evaluation.environment import package_version, processor, usable_cores

_LEAST = {"torch": (2, 8), "lightning": (2, 5), "transformers": (5, 17)}
_OPTIONAL = {
    "deepspeed": ("deepspeed", "pipelines and ZeRO"),
    "wandb": ("wandb", "the W&B logger"),
    "cut-cross-entropy": ("cut_cross_entropy", "the fused loss on a GPU"),
}
_GIB = 2**30
_LITTLE_DISK = 1 * _GIB


@dataclass(frozen=True)
class Check:
    """One line of the examination.

    Attributes:
        name: what was looked at.
        found: what was found.
        state: ``ok``, ``note`` (something optional is missing) or ``error``.
        hint: what to do about it.
    """

    name: str
    found: str
    state: str = "ok"
    hint: str = ""


def doctor(json: bool = False) -> int:
    """Examine this machine: versions, devices, threads, memory, disk.

    Args:
        json: write one JSON object.
    """
    checks = [_python(), *_packages(), *_optional(), _cuda(), _cores(), _memory(), _disk(), _writing()]
    errors = [check for check in checks if check.state == "error"]
    verdict = _verdict(errors)
    if json:
        print_json({"ready": not errors, "verdict": verdict, "checks": [asdict(check) for check in checks]})
    else:
        rows = [[check.name, check.found, check.state, check.hint] for check in checks]
        print_table(verdict, ("what", "found", "state", "hint"), rows, left=4)
    return 1 if errors else 0


def _verdict(errors: list[Check]) -> str:
    if errors:
        return f"not ready: {', '.join(check.name for check in errors)}"
    gpus = torch.cuda.device_count()
    return f"ready: {gpus} GPU{'s' if gpus != 1 else ''}" if gpus else f"ready: no GPU, {usable_cores()} cores"


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 11):  # noqa: UP036 - an environment can be older than what the package asks for
        return Check("python", found, "error", "Install Python 3.11 or later.")
    return Check("python", found)


def _packages() -> list[Check]:
    return [check_version(name, least, package_version(name)) for name, least in _LEAST.items()]


def check_version(name: str, least: tuple[int, int], found: str | None) -> Check:
    """Whether an installed version (``None``: not installed) is at least ``least``."""
    wanted = ".".join(map(str, least))
    hint = f"pip install '{name}>={wanted}'"
    if found is None:
        return Check(name, "not installed", "error", hint)
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    return Check(name, found) if numbers >= least else Check(name, found, "error", hint)


def _optional() -> list[Check]:
    checks = []
    for name, (module, use) in _OPTIONAL.items():
        if find_spec(module) is not None:
            checks.append(Check(name, package_version(name) or "installed"))
        else:
            checks.append(Check(name, "not installed", "note", f"Only for {use}: pip install {_how(name)}"))
    return checks


def _how(name: str) -> str:
    """The extra of eetrain that brings a package, else the package."""
    for requirement in requires("eetrain") or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if extra and extra[1] != "dev" and re.match(rf"{re.escape(name)}(?![\w-])", requirement):
            return f"'eetrain[{extra[1]}]'"
    return name


def _cuda() -> Check:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return Check("cuda", f"no device; {built}", "note", "Training and decoding run on the CPU.")
    devices = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    return Check("cuda", ", ".join(f"{device.name} {device.total_memory / _GIB:.0f} GiB" for device in devices))


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
    return Check("memory", f"{free * page / _GIB:.1f} of {pages * page / _GIB:.1f} GiB free")


def _disk() -> Check:
    usage = shutil.disk_usage(Path.cwd())
    found = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free here"
    if usage.free < _LITTLE_DISK:
        return Check("disk", found, "error", "Free some space: a checkpoint does not fit.")
    return Check("disk", found)


def _writing() -> Check:
    try:
        with tempfile.NamedTemporaryFile(dir=Path.cwd(), prefix=".eetrain-doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return Check("writing", f"{Path.cwd()}: {error.strerror}", "error", "Run in a folder that you may write to.")
    return Check("writing", str(Path.cwd()))
