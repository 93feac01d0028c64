"""How this process was started: by Slurm, by torchrun, or plainly; and whether that fits the settings."""

from __future__ import annotations

import getpass
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eetrain.cluster.signals import REQUESTS
from eetrain.errors import TopologyError

# Names of Slurm jobs that Lightning takes for a shell in which processes are started by hand.
_BY_HAND = ("bash", "interactive")


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of its run.

    Args:
        launcher: ``slurm`` (``srun``), ``torchrun``, or ``plain``: one process, which may start others of this machine.
        rank: number among all processes, from 0.
        local_rank: number among those of its machine, from 0.
        world_size: how many were started; 1 if plain and none were started yet.
        nodes: machines.
        tasks_per_node: processes of a machine, where Slurm was told.
        job_id: as ``scontrol`` takes it: ``123``, or ``123_4`` for a task of an array; ``None`` outside Slurm.
        restarts: how often the job was put back into the queue, or restarted by torchrun.
    """

    launcher: Literal["slurm", "torchrun", "plain"]
    rank: int
    local_rank: int
    world_size: int
    nodes: int
    tasks_per_node: int | None
    job_id: str | None
    restarts: int

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Launch:
        """Read it from the environment.

        Args:
            environ: variables, those of the process if left out.
        """
        job = _job(environ)
        if "TORCHELASTIC_RUN_ID" in environ:
            size, local = _int(environ, "WORLD_SIZE", 1), _int(environ, "LOCAL_WORLD_SIZE", 1)
            restarts = _int(environ, "TORCHELASTIC_RESTART_COUNT", 0)
            rank, local_rank = _int(environ, "RANK", 0), _int(environ, "LOCAL_RANK", 0)
            return cls("torchrun", rank, local_rank, size, max(1, size // max(1, local)), None, job, restarts)
        if uses_srun(environ):
            size, per_node = _int(environ, "SLURM_NTASKS", 1), _int(environ, "SLURM_NTASKS_PER_NODE", 0) or None
            nodes = _int(environ, "SLURM_NNODES", 1)
            rank, local_rank = _int(environ, "SLURM_PROCID", 0), _int(environ, "SLURM_LOCALID", 0)
            return cls("slurm", rank, local_rank, size, nodes, per_node, job, _int(environ, "SLURM_RESTART_COUNT", 0))
        size, local_rank = _int(environ, "WORLD_SIZE", 1), _int(environ, "LOCAL_RANK", 0)
        # A machine's first process, started by hand, knows the number of its machine only.
        rank = _int(environ, "RANK", _int(environ, "NODE_RANK", 0) or local_rank)
        return cls("plain", rank, local_rank, size, 1, None, job, _int(environ, "SLURM_RESTART_COUNT", 0))


def uses_srun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Slurm starts one process for each device: ``srun`` in a job that is not a shell."""
    return "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in _BY_HAND


def check_launch(devices: int | str, num_nodes: int, environ: Mapping[str, str] = os.environ) -> None:
    """Check that Slurm started as many processes as the Trainer expects.

    Args:
        devices: ``trainer.devices``; words such as ``auto`` are not looked at.
        num_nodes: ``trainer.num_nodes``.
        environ: variables.

    Raises:
        TopologyError: quotes both numbers.
    """
    launch = Launch.of(environ)
    if launch.launcher != "slurm":
        return
    if launch.world_size > 1 and launch.tasks_per_node is None:
        per_node = launch.world_size // launch.nodes
        raise TopologyError(
            f"Slurm was asked for {launch.world_size} tasks by a bare --ntasks, which leaves open how many run on each "
            "node.",
            hint=f"Write #SBATCH --nodes={launch.nodes} and #SBATCH --ntasks-per-node={per_node} instead of --ntasks.",
        )
    per_node = launch.tasks_per_node or 1
    if str(devices).isdigit() and int(devices) != per_node:  # on the command line a number is a word
        raise TopologyError(
            f"trainer.devices={devices}, but Slurm runs {per_node} tasks on each node (--ntasks-per-node).",
            hint=f"Set trainer.devices={per_node}, or #SBATCH --ntasks-per-node={devices}: one task for each device.",
        )
    if num_nodes != launch.nodes:
        raise TopologyError(
            f"trainer.num_nodes={num_nodes}, but Slurm gave the job {launch.nodes} nodes (--nodes).",
            hint=f"Set trainer.num_nodes={launch.nodes}, or #SBATCH --nodes={num_nodes}.",
        )


def this_process(environ: Mapping[str, str] = os.environ) -> str:
    """Who runs this, for other people to read: ``ana on nid0012, process 4711, job 123``."""
    job = _job(environ)
    return f"{_user()} on {platform.node()}, process {os.getpid()}" + (f", job {job}" if job else "")


def alone_after(seconds: float) -> bool:
    """Wait; whether the process that started this one is still there afterwards, and nobody asked this one to end."""
    parent, end = os.getppid(), time.monotonic() + seconds
    while time.monotonic() < end:
        if os.getppid() != parent or REQUESTS.code:
            return False
        time.sleep(0.05)
    return True


def _job(environ: Mapping[str, str]) -> str | None:
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name for the user's number, as in some containers
        return f"user {os.getuid()}"


def _int(environ: Mapping[str, str], name: str, default: int) -> int:
    """The variable's number; Slurm writes some as ``4(x2)`` or ``4,3``, of which the first one counts."""
    digits = environ.get(name, "").split("(")[0].split(",")[0]
    return int(digits) if digits.isdigit() else default
