"""A real Slurm of one or more nodes on this machine: on loopback, as root, with all its files in one folder.

Debian's packages ``slurmctld slurmd slurm-client munge`` are enough; ``install.sh`` beside this file installs them.
Every node is a ``slurmd`` with a name and a port of its own. Nothing outside the folder is written or read, so clusters
can run side by side.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
# Debian's daemons live where an ordinary PATH does not look.
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_WORD = TypeVar("_WORD")

_CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=3600
FirstJobId={first}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=4096 Gres=gpu:4 "
    "State=UNKNOWN\n"
)
_GPUS = "NodeName={name} Name=gpu File={folder}/gpu[0-3]\n"
_PARTITIONS = (
    "PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    "PartitionName=gpu Nodes=ALL MaxTime=7-0 State=UP\n"
)


def missing() -> str | None:
    """Why no Slurm can be started here; ``None`` if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/slurm/install.sh installs them)"
    return None if os.geteuid() == 0 else "a Slurm for tests is started by root only"


def wait_for(what: Callable[[], _WORD | None], about: str, timeout: float, told: Callable[[], str]) -> _WORD:
    """Ask ten times a second until there is an answer.

    Args:
        what: gives the answer, or something false while there is none.
        about: what is waited for, for the error.
        timeout: seconds.
        told: gives what helps to understand why it did not come.

    Raises:
        AssertionError: it did not come in time.
    """
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if answer := what():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"waited {timeout:.0f} s for {about}\n{told()}")


class Slurm:
    """A cluster; use it as a context manager.

    Args:
        nodes: how many, named ``n1``, ``n2``, and so on. Each says that it has 16 CPUs and 4 GPUs, whatever the
            machine has.

    Attributes:
        folder: of all its files.
        environ: the environment in which Slurm's commands find this cluster.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        # Names of sockets are short, those of folders that pytest makes are not.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environ = {**clean, "PATH": _PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        self._configure()
        try:
            self._serve("munge", *self._munge())
            self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._serve("controller", "slurmctld", "-D", "-c")
            for name in self.nodes:
                self._serve(f"node-{name}", "slurmd", "-D", "-c", "-N", name)
            self._wait(self._all_idle, "idle nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Cancel what runs, end the servers, each by its own process, and delete the folder."""
        if len(self._servers) > 1:
            self._end_jobs()
        for server in reversed(self._servers):
            server.terminate()
        for server in reversed(self._servers):
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        self._servers.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str | Path, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the cluster's environment.

        Args:
            *command: with its arguments.
            check: fail if the command does.
            **environ: more variables.
        """
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env={**self.environ, **environ}, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 or not check, f"{words} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, script: str, log: Path, *options: str, **environ: str) -> Job:
        """Submit the text of a batch script.

        Args:
            script: its text, with its ``#SBATCH`` lines.
            log: gets what the job writes.
            *options: more of sbatch's.
            **environ: more variables.
        """
        path = log.with_suffix(".sbatch")
        path.write_text(script)
        done = self.run("sbatch", "--parsable", f"--output={log}", "--open-mode=append", *options, path, **environ)
        return Job(self, done.stdout.strip(), log)

    def told(self) -> str:
        """The last lines that the servers wrote."""
        logs = sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {path.name}\n{_tail(path, 25)}" for path in logs)

    def _configure(self) -> None:
        host, ports = socket.gethostname().split(".")[0], _free_ports(len(self.nodes) + 1)
        # Processes of a job meet at a port that Lightning makes of its number: those of clusters side by side differ.
        first = random.randrange(10, 99) * 100
        text = _CONFIGURATION.format(host=host, port=ports[0], folder=self.folder, first=first)
        for name, port in zip(self.nodes, ports[1:], strict=True):
            text += _NODE.format(name=name, host=host, port=port)
        (self.folder / "slurm.conf").write_text(text + _PARTITIONS)
        gpus = [_GPUS.format(name=name, folder=self.folder) for name in self.nodes]
        (self.folder / "gres.conf").write_text("".join(gpus))
        for number in range(4):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")  # counted, and opened by nobody
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _munge(self) -> list[str]:
        files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
        return [
            *("munged", "--foreground", "--force"),
            *(f"--{option}-file={self.folder}/munge.{name}" for option, name in files.items() if option != "socket"),
            f"--socket={self.folder}/munge.socket",
        ]

    def _serve(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            # A session of its own: Ctrl-C is for the tests, which then end the servers in order.
            started = subprocess.Popen(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._servers.append(started)

    def _wait(self, what: Callable[[], Any], about: str) -> None:
        def answer() -> Any:
            ended = [server.args for server in self._servers if server.poll() is not None]
            assert not ended, f"{ended} ended at once\n{self.told()}"
            return what()

        wait_for(answer, about, 30, self.told)

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--partition=cpu", "--noheader", "--Node", "--format=%t", check=False).stdout.split()
        return states == ["idle"] * len(self.nodes)

    def _end_jobs(self) -> None:
        def none_left() -> bool:
            left = self.run("squeue", "--noheader", "--format=%A", check=False).stdout.split()
            if left:
                self.run("scancel", "--signal=KILL", "--full", *left, check=False)
                self.run("scancel", *left, check=False)
            return not left

        try:
            wait_for(none_left, "jobs to end", 30, self.told)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            print(error)  # the servers are to be ended all the same


@dataclass(frozen=True)
class Job:
    """A job of a cluster.

    Args:
        cluster: where it runs.
        id: its number.
        log: what it writes.
    """

    cluster: Slurm
    id: str
    log: Path

    def field(self, name: str) -> str:
        """A field of ``scontrol show job``, such as ``JobState`` or ``Restarts``."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id).stdout
        found = re.search(rf"(?:^|\s){name}=(\S*)", shown)
        assert found, f"{name} is not in {shown}"
        return found[1]

    @property
    def state(self) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED`` and so on."""
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.field("Restarts"))

    def signal(self, name: str) -> None:
        """Send a signal to all processes of its steps."""
        self.cluster.run("scancel", f"--signal={name}", self.id)

    def cancel(self) -> None:
        """End it as users do: SIGTERM, and SIGKILL after KillWait."""
        self.cluster.run("scancel", self.id)

    def wait_for(self, what: Callable[[], _WORD | None], about: str, timeout: float = 240) -> _WORD:
        """Wait for an answer while the job has not ended."""

        def answer() -> _WORD | None:
            found = what()
            assert found or self.state not in ENDED, f"{self.state} before {about}\n{self.told()}"
            return found

        return wait_for(answer, f"{about} of job {self.id}", timeout, self.told)

    def end(self, timeout: float = 240) -> str:
        """Wait for its end; its state."""

        def ended() -> str | None:
            return state if (state := self.state) in ENDED else None

        return wait_for(ended, f"the end of job {self.id}", timeout, self.told)

    def finish(self, timeout: float = 240) -> str:
        """Wait until it has completed with success; what it wrote."""
        state = self.end(timeout)
        assert state == "COMPLETED", f"job {self.id} is {state} with {self.field('ExitCode')}\n{self.told()}"
        return self.text

    @property
    def text(self) -> str:
        """What it wrote so far."""
        return self.log.read_text() if self.log.exists() else ""

    def processes(self, mask: str, number: int) -> dict[int, int]:
        """Its Python processes of ``eetrain``, by rank, that treat a signal in one way.

        Args:
            mask: a line of ``/proc/PID/status``: ``SigIgn`` or ``SigCgt``.
            number: of the signal.
        """
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().split(b"\0")
                if b"eetrain" not in command or b"python" not in command[0]:
                    continue
                environ = dict(line.split(b"=", 1) for line in (folder / "environ").read_bytes().split(b"\0") if line)
                masks = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                if environ.get(b"SLURM_JOB_ID") == self.id.encode() and int(masks[mask], 16) >> (number - 1) & 1:
                    found[int(environ[b"SLURM_PROCID"])] = int(folder.name)
        return found

    def told(self) -> str:
        """The log, and what the servers wrote."""
        return f"--- {self.log}\n{_tail(self.log, 80)}\n{self.cluster.told()}"


def batch_script(commands: str, settings: Mapping[str, str | int] | None = None) -> str:
    """A batch script of a few lines: ``settings`` become ``#SBATCH`` lines."""
    lines = [f"#SBATCH --{name}" + (f"={value}" if value != "" else "") for name, value in (settings or {}).items()]
    return "\n".join(["#!/bin/sh", *lines, "set -eu", commands, ""])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _tail(path: Path, lines: int) -> str:
    if not path.exists():
        return "(no such file)"
    # The servers' plugins for MPI complain at every start; nobody uses them.
    kept = [line for line in path.read_text(errors="replace").splitlines() if "mpi/pmix" not in line]
    return "\n".join(kept[-lines:])
