"""Numbers beside the points of the frontier, where they cover the fewest others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_OFFSETS = ((7, 6), (7, -14), (-7, 6), (-7, -14), (7, 18), (-7, 18), (7, -26), (-7, -26))
"""Tried in this order, in points: right or left of the marker, above or below."""


def place_numbers(axes: Any, renderer: Any) -> None:
    """Move each annotation with the gid ``number`` beside its point, where it covers the fewest numbers and points."""
    taken: list[Any] = []
    dots = [axes.transData.transform(place) for found in axes.collections for place in found.get_offsets()]
    for number in (text for text in axes.texts if text.get_gid() == "number" and text.get_text()):
        boxes = []
        for offset in _OFFSETS:
            _move(number, offset)
            boxes.append(number.get_window_extent(renderer))
        costs = [_cost(box, taken, dots, axes.bbox) for box in boxes]
        best = costs.index(min(costs))
        _move(number, _OFFSETS[best])
        taken.append(boxes[best])


def _move(number: Any, offset: tuple[int, int]) -> None:
    number.set_position(offset)
    number.anncoords = "offset points"
    number.set_horizontalalignment("left" if offset[0] > 0 else "right")


def _cost(box: Any, taken: Sequence[Any], dots: Sequence[Any], frame: Any) -> int:
    covered = sum(box.overlaps(other) for other in taken) + sum(box.contains(*dot) for dot in dots)
    inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
    return int(covered) + (0 if inside else 1)
