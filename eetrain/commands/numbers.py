"""Numbers with their intervals, short enough for a table."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

Measured = tuple[float | None, float | None, float | None]
"""A value and the ends of its interval, or ``None`` for what was not measured."""


def with_intervals(column: Sequence[Measured], *, signed: bool = False) -> list[str | None]:
    """Values and half the widths of their intervals, all to the second digit of the widest one, one decimal at least.

    Args:
        column: of a table, so that its numbers have the same number of digits.
        signed: write a plus before what is not negative.

    Example:
        >>> with_intervals([(68.4312, 67.2, 69.6), (67.0, 66.9, 67.1)])
        ['68.4±1.2', '67.0±0.1']
    """
    halves = [(high - low) / 2 for _, low, high in column if low is not None and high is not None]
    widest = max(halves, default=0.0)
    digits = max(1, 1 - floor(log10(widest))) if widest > 0 else 2
    return [_written(measured, digits, "+" if signed else "") for measured in column]


def _written(measured: Measured, digits: int, sign: str) -> str | None:
    value, low, high = measured
    if value is None:
        return None
    if low is None or high is None:
        return f"{value:{sign}.4g}"
    return f"{value:{sign}.{digits}f}±{(high - low) / 2:.{digits}f}"
