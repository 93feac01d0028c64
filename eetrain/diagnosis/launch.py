"""How this process was started, and the usual mistakes: read from variables alone."""

from __future__ import annotations

from collections.abc import Mapping

from eetrain.cluster.launch import Launch, check_launch
from eetrain.diagnosis.check import Check
from eetrain.errors import TopologyError

# Values are shown of these only: anything else in an environment may be a secret.
_SHOWN = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_GPUS_ON_NODE",
    "SLURM_RESTART_COUNT",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)
_OF_PROCESSES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def launch_checks(environ: Mapping[str, str], devices: int | str = "auto", nodes: int | None = None) -> list[Check]:
    """The launcher, its variables and the number of tasks.

    Args:
        environ: variables.
        devices: ``trainer.devices`` of the run, if it is known.
        nodes: ``trainer.num_nodes``, likewise.
    """
    return [_place(environ), check_variables(environ), *check_tasks(environ, devices, nodes)]


def shown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those that say how processes were started, from a fixed list of names that are no secrets."""
    return {name: environ[name] for name in _SHOWN if name in environ}


def check_variables(environ: Mapping[str, str]) -> Check:
    """Whether the variables of launchers fit together, and do not stem from another launch."""
    found = " ".join(f"{name}={value}" for name, value in shown_variables(environ).items()) or "none set"
    problem = _two_launchers(environ) or _stale_slurm(environ) or _without_launcher(environ)
    if problem is None:
        return Check("variables", found)
    wrong, hint = problem
    return Check("variables", f"{wrong} ({found})", "error", hint)


def check_tasks(environ: Mapping[str, str], devices: int | str = "auto", nodes: int | None = None) -> list[Check]:
    """Whether Slurm starts as many tasks as the run has devices; nothing outside Slurm."""
    launch = Launch.of(environ)
    if launch.launcher != "slurm":
        return []
    try:
        check_launch(devices, launch.nodes if nodes is None else nodes, environ)
    except TopologyError as error:
        return [Check("tasks", error.message, "error", error.hint)]
    tasks, gpus = launch.tasks_per_node or 1, _int(environ, "SLURM_GPUS_ON_NODE")
    found = f"{tasks} on each of {launch.nodes} nodes" if launch.nodes > 1 else f"{tasks} on one node"
    if "SLURM_STEP_ID" not in environ:
        if launch.world_size == 1:
            return [Check("tasks", found)]
        hint = "Start the run by srun: `srun eetrain fit ...`. Without it one process would wait for the others."
        return [Check("tasks", f"{found}, but this is the script itself, outside srun", "note", hint)]
    if gpus and gpus != tasks:
        hint = f"Write #SBATCH --ntasks-per-node={gpus}: a task for each GPU, or ask for {tasks} GPUs on each node."
        return [Check("tasks", f"{found}, but {gpus} GPUs on this one", "error", hint)]
    return [Check("tasks", found)]


def _place(environ: Mapping[str, str]) -> Check:
    launch = Launch.of(environ)
    parts: list[str] = [launch.launcher]
    if launch.job_id:
        parts.append(f"job {launch.job_id} on {environ.get('SLURM_JOB_NODELIST', 'unknown nodes')}")
    parts.append(f"process {launch.rank} of {launch.world_size}")
    if launch.nodes > 1:
        parts.append(f"{launch.nodes} nodes")
    if launch.restarts:
        parts.append(f"restarted {launch.restarts} times" if launch.restarts > 1 else "restarted once")
    return Check("launch", ", ".join(parts))


def _two_launchers(environ: Mapping[str, str]) -> tuple[str, str] | None:
    if "TORCHELASTIC_RUN_ID" not in environ or "SLURM_JOB_ID" not in environ:
        return None
    tasks, nodes = _int(environ, "SLURM_STEP_NUM_TASKS"), max(1, _int(environ, "SLURM_STEP_NUM_NODES"))
    if "SLURM_STEP_ID" in environ and tasks > nodes:
        return (
            f"torchrun inside srun with {tasks} tasks on {nodes} node{'s' if nodes > 1 else ''}: each of the tasks "
            "starts processes of its own",
            "Use one of them: `srun eetrain ...` with a task for each device, or `srun --ntasks-per-node=1 torchrun "
            "...`.",
        )
    spanned, given = Launch.of(environ).nodes, _int(environ, "SLURM_NNODES")
    if given > spanned:
        return (
            f"torchrun runs on {spanned} of the {given} nodes of this job",
            f"Start it once on each: `srun --ntasks-per-node=1 torchrun --nnodes={given} ...`, or ask for one node.",
        )
    return None


def _stale_slurm(environ: Mapping[str, str]) -> tuple[str, str] | None:
    left = [name for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_NNODES") if name in environ]
    if not left or "SLURM_JOB_ID" in environ:
        return None
    return (
        f"{left[0]} is set, but there is no job (SLURM_JOB_ID): left over from another shell",
        f"unset {' '.join(left)}",
    )


def _without_launcher(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Variables of a launcher in a plain shell, where they were set by hand or left over."""
    given = [name for name in _OF_PROCESSES if name in environ]
    if Launch.of(environ).launcher != "plain" or not given:
        return None
    missing = [name for name in (*_OF_PROCESSES, "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if not missing:
        return None  # processes started by hand, completely
    return (
        f"{' and '.join(given)} without {' and '.join(missing)}, and no launcher: set by hand or left over",
        f"unset {' '.join(given)}, or start the run by torchrun or srun, which set them all.",
    )


def _int(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdigit() else 0
