"""Texts that grow at different speeds, put out as if token by token in step: when rows end, and what a streamer sees.

Shape suffixes: ``B`` rows of the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria


@dataclass
class Row:
    """One row.

    Attributes:
        prompt: its ids ``[T]``.
        tokens: new tokens.
        drafted_by: the exit that drafted each, 0 if none did.
        end: number of new tokens at which a criterion was met first, or ``None``.
    """

    prompt: Tensor
    tokens: list[int] = field(default_factory=list)
    drafted_by: list[int] = field(default_factory=list)
    end: int | None = None


class Transcript:
    """All rows of a batch.

    Where no token ends a row, transformers lets all rows go on until a criterion has stopped the last of them; so here.

    Args:
        prompts: ids ``[B, T]``.
        criteria: transformers' stopping criteria; each sees one row at a time, without scores.
        pad: fills rows up that have ended.
        num_blocks: of the model.
        streamer: gets each new token of all rows, as soon as every row has it; one with a method ``put_depths`` gets
            ahead of the tokens the block ``[B]`` whose head chose each first, 0 behind a row's end.

    Attributes:
        end_tokens: tokens that end a row.
    """

    def __init__(self, prompts: Tensor, criteria: Any, pad: int, num_blocks: int, streamer: Any = None) -> None:
        self.prompts, self.criteria, self.pad, self.streamer = prompts, criteria, pad, streamer
        self.num_blocks = num_blocks
        self.rows = [Row(row) for row in prompts]
        found = [criterion.eos_token_id for criterion in criteria if hasattr(criterion, "eos_token_id")]
        self.end_tokens = {int(token) for ids in found for token in torch.as_tensor(ids).flatten()}
        self._ends_apart = bool(found)
        self._simple = all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria)
        limits = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
        self._limit = min(limits, default=sys.maxsize) - prompts.shape[1]
        self._streamed = 0

    @property
    def running(self) -> list[int]:
        """Rows that need more tokens."""
        return [place for place, row in enumerate(self.rows) if not self._is_closed(row)]

    def room(self, place: int) -> int:
        """How many tokens a row may get before its length ends it, at least 1."""
        return max(1, self._limit - len(self.rows[place].tokens))

    def add(self, place: int, tokens: Sequence[int], drafted_by: Sequence[int]) -> int:
        """Add tokens to a row as long as it takes some; returns how many it took."""
        row = self.rows[place]
        for taken, (token, exit) in enumerate(zip(tokens, drafted_by, strict=True)):
            if len(row.tokens) >= self._limit or (self._ends_apart and row.end is not None):
                return taken
            row.tokens.append(token)
            row.drafted_by.append(exit)
            if row.end is None and self._ends(row):
                row.end = len(row.tokens)
        return len(tokens)

    def stream(self) -> None:
        """Hand the streamer what all rows have by now."""
        if self.streamer is None:
            return
        open_rows = [len(row.tokens) for row in self.rows if not (self._ends_apart and row.end is not None)]
        ready = min([*open_rows, self.longest])
        for place in range(self._streamed, ready):
            if hasattr(self.streamer, "put_depths"):
                self.streamer.put_depths(torch.tensor([self._chosen_at(row, place) for row in self.rows]))
            self.streamer.put(torch.tensor([_at(row.tokens, place, self.pad) for row in self.rows]))
        self._streamed = max(self._streamed, ready)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """All ids ``[B, T + new]``; for new ones ``[B, new]`` who drafted them, and 1 up to a row's end, 0 behind it.

        The streamer is told.
        """
        self.stream()
        if self.streamer is not None:
            self.streamer.end()
        device, places = self.prompts.device, range(self.longest)
        tokens = [[_at(row.tokens, place, self.pad) for place in places] for row in self.rows]
        drafted_by = [[_at(row.drafted_by, place, 0) for place in places] for row in self.rows]
        made = [[int(place < len(row.tokens)) for place in places] for row in self.rows]
        new = torch.tensor(tokens, dtype=self.prompts.dtype, device=device)
        ids = torch.cat([self.prompts, new], dim=1)
        return ids, torch.tensor(drafted_by, device=device), torch.tensor(made, device=device)

    @property
    def longest(self) -> int:
        """New tokens of the row that ends last, as far as rows have got."""
        return max(len(row.tokens) if row.end is None else row.end for row in self.rows)

    def _chosen_at(self, row: Row, place: int) -> int:
        return (row.drafted_by[place] or self.num_blocks) if place < len(row.tokens) else 0

    def _is_closed(self, row: Row) -> bool:
        if row.end is None:
            return False
        if self._ends_apart or len(row.tokens) >= self._limit:
            return True
        return all(other.end is not None for other in self.rows) and len(row.tokens) >= self.longest

    def _ends(self, row: Row) -> bool:
        if self._simple:
            return len(row.tokens) >= self._limit or row.tokens[-1] in self.end_tokens
        new = torch.tensor([row.tokens], dtype=row.prompt.dtype, device=row.prompt.device)
        return bool(self.criteria(torch.cat([row.prompt[None], new], dim=1), None)[0])


def _at(values: Sequence[int], place: int, default: int) -> int:
    return values[place] if place < len(values) else default
