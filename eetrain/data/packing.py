"""Documents to rows: cutting what is too long, and packing several into one row.

A row is a list of *pieces*; a piece is a span ``[start, end)`` of a `TokenTable`'s flat arrays, so nothing is
copied. Packing is done once, by best fit over the pieces in descending length: a pure function of the
lengths. Epochs differ in the order of the rows. The documents of a row do not see each other, so which of
them share one does not matter to the loss.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from eetrain.data.tokenization import TokenTable

Overflow = Literal["split", "truncate"]


@dataclass(frozen=True)
class Pieces:
    """Spans of a token table.

    Args:
        spans: start and end of each piece, int64 [pieces, 2].
        skipped: documents left out because no scored token fits into a row.
    """

    spans: torch.Tensor
    skipped: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each piece."""
        lengths: list[int] = (self.spans[:, 1] - self.spans[:, 0]).tolist()
        return lengths


def cut(table: TokenTable, documents: Iterable[int], max_length: int, overflow: Overflow) -> Pieces:
    """Cut documents into pieces of at most `max_length` tokens.

    ``split``: consecutive pieces overlap by one token, the first of a piece being context only, so that every
    token of the document but its first is scored exactly once. ``truncate``: keep the first piece.

    Args:
        table: the tokens.
        documents: indices of the documents to use.
        max_length: at least 2.
        overflow: what to do with the rest of a long document.
    """
    assert max_length >= 2
    offsets = table.offsets.numpy()
    scored_before = np.concatenate([[0], np.cumsum(table.scored.numpy(), dtype=np.int64)])
    spans: list[tuple[int, int]] = []
    skipped = 0
    for document in documents:
        start, end = int(offsets[document]), int(offsets[document + 1])
        stop = end - 1 if overflow == "split" else start + 1
        pieces = [(at, min(at + max_length, end)) for at in range(start, stop, max_length - 1)]
        pieces = [(at, to) for at, to in pieces if to > at and scored_before[to] > scored_before[at + 1]]
        spans.extend(pieces)
        skipped += not pieces
    return Pieces(torch.tensor(spans, dtype=torch.int64).reshape(-1, 2), skipped)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into as few bins as best fit in descending length finds; equal lengths keep their order.

    Each item goes to the fullest bin that has room for it, the oldest of equals. For many items it needs at
    most 11/9 of the optimum (Johnson et al., 1974, "Worst-case performance bounds for simple one-dimensional
    packing algorithms").

    Args:
        lengths: between 1 and `capacity`.
        capacity: of a bin.

    Returns:
        The bins, each a non-empty list of item indices.
    """
    bins: list[list[int]] = []
    with_room: defaultdict[int, deque[int]] = defaultdict(deque)
    # Bit r is set when some bin has exactly r tokens of room: the lowest bit >= length is the best fit.
    rooms = 0
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[item]
        assert 0 < length <= capacity
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].popleft()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        with_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return bins
