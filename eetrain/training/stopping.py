"""The end of a fit, asked for or not: what is trained is saved before the process ends."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from eetrain.training.console import tell


class SaveBeforeStopping(Callback):
    """Save ``last.ckpt`` at the end of a fit, and at the end of the batch in which Ctrl-C was pressed.

    A checkpoint written in the middle of an optimizer step would be torn, so the first Ctrl-C only asks; the second one
    interrupts at once and leaves the checkpoint before it. All processes agree on the batch after which they stop.

    Args:
        folder: where ``last.ckpt`` goes: the folder of the ModelCheckpoint callback.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "last.ckpt"
        self._asked = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C."""
        self._asked = False
        self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop here if any process was asked to."""
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self._save(trainer)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the steps since the last checkpoint, and give Ctrl-C back."""
        self._restore()
        checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if checkpoints and all(callback._last_global_step_saved != trainer.global_step for callback in checkpoints):
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back, and say how to go on."""
        self._restore()
        if isinstance(exception, KeyboardInterrupt) and self.path.exists():
            tell(trainer, f"Stopped; {self.path} is whole. Resume with the same command and --ckpt_path last.")

    def _save(self, trainer: Trainer) -> None:
        if trainer.checkpoint_callbacks:
            trainer.save_checkpoint(self.path)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            self._restore()
            raise KeyboardInterrupt
        self._asked = True

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
