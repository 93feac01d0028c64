"""A few rows of a large table in which nevertheless every pair of values meets."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(row: Row) -> frozenset[Pair]:
    """Every two settings of a row."""
    return frozenset(combinations(sorted(row.items()), 2))


def possible_rows(factors: Mapping[str, Sequence[str]], impossible: Callable[[Row], str | None]) -> list[Row]:
    """All combinations but those for which ``impossible`` has a reason."""
    rows = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    return [row for row in rows if impossible(row) is None]


def covering_rows(rows: Sequence[Row]) -> list[Row]:
    """Some of the rows that hold every pair which any row holds: always the next one with most pairs still missing."""
    rows = random.Random(0).sample(rows, len(rows))  # of equally good ones not always those that stand first
    pairs = {pair: place for place, pair in enumerate(sorted({pair for row in rows for pair in pairs_of(row)}))}
    # A set of pairs is a number whose bits say which: counting them is what takes the time.
    bits = [sum(1 << pairs[pair] for pair in pairs_of(row)) for row in rows]
    missing, chosen = (1 << len(pairs)) - 1, []
    while missing:
        best = max(range(len(rows)), key=lambda place: (bits[place] & missing).bit_count())
        chosen.append(rows[best])
        missing &= ~bits[best]
    return chosen
