"""The picture: quality against the cost in blocks, and against measured speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARKERS = {"never": "*", "always": "s", "threshold": "o"}
# Okabe and Ito's palette, distinct with every kind of colour blindness.
_COLOURS = {"never": "#000000", "always": "#e69f00", "threshold": "#0072b2"}
_OTHER = ("D", "#009e73")
_OFFSETS = ((8, 6), (8, -14), (-8, 6), (-8, -14), (8, 20), (-8, 20), (8, -28), (-8, -28))


@dataclass(frozen=True)
class FrontierPoint:
    """One policy.

    Attributes:
        policy: its string.
        quality: higher is better.
        blocks: computed for a token on average; ``None`` if no token was decoded after a prompt.
        tokens_per_second: measured, or ``None``.
    """

    policy: str
    quality: float
    blocks: float | None
    tokens_per_second: float | None


def draw_frontier(points: Sequence[FrontierPoint], path: str | Path, *, quality: str, num_blocks: int) -> None:
    """Write the picture as PNG.

    Args:
        points: ``never`` among them gives the dashed line of reference.
        path: of the file.
        quality: what the vertical axis shows.
        num_blocks: of the model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = any(point.tokens_per_second is not None for point in points)
    figure = Figure(figsize=(12.5 if timed else 6.5, 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    costs = [(point, point.blocks) for point in points]
    _panel(panels[0], costs, f"blocks per token, repair included (of {num_blocks})")
    panels[0].set_ylabel(quality, fontsize=12)
    if timed:
        _panel(panels[1], [(point, point.tokens_per_second) for point in points], "decoded tokens per second")
    canvas.draw()
    for panel in panels:
        _label(panel, canvas.get_renderer())
    figure.savefig(path, dpi=150)


def _panel(axes: Any, places: Sequence[tuple[FrontierPoint, float | None]], xlabel: str) -> None:
    for point, x in places:
        if x is None:
            continue
        kind = point.policy.partition(":")[0]
        marker, colour = _MARKERS.get(kind, _OTHER[0]), _COLOURS.get(kind, _OTHER[1])
        size = 130 if kind == "never" else 55
        axes.scatter([x], [point.quality], s=size, marker=marker, color=colour, zorder=3, gid=point.policy)
        if kind == "never":
            axes.axhline(point.quality, color=colour, linestyle="--", linewidth=1, alpha=0.6, zorder=1)
    axes.set_xlabel(xlabel, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25)
    axes.margins(x=0.22, y=0.18)


def _label(axes: Any, renderer: Any) -> None:
    """Write each policy beside its point, where it covers the fewest other labels and points."""
    taken: list[Any] = []
    dots = [axes.transData.transform(dot.get_offsets()[0]) for dot in axes.collections]
    for dot in axes.collections:
        labels = [_annotate(axes, dot, offset) for offset in _OFFSETS]
        boxes = [label.get_window_extent(renderer) for label in labels]
        costs = [_cost(box, taken, dots, axes.bbox) for box in boxes]
        best = costs.index(min(costs))
        for label in labels[:best] + labels[best + 1 :]:
            label.remove()
        taken.append(boxes[best])


def _annotate(axes: Any, dot: Any, offset: tuple[int, int]) -> Any:
    side = "left" if offset[0] > 0 else "right"
    place = dot.get_offsets()[0]
    return axes.annotate(
        dot.get_gid(), place, xytext=offset, textcoords="offset points", ha=side, fontsize=10.5, zorder=4
    )


def _cost(box: Any, taken: Sequence[Any], dots: Sequence[Any], frame: Any) -> int:
    covered = sum(box.overlaps(other) for other in taken) + sum(box.contains(*dot) for dot in dots)
    inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
    return int(covered) + (0 if inside else 1)
