"""The end of a fit, asked for or not: what is trained is saved before the process ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from eetrain.cluster.signals import REQUESTS, Stopped, signal_of
from eetrain.training.console import tell


class SaveBeforeStopping(Callback):
    """Save ``last.ckpt`` at the end of a fit, and at the end of the batch in which a signal asked it to stop.

    SIGUSR1, SIGTERM and Ctrl-C only ask: a checkpoint written in the middle of an optimizer step would be torn, and
    processes that save while others compute would wait for each other for ever. After every batch, of validation too,
    all processes agree on whether to stop there; then all save, and :class:`Stopped` is raised. What was asked before
    the training began is heard after its first batch. A second Ctrl-C interrupts at once and leaves the checkpoint
    before it.

    Args:
        folder: where ``last.ckpt`` goes: the folder of the ModelCheckpoint callback.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "last.ckpt"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from saving, requeueing and broadcasting inside signal handlers."""
        trainer._signal_connector.register_signal_handlers = _nothing
        if stage == "fit":
            REQUESTS.listen(keyboard=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C as well."""
        REQUESTS.listen(keyboard=True)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop here if any process was asked to."""
        code = _largest(trainer, REQUESTS.code)
        if code:
            trainer._logger_connector.update_train_step_metrics()  # which comes after this hook
            self._stop(trainer, code)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop here if any process was asked to; what is saved counts this validation as done."""
        if trainer.sanity_checking:
            return
        code = _largest(trainer, REQUESTS.code)
        if code:
            if trainer.state.fn == "fit":
                # Half of it would be done on resuming otherwise, and logged as if it were all.
                trainer.fit_loop.epoch_loop.val_loop.increment_progress_to_evaluation_end()
            self._stop(trainer, code)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the steps since the last checkpoint, and give Ctrl-C back."""
        REQUESTS.release_keyboard()
        checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if checkpoints and all(callback._last_global_step_saved != trainer.global_step for callback in checkpoints):
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back, and say how to go on."""
        REQUESTS.release_keyboard()
        if isinstance(exception, Stopped | KeyboardInterrupt) and self.path.exists():
            why = f" by {exception} after step {trainer.global_step}" if isinstance(exception, Stopped) else ""
            tell(trainer, f"Stopped{why}; {self.path} is whole. Go on with the same command and --resume auto.")

    def _stop(self, trainer: Trainer, code: int) -> NoReturn:
        if trainer.state.fn == "fit":
            self._save(trainer)
        REQUESTS.forget()
        raise Stopped(signal_of(code))

    def _save(self, trainer: Trainer) -> None:
        if trainer.checkpoint_callbacks:
            trainer.save_checkpoint(self.path)


def _nothing() -> None:
    """In the place of Lightning's `register_signal_handlers`."""


def _largest(trainer: Trainer, code: int) -> int:
    """The largest code of all processes."""
    if trainer.world_size == 1:
        return code
    here = torch.tensor(code, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(here, reduce_op="max"))
