"""Metrics of a run in one CSV file, which an interrupted run goes on with."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from eetrain.training.placing import move_into_place, part_of, sync

STEP, EPOCH = "step", "epoch"


class MetricsCSV(Logger):
    """Write metrics to ``SAVE_DIR/NAME.csv``: one row for what is logged together, one column for each metric.

    Steps only grow in the file. A run that goes on from step 40 after a kill at step 55, or that goes back to an
    earlier checkpoint, replaces the rows of the steps it does again, so no step is there twice. A row that is logged
    twice in succession is written once.

    Args:
        save_dir: the folder; the run folder, if left out on the command line.
        name: of the file, without ``.csv``.
    """

    def __init__(self, save_dir: str = ".", name: str = "metrics") -> None:
        super().__init__()
        self.path = Path(save_dir) / f"{name}.csv"
        self._name = name
        self._columns: list[str] = []
        self._step: int | None = None
        self._done_again: int | None = None  # the step whose rows may be in the file already
        self._last: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Of the file, without ``.csv``."""
        return self._name

    @property
    def version(self) -> None:
        """There is one file, whatever is done again."""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder's ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; it is in the file when this returns."""
        step = 0 if step is None else step
        row = {STEP: step, **{name: float(value) for name, value in metrics.items()}}
        if row == self._last:
            return
        self._last = row
        before: list[dict[str, Any]] | None = None
        if self._step is None or step < self._step:
            self._done_again = step
        if step == self._done_again:
            before = [old for old in self._written() if _stays(old, row)]
        elif not row.keys() <= set(self._columns):
            before = self._written()
        self._step = step
        if before is not None:
            self._rewrite([*before, row])
            return
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _written(self) -> list[dict[str, Any]]:
        """Whole rows of the file; a kill can have left half of the last one."""
        if not self.path.is_file():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [row for row in rows if None not in row and None not in row.values() and _is_number(row.get(STEP))]

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put a file with these rows in the place of the present one."""
        self._columns = [STEP, *sorted({name for row in rows for name in row} - {STEP})]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(self.path)
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        sync(part)
        move_into_place(part, self.path)


class LogBeforeSaving(Callback):
    """Write a step's row before the checkpoint that counts the step as done.

    Lightning logs it afterwards, and a run killed in between would go on behind a step that is not in the log.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write it, if the checkpoint is saved at the end of a training batch."""
        batches, connector = trainer.fit_loop.epoch_loop.batch_progress.current, trainer._logger_connector
        within_batch = trainer.training and batches.completed < batches.processed
        if not (within_batch and connector.should_update_logs) or trainer.fit_loop._should_accumulate():
            return
        metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
        for logger in trainer.loggers:
            if metrics and isinstance(logger, MetricsCSV):
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_metrics({"epoch": trainer.current_epoch, **metrics}, step=step)


def _stays(old: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether an old row is of a step before that of a new one, or of the same step and of other metrics."""
    if float(old[STEP]) != row[STEP]:
        return bool(float(old[STEP]) < row[STEP])
    return not any(old.get(name) for name in row.keys() - {STEP, EPOCH})


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True
