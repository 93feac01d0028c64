"""Back into Slurm's queue."""

from __future__ import annotations

import shutil
import subprocess

from eetrain.cluster.launch import Launch


def requeue(launch: Launch) -> str | None:
    """Put the job of this process back into the queue; Slurm ends it soon afterwards.

    Returns:
        ``None`` if that is done, else why not. The script that started the job does it then, told by the status the
        process ends with.
    """
    if launch.job_id is None:
        return "this is no Slurm job"
    command = shutil.which("scontrol")
    if command is None:
        return "there is no scontrol here"
    done = subprocess.run([command, "requeue", launch.job_id], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 0:
        return None
    return (done.stderr or done.stdout).strip().splitlines()[-1:][0] if (done.stderr or done.stdout).strip() else "?"
