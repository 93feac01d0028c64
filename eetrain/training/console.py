"""What a run shows on stderr: its tables of exits and gates, and less of Lightning's small talk."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from eetrain.training.gate_metrics import GATE_PREFIX, collapsed

COLUMNS = ("nll", "accuracy", "agreement", "ece")
_SMALL_TALK = (
    "Tip:",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "`weights_only` was not set",
    "Seed set to",
    "Loading `train_dataloader` to",
    "Restored all states from the checkpoint",  # names the one asked for, also where another one took its place
)
_CHATTY_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)
_IDLE_WARNINGS = (
    ".*LeafSpec.*",
    ".*The dirpath has changed from.*",
    r".*module\(s\) in eval mode at the start.*",
    ".*does not have many workers.*",
    ".*args parameter is intended to run from within.*",
)


def exit_rows(scores: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Rows of the table of exits from ``{"nll/exit_3": 2.1, ...}``: depth, then :data:`COLUMNS`; ``-`` if missing."""
    depths = list(dict.fromkeys(name.split("/", 1)[1] for name in scores if not name.startswith(GATE_PREFIX)))
    return [
        (depth, *(f"{scores[key]:.4f}" if (key := f"{column}/{depth}") in scores else "-" for column in COLUMNS))
        for depth in depths
    ]


def gate_rows(scores: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Header and rows of the table of gates: cost weight, mean depth, NLL, accuracy, and the share of every depth.

    Args:
        scores: ``{"gate/0.3/depth": 4.2, "gate/0.3/share/exit_3": 0.6, ...}``; other names are passed over.

    Returns:
        Nothing if there are no gates.
    """
    values: dict[str, dict[str, str]] = {}
    for name, value in scores.items():
        if name.startswith(GATE_PREFIX):
            _, weight, quantity = name.split("/", 2)
            values.setdefault(weight, {})[quantity.removeprefix("share/")] = (
                f"{value:.1%}" if quantity.startswith("share/") else f"{value:.4f}"
            )
    if not values:
        return []
    columns = next(iter(values.values())).keys()
    return [("cost weight", *columns), *((weight, *row.values()) for weight, row in values.items())]


def show_exits(title: str, scores: Mapping[str, float]) -> None:
    """Write the table of exits to stderr."""
    _show_table(title, [("depth", *COLUMNS), *exit_rows(scores)])


def show_gates(scores: Mapping[str, float]) -> None:
    """Write the table of gates to stderr, with a line for every exit that is out of use; nothing without gates."""
    rows = gate_rows(scores)
    if rows:
        _show_table("Gates, tokens leave at g >= 0.5", rows)
        sys.stderr.write("".join(f"out of use: {found}\n" for found in collapsed(scores)))


def _show_table(title: str, lines: Sequence[tuple[str, ...]]) -> None:
    """With rules on a terminal, tab-free plain text elsewhere; the first line is the header."""
    header, *rows = lines
    if sys.stderr.isatty():
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        Console(stderr=True).print(table)
        return
    width = max(10, len(header[0]) + 1)
    text = [f"{row[0]:<{width}}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in lines]
    sys.stderr.write("\n".join([title, *text, ""]))


def tell(trainer: Trainer, text: str) -> None:
    """Write a line to stderr, from one process only."""
    if trainer.is_global_zero:
        sys.stderr.write(text + "\n")


class ExitTable(Callback):
    """Show the table of exits at the end of fit, validate and test, once per run and not per process."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained."""
        trained, total = pl_module.parameter_counts
        layers = ", ".join(map(str, pl_module.settings.exits.layers or [])) or "no block"
        tell(trainer, f"Training {trained:,} of {total:,} parameters; exits after {layers}.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last validation, if nothing was trained after it."""
        if pl_module.scored_at == trainer.global_step:
            self._show(trainer, pl_module, "val", "Validation at the end of training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the scores of ``validate``."""
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module, "val", "Validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the scores of ``test``."""
        self._show(trainer, pl_module, "test", "Test")

    def _show(self, trainer: Trainer, pl_module: LightningModule, stage: str, title: str) -> None:
        scores = pl_module.scores.get(stage)
        if trainer.is_global_zero and scores:
            schedule = pl_module.objective.schedule
            show_exits(title if schedule is None else f"{title}, under {schedule}", scores)
            show_gates(scores)


def hush() -> None:
    """Silence what says nothing to the user; everything else Lightning has to say stays."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    # Inside a job it tells of a forgotten srun; a shell on a cluster's machine has no use for it.
    outside_jobs = [] if "SLURM_JOB_ID" in os.environ else [".*`srun` command is available on your system.*"]
    for pattern in [*_IDLE_WARNINGS, *outside_jobs]:
        warnings.filterwarnings("ignore", message=pattern)
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(phrase in message for phrase in _SMALL_TALK)
