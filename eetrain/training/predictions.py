"""Generated texts of ``predict`` as a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor


class WritePredictions(BasePredictionWriter):
    """Write ``{"index": row, "text": ..., "ids": [...]}`` lines, one file per process.

    Args:
        folder: gets ``predictions.jsonl``, and ``predictions_rank1.jsonl`` and so on from the other processes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder

    def path(self, rank: int) -> Path:
        """The file of one process."""
        return self.folder / ("predictions.jsonl" if rank == 0 else f"predictions_rank{rank}.jsonl")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path(trainer.global_rank).write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the rows of a batch; fillers that even out the processes are dropped."""
        tokenizer: Any = trainer.datamodule.tokenizer
        with open(self.path(trainer.global_rank), "a") as file:
            for index, ids in zip(batch["index"].tolist(), prediction.tolist(), strict=True):
                if index >= 0:
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    file.write(json.dumps({"index": index, "text": text, "ids": ids}) + "\n")
