"""What a test needs inside of a job: a place at which the run waits, and a record of signals that have arrived."""

from __future__ import annotations

import atexit
import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

PATIENCE = 300.0


class Hold(Callback):
    """Wait at one place of the fit until the test lets go, by files in one folder.

    A process that waits has written ``held-RANK`` with its process number; it goes on when there is ``go``, which then
    stays: a job that comes back does not wait again. Every signal that the process gets is a byte of ``signals-RANK``,
    written by the interpreter itself before any handler runs.

    Args:
        folder: of these files.
        step: waits before the training batch of this number, from 0.
        validation: waits in the first validation batch instead.
        ranks: who waits; all if left out.
        linger: seconds that processes other than the first one take to end.
    """

    def __init__(
        self,
        folder: str,
        step: int = 0,
        validation: bool = False,
        ranks: list[int] | None = None,
        linger: float = 0.0,
    ) -> None:
        self.folder, self.step, self.validation, self.ranks = Path(folder), step, validation, ranks
        self.linger = linger
        self._record = -1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        path = self.folder / f"signals-{trainer.global_rank}"
        self._record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._record)
        (self.folder / f"process-{trainer.global_rank}").write_text(str(os.getpid()))
        if self.linger and trainer.global_rank > 0:
            atexit.register(time.sleep, self.linger)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.validation and trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.step + 1:
            self._wait(trainer)

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.validation and not trainer.sanity_checking:
            self._wait(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._record >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._record)
            self._record = -1

    def _wait(self, trainer: Any) -> None:
        if self.ranks is not None and trainer.global_rank not in self.ranks:
            return
        (self.folder / f"held-{trainer.global_rank}").write_text(str(os.getpid()))
        end = time.monotonic() + PATIENCE
        while not (self.folder / "go").exists():
            assert time.monotonic() < end, "the test never let go"
            time.sleep(0.02)
