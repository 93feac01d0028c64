"""What Slurm knows of the job: whether it can be put back into the queue, and is warned before its time is over."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping

from eetrain.cluster.launch import Launch
from eetrain.diagnosis.check import Check

_SECONDS = 5
_LINE = re.compile(r"^#SBATCH\s+(?P<rest>.*?)\s*$", re.M)
_SIGNAL = re.compile(r"^--signal[=\s](?P<batch>B:)?(?P<name>\w+)")
_HEARD = ("USR1", "SIGUSR1", "10", "TERM", "SIGTERM", "15")
_WRITE = "Write #SBATCH --signal=SIGUSR1@180 into the script: a run then saves and requeues itself in time."


def slurm_checks(environ: Mapping[str, str]) -> list[Check]:
    """The job of this process; nothing outside Slurm."""
    job = Launch.of(environ).job_id
    if job is None:
        return []
    command = shutil.which("scontrol", path=environ.get("PATH"))
    if command is None:
        hint = "A run that is stopped near its time limit ends with status 75; let the script requeue it then."
        return [Check("requeue", "no scontrol on PATH: the job cannot requeue itself", "note", hint)]
    said = _ask(command, "show", "job", "-o", job)
    requeue = check_requeue(job, said)
    if requeue.state == "error":
        return [requeue]
    script = _ask(command, "write", "batch_script", job, "-")
    return [requeue, *(check_script(script.stdout) if script and script.returncode == 0 else [])]


def check_requeue(job: str, said: subprocess.CompletedProcess[str] | None) -> Check:
    """Read the answer of ``scontrol show job -o``.

    Args:
        job: its id.
        said: the answer; ``None`` if there was none in time.
    """
    if said is None or said.returncode:
        if said is not None and "Invalid job id" in said.stderr + said.stdout:
            hint = "unset the SLURM_* variables: they were left over from a job that has ended."
            return Check("requeue", f"Slurm knows no job {job}", "error", hint)
        return Check("requeue", "scontrol gives no answer here", "note", "See whether this node may reach slurmctld.")
    fields = dict(re.findall(r"(?:^|\s)([\w/:]+)=(\S*)", said.stdout))
    limit = f"time limit {fields.get('TimeLimit', 'unknown')}"
    if fields.get("Requeue") != "1":
        hint = "Write #SBATCH --requeue into the script, or the run ends for good at its time limit."
        return Check("requeue", f"off for this job, {limit}", "note", hint)
    return Check("requeue", f"on, {limit}")


def check_script(script: str) -> list[Check]:
    """The signal before the time limit, and variables where Slurm does not expand them.

    Args:
        script: the batch script of the job.
    """
    rests = [found["rest"].split(" #")[0] for found in _LINE.finditer(script)]
    checks = [_signal(rests, "trap" in script)]
    unexpanded = [rest.split("=")[0].split()[0] for rest in rests if "$" in rest]
    if unexpanded:
        hint = "Slurm reads these lines before any shell: write the value, or give the option to sbatch."
        checks.append(Check("sbatch lines", f"{', '.join(unexpanded)} with a $, not expanded there", "error", hint))
    return checks


def _signal(rests: list[str], traps: bool) -> Check:
    given = [match for rest in rests if (match := _SIGNAL.match(rest))]
    if not given:
        return Check("signal", "no --signal in the script (perhaps one was given to sbatch)", "note", _WRITE)
    batch, name = given[-1]["batch"], given[-1]["name"]
    if batch and not traps:
        found = f"B:{name} goes to the script alone, which has no trap for it"
        return Check("signal", found, "note", "Leave out the B:, so that it goes to the processes of srun.")
    if name.upper() not in _HEARD:
        return Check("signal", f"{name}, which a run does not listen to", "note", _WRITE)
    return Check("signal", f"{name} before the time limit")


def _ask(command: str, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
