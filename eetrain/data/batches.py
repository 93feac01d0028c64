"""Rows as tensors, and rows to batches.

Shape suffixes: B rows, T positions. All batch tensors are int64. `labels` are aligned with `input_ids` (not
shifted); -100 is not scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from eetrain.data.packing import Pieces, best_fit_decreasing
from eetrain.data.sampling import FILLER
from eetrain.data.sources import Row
from eetrain.data.tokenization import TokenTable

IGNORE = -100
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Item:
    """One row of a batch before padding: ids, labels and positions, each int64 [T]."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class TokenRows(Dataset[Item]):
    """Rows of pieces of a token table.

    Args:
        table: the tokens.
        pieces: the spans to show.
        max_length: positions of a packed row; ``None``: one piece a row, not packed.
    """

    def __init__(self, table: TokenTable, pieces: Pieces, max_length: int | None = None) -> None:
        self.table, self.spans = table, pieces.spans
        bins = (
            [[i] for i in range(len(self.spans))]
            if max_length is None
            else best_fit_decreasing(pieces.lengths, max_length)
        )
        self.order = torch.tensor([piece for row in bins for piece in row], dtype=torch.int64)
        self.offsets = torch.tensor([0] + [len(row) for row in bins], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Item:
        """Return row `index`; `FILLER` gives the first row without labels."""
        row = 0 if index == FILLER else index
        pieces = self.order[int(self.offsets[row]) : int(self.offsets[row + 1])]
        items = [self._piece(int(piece)) for piece in pieces]
        labels = torch.cat([item.labels for item in items])
        return Item(
            torch.cat([item.ids for item in items]),
            torch.full_like(labels, IGNORE) if index == FILLER else labels,
            torch.cat([item.positions for item in items]),
        )

    def _piece(self, piece: int) -> Item:
        start, end = self.spans[piece].tolist()
        ids = self.table.ids[start:end].long()
        labels = ids.where(self.table.scored[start:end], IGNORE)
        # Nothing precedes the first token of a piece: in a packed row it would be predicted from another
        # document.
        labels[0] = IGNORE
        return Item(ids, labels, torch.arange(end - start))


@dataclass(frozen=True)
class PadRight:
    """Collate rows to the longest one: `input_ids`, `labels`, `attention_mask`, each [B, T].

    Args:
        pad_id: fills `input_ids`; the attention mask covers it.
    """

    pad_id: int

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Build the batch."""
        return {
            "input_ids": _stack([item.ids for item in items], self.pad_id),
            "labels": _stack([item.labels for item in items], IGNORE),
            "attention_mask": _stack([torch.ones_like(item.ids) for item in items], 0),
        }


@dataclass(frozen=True)
class FillPacked:
    """Collate packed rows to a fixed length: `input_ids`, `labels`, `position_ids`, each [B, T].

    Positions restart at 0 with each document, and no attention mask is given: that is how transformers
    recognises packed documents (the model must be called without a cache, ``use_cache=False``). The end of a
    row is a document of pad tokens without labels.

    Args:
        pad_id: fills `input_ids`.
        max_length: T.
    """

    pad_id: int
    max_length: int

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Build the batch."""
        tails = [torch.arange(self.max_length - len(item.ids)) for item in items]
        return {
            "input_ids": _stack([item.ids for item in items], self.pad_id, self.max_length),
            "labels": _stack([item.labels for item in items], IGNORE, self.max_length),
            "position_ids": torch.stack([torch.cat([i.positions, tail]) for i, tail in zip(items, tails, strict=True)]),
        }


class PromptRows(Dataset[tuple[int, list[int]]]):
    """Prompts to generate from, with the rows they came from.

    Args:
        rows: the rows.
        prompts: the token ids of each row's prompt.
    """

    def __init__(self, rows: Sequence[Row], prompts: Sequence[list[int]]) -> None:
        assert len(rows) == len(prompts)
        self.rows, self.prompts = list(rows), list(prompts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, list[int]]:
        """Return row number and prompt; `FILLER` keeps its number, so that it can be told from a row."""
        return index, self.prompts[0 if index == FILLER else index]


@dataclass(frozen=True)
class PadLeft:
    """Collate prompts for generation: `input_ids` and `attention_mask` [B, T], padded on the left, and
    `index` [B].

    Args:
        pad_id: fills `input_ids`; the attention mask covers it.
    """

    pad_id: int

    def __call__(self, prompts: Iterable[tuple[int, list[int]]]) -> Batch:
        """Build the batch."""
        numbers, ids = zip(*prompts, strict=True)
        flipped = [torch.tensor(prompt, dtype=torch.int64).flip(0) for prompt in ids]
        return {
            "input_ids": _stack(flipped, self.pad_id).flip(1),
            "attention_mask": _stack([torch.ones_like(prompt) for prompt in flipped], 0).flip(1),
            "index": torch.tensor(numbers, dtype=torch.int64),
        }


def _stack(rows: Sequence[torch.Tensor], fill: int, length: int | None = None) -> torch.Tensor:
    """Stack rows of different lengths, filled up on the right."""
    length = max(len(row) for row in rows) if length is None else length
    out = torch.full((len(rows), length), fill, dtype=torch.int64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out
