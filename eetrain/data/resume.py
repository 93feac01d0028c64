"""Where a fit stands in its data, and a loader that starts there.

Three numbers Lightning offers are not the position: what loader workers have fetched runs ahead; the epoch it
announces to samplers comes after the first iterator exists, so that prefetching workers would draw from the
wrong epoch; and with `max_steps` that epoch is one too high after a resume from a checkpoint that a finished
fit wrote. The count of processed batches over all epochs is right in all of these cases, so the position is
that count, relative to where the checkpoint said it stood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from eetrain.data.batches import TokenRows
from eetrain.data.sampling import ResumableBatchSampler


@dataclass(frozen=True)
class FitPosition:
    """A position that is known: after `total` processed batches the run stood at `batches` of `epoch`."""

    epoch: int = 0
    batches: int = 0
    total: int = 0

    def now(self, trainer: Trainer, batches_in_data: int) -> FitPosition:
        """Return the position after the batches that `trainer` has processed since.

        Args:
            trainer: of the fit.
            batches_in_data: length of an epoch; `limit_train_batches` may make it shorter.
        """
        fit_loop = trainer.fit_loop
        total: int = fit_loop.epoch_loop.batch_progress.total.processed
        if total == self.total:
            return self
        # The trainer's number is infinite until its first iterator exists.
        epoch_length = int(min(trainer.num_training_batches, batches_in_data))
        epochs, batches = divmod(self.batches + total - self.total, epoch_length)
        # A fit that was stopped inside an epoch counts that epoch as done, unless it counts in steps.
        progress = fit_loop.epoch_progress.current
        if batches and trainer.max_steps == -1 and progress.processed == progress.started:
            epochs, batches = epochs + 1, 0
        return FitPosition(self.epoch + epochs, batches, total)


class ResumableDataLoader(DataLoader[Any]):
    """A loader whose every iteration starts at the position that it asks for.

    `state_dict` is empty and there because Lightning takes loaders without one for not resumable: the data
    module keeps the state.

    Args:
        dataset: the rows.
        batch_sampler: which rows form which batch.
        position: tells where to start; ``None``: where the sampler stands.
        **kwargs: of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: TokenRows,
        batch_sampler: ResumableBatchSampler,
        position: Callable[[], FitPosition] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        self.resumable_sampler = batch_sampler
        self.position = position

    def __iter__(self) -> Any:
        if self.position is not None:
            position = self.position()
            self.resumable_sampler.seek(position.epoch, position.batches)
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, see the class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing, see the class."""
