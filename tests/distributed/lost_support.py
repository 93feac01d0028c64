"""A callback that lets the test of lost processes find one in a chosen state."""

import os
import time
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Callback

from eetrain.errors import DataError


class Wait(Callback):
    """Before the third step: write ``RANK.pid`` to a folder, and wait to be killed or do something else.

    Args:
        folder: where to.
        ranks: who waits; the others go on into the step, and into what it has for all of them together.
        then: ``wait``, or an exception to raise.
    """

    def __init__(self, folder: str, ranks: list[int], then: str = "wait"):
        self.folder, self.ranks, self.then = Path(folder), ranks, then

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step != 2:
            return
        rank = dist.get_rank()
        if rank in self.ranks and self.then == "RuntimeError":
            raise RuntimeError("a shape that does not fit\nand a second line")
        if rank in self.ranks and self.then == "DataError":
            raise DataError("row 7 has no text.", hint="Give it one.")
        written = self.folder / f"{rank}.writing"
        written.write_text(str(os.getpid()))
        written.rename(self.folder / f"{rank}.pid")
        if rank in self.ranks:
            time.sleep(100)
