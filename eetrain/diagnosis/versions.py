"""Installed packages against the versions eetrain asks for."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires

import torch
from packaging.requirements import Requirement

from eetrain.diagnosis.check import Check
from eetrain.evaluation.environment import package_version

_USES = {
    "deepspeed": "pipelines and ZeRO",
    "wandb": "the W&B logger",
    "cut-cross-entropy": "the fused loss on a GPU",
}
_FOR_DEVELOPERS = "dev"


def version_checks() -> list[Check]:
    """Python, eetrain, every package it needs, and the optional ones with the extra that brings them."""
    try:
        wanted = [Requirement(line) for line in requires("eetrain") or []]
        extras = metadata("eetrain").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        hint = "Install it: pip install -e . in its repository."
        return [_python(), Check("eetrain", "runs from its source; what it needs is not known", "note", hint)]
    checks = [_python(), Check("eetrain", package_version("eetrain") or "unknown")]
    checks += [check_version(each, package_version(each.name)) for each in wanted if each.marker is None]
    for extra in extras:
        if extra != _FOR_DEVELOPERS:
            brought = [each for each in wanted if each.marker and each.marker.evaluate({"extra": extra})]
            checks += [
                check_version(each, package_version(each.name), extra) for each in brought if each.marker is not None
            ]
    return checks


def check_version(wanted: Requirement, found: str | None, extra: str | None = None) -> Check:
    """Whether an installed version is one that eetrain works with.

    Args:
        wanted: name and least version.
        found: ``None`` if it is not installed.
        extra: of eetrain that brings it, for an optional package, which may be missing.
    """
    name = wanted.name
    if found is not None and wanted.specifier.contains(found, prereleases=True):
        return Check(name, found)
    if extra is None:
        return Check(name, found or "not installed", "error", f"pip install '{name}{wanted.specifier}'")
    if found is None:
        hint = f"Only for {_USES.get(name, 'what needs it')}: pip install 'eetrain[{extra}]'"
        return Check(name, "not installed", "note", hint)
    return Check(name, found, "error", f"pip install 'eetrain[{extra}]', which asks for {name}{wanted.specifier}")


def version_table() -> dict[str, str | None]:
    """Version of everything that can matter for a run, ``None`` where it is not there."""
    try:
        names = [Requirement(line).name for line in requires("eetrain") or [] if "dev" not in line]
    except PackageNotFoundError:
        names = ["torch", "lightning", "transformers", "deepspeed"]
    packages = {name: package_version(name) for name in ("eetrain", *names)}
    return {
        "python": platform.python_version(),
        **packages,
        "cuda": torch.version.cuda,
        "nccl": nccl_version(),
        "slurm": _slurm_version(),
    }


def nccl_version() -> str | None:
    """Version of the NCCL that torch brings, ``None`` if it has none."""
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 11):  # noqa: UP036 - an environment can be older than what the package asks for
        return Check("python", found, "error", "Install Python 3.11 or later.")
    return Check("python", found)


def _slurm_version() -> str | None:
    command = shutil.which("scontrol")
    if command is None:
        return None
    try:
        said = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.removeprefix("slurm").strip() or None
