"""Handing a script to Slurm: checked first, then submitted; what sbatch says against it as one line and a hint."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from eetrain.errors import ConfigError

# What sbatch says where Slurm is installed but none answers.
_NO_ANSWER = ("Could not establish a configuration source", "Unable to contact slurm controller")
_BEFORE = re.compile(r"^(sbatch|allocation failure): (error: |fatal: )?")
_HINTS = {
    "account": "Set account in the site file to one that `sacctmgr show assoc user=$USER` shows.",
    "partition": "Set partition in the site file to one that `sinfo` shows.",
    "qos": "Set qos in the site file to one that `sacctmgr show assoc user=$USER` shows.",
    "gres": "Set gpu_request in the site file to what this cluster knows (gpus-per-node, gres or none), and gpu_type.",
    "feature": "Set constraint in the site file to features that `sinfo -o %f` shows.",
    "node configuration": "Ask for less: --nodes, --gpus, and memory and cpus_per_task of the site file, against "
    "`sinfo -N -l`.",
    "option": "Check the entries of sbatch in the site file.",
}


def sbatch_command() -> str | None:
    """Where sbatch is; ``None`` if it is not on ``PATH``."""
    return shutil.which("sbatch")


def required_sbatch() -> str:
    """Where sbatch is.

    Raises:
        ConfigError: it is not on ``PATH``.
    """
    command = sbatch_command()
    if command is None:
        raise ConfigError(
            "There is no sbatch here, so nothing can be submitted.",
            hint="Submit on a login node of the cluster; --dry-run shows the script anywhere. Without Slurm `eetrain "
            "fit` runs as it is, or under torchrun.",
        )
    return command


def check(command: str, script: str) -> str | None:
    """Let Slurm check a script without submitting it.

    Args:
        command: sbatch.
        script: its text.

    Returns:
        ``None`` if it would be taken, else why that could not be found out: no Slurm answers.

    Raises:
        ConfigError: Slurm would not take it.
    """
    done = _run([command, "--test-only"], script)
    if done.returncode == 0:
        return None
    said = _said(done.stderr)
    if _unanswered(said):
        return "no Slurm answers here"
    raise _refused(said)


def submit(command: str, script: Path) -> str:
    """Submit a script file.

    Args:
        command: sbatch.
        script: the file.

    Returns:
        The job's number.

    Raises:
        ConfigError: Slurm does not take the job, does not answer, or answers without a number.
    """
    done = _run([command, "--parsable", str(script)])
    said = _said(done.stderr)
    if done.returncode != 0 and not _unanswered(said):
        raise _refused(said)
    found = re.search(r"^(\d+)(;|$)", done.stdout, flags=re.MULTILINE)  # 123, or 123;cluster
    if done.returncode != 0 or found is None:
        raise ConfigError(
            f"sbatch gave no number of a job: {said or 'it said nothing'}.", hint="Look at `sinfo` and `squeue --me`."
        )
    return found[1]


def without_job(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the job or launcher it may be in: a new job would take over their sizes and port."""
    of_launcher = re.compile(r"TORCHELASTIC_\w+|(LOCAL_|NODE_|GROUP_|ROLE_)?RANK|(\w+_)?WORLD_SIZE|MASTER_(ADDR|PORT)")
    environ = {name: value for name, value in environ.items() if not of_launcher.fullmatch(name)}
    if "SLURM_JOB_ID" not in environ:
        return environ
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {name: value for name, value in environ.items() if not name.startswith("SLURM_") or name in kept}


def _run(command: list[str], script: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=script,
            stdin=subprocess.DEVNULL if script is None else None,
            env=without_job(os.environ),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            "sbatch did not answer for 120 s.", hint="Slurm may be busy; look at `sinfo`, then submit again."
        ) from error


def _said(text: str) -> str:
    """What sbatch wrote on stderr, as one line."""
    lines = [_BEFORE.sub("", line).strip().rstrip(".") for line in text.splitlines()]
    return "; ".join(line for line in dict.fromkeys(lines) if line and not line.startswith("Try "))


def _unanswered(said: str) -> bool:
    return any(words in said for words in _NO_ANSWER)


def _refused(said: str) -> ConfigError:
    lowered = said.lower()
    hint = next((hint for word, hint in _HINTS.items() if word in lowered), "`sinfo` shows what the cluster has.")
    return ConfigError(f"Slurm does not take the job: {said or 'sbatch said nothing'}.", hint=hint)
