"""A lost process ends the whole run at once, with one error that names it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from eetrain.cluster.peers import Ending, Watch
from eetrain.cluster.verdicts import ECHO, Failure
from eetrain.errors import EETrainError
from eetrain.training.processes import present_processes

_LOOPBACK = "127.0.0.1"
_PATIENCE = 2.0  # seconds in which processes end by themselves, or text goes out, before nobody waits any more
# What backends say when the process at the other end is gone; gloo and NCCL raise plain RuntimeErrors in places.
_BACKENDS = ("gloo", "nccl")


class WatchProcesses(Callback):
    """Watch all processes of a run from its set-up to its end.

    When one of them is killed or its machine is lost, or when one alone raises an exception, one process says which it
    was and all end with status 1, also those that wait for it in the middle of a step. An exception that all processes
    come to is left alone. One process by itself is not watched.
    """

    def __init__(self) -> None:
        self._watch: Watch | None = None
        self._launched = _Launched()
        self._blocked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the processes, or warn that they cannot be."""
        self._leave()
        if self._blocked or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self._launched = _Launched(trainer)
        host = _LOOPBACK if trainer.num_nodes == 1 else os.environ.get("MASTER_ADDR", _LOOPBACK)
        ending = Ending(say, self._launched.end)
        processes = present_processes()
        try:
            self._watch = Watch.begin(processes.rank, dist.get_world_size(), host, processes.gather, ending)
        except ConnectionError as error:
            self._blocked = True
            rank_zero_warn(
                f"The processes do not watch each other, since {error}. Nothing else changes, but when one is lost the "
                "others wait for it until the backend's time-out."
            )
            return
        self._launched.let_speak()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End well."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others; wait for what they say, if the exception may come from the end of another one."""
        if self._watch is None:
            return
        if isinstance(exception, Exception):
            self._watch.fail(_failure(exception))
            self._watch = None
        else:  # asked for: Ctrl-C, a signal, sys.exit
            self._leave()

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.leave()
            self._watch = None


def say(text: str) -> None:
    """Write to stderr, and go on even if nobody takes it: a full pipe must not keep the job."""

    def write() -> None:
        sys.stderr.write(("\n" if sys.stderr.isatty() else "") + text)  # not into the progress bar
        sys.stderr.flush()

    _try(write)


class _Launched:
    """The processes that Lightning started from this one, of which it kills all when one ends badly.

    Args:
        trainer: whose launcher started them.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        given = getattr(getattr(trainer, "strategy", None), "launcher", None)
        children: Sequence[Any] = getattr(given, "procs", None) or ()
        self._children = [child for child in children if isinstance(child, subprocess.Popen)]
        self._observer: Any = next(
            (each for each in threading.enumerate() if self._children and each.name == "child-process-observer"), None
        )

    def let_speak(self) -> None:
        """Make Lightning's observer wait until the watch has said which process it was and has ended this one."""
        kill = getattr(self._observer, "_terminate_all", None)
        if kill is not None and "_terminate_all" not in vars(self._observer):
            self._observer._terminate_all = _later(kill)

    def end(self) -> None:
        """End the processes started from here, then this one, whatever its main thread is waiting for."""
        _try(sys.stdout.flush)
        until = time.monotonic() + _PATIENCE
        for child in self._children:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        os._exit(1)


def _later(kill: Callable[[], None]) -> Callable[[], None]:
    def wait_and_kill() -> None:
        time.sleep(ECHO)
        kill()

    return wait_and_kill


def _try(action: Callable[[], object]) -> None:
    """Run it beside this thread, and leave it alone if it fails or does not return."""

    def run() -> None:
        with suppress(Exception):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PATIENCE)


def _failure(exception: Exception) -> Failure:
    text = str(exception).lower()
    echo = isinstance(exception, dist.DistError | ConnectionError) or any(name in text for name in _BACKENDS)
    is_users = isinstance(exception, EETrainError | OSError)
    return Failure.of(exception, echo=echo, traced=not is_users or os.environ.get("EETRAIN_DEBUG") == "1")
