"""The picture: quality against the cost in blocks, and against measured speed.

Policies that differ in their first number only (thresholds, layers) are one series: a line, a marker and an entry of
the legend, with the number beside each point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, distinct with every kind of colour blindness; markers differ as well, for print.
_STYLES = (
    ("#0072b2", "o"),
    ("#e69f00", "s"),
    ("#009e73", "D"),
    ("#cc79a7", "^"),
    ("#d55e00", "v"),
    ("#56b4e9", "P"),
    ("#777777", "X"),
)
_OFFSETS = ((7, 6), (7, -14), (-7, 6), (-7, -14), (7, 18), (-7, 18), (7, -26), (-7, -26))


@dataclass(frozen=True)
class FrontierPoint:
    """One policy on one model.

    Attributes:
        policy: its string.
        quality: higher is better.
        blocks: computed for a token on average; ``None`` if no token was decoded after a prompt.
        tokens_per_second: measured, or ``None``.
        model: name of the checkpoint, where several are in one picture.
    """

    policy: str
    quality: float
    blocks: float | None
    tokens_per_second: float | None
    model: str = ""

    @property
    def series(self) -> str:
        """The policy without its first number, after the model's name."""
        head, *options = self.policy.split(",")
        kind = head.partition(":")[0]
        named = ", ".join([kind, *options])
        return f"{self.model}: {named}" if self.model else named

    @property
    def number(self) -> str:
        """The policy's first number, empty for ``never``."""
        return self.policy.split(",")[0].partition(":")[2]


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
    figure = Figure(figsize=(12.5 if timed else 7, 5.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    _panel(panels[0], points, lambda point: point.blocks, f"blocks per token, repair included (of {num_blocks})")
    panels[0].set_ylabel(quality, fontsize=12)
    if timed:
        _panel(panels[1], points, lambda point: point.tokens_per_second, "decoded tokens per second")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if timed else 2, fontsize=10, frameon=False)
    canvas.draw()
    for panel in panels:
        _label(panel, canvas.get_renderer())
    figure.savefig(path, dpi=130)


def _panel(
    axes: Any, points: Sequence[FrontierPoint], cost: Callable[[FrontierPoint], float | None], xlabel: str
) -> None:
    series: dict[str, list[tuple[float, FrontierPoint]]] = {}
    for point in points:
        x = cost(point)
        if x is not None:
            series.setdefault(point.series, []).append((x, point))
    styles = _styles(points)
    for name, placed in series.items():
        plain = placed[0][1].policy == "never"
        colour, marker = styles[name]
        placed.sort(key=lambda pair: pair[0])
        xs, ys = [x for x, _ in placed], [point.quality for _, point in placed]
        axes.plot(xs, ys, color=colour, linewidth=1.2, alpha=0.5, zorder=2)
        axes.scatter(xs, ys, s=150 if plain else 45, marker=marker, color=colour, zorder=3, label=name)
        for x, point in placed:
            axes.annotate(point.number, (x, point.quality), color=colour, gid="number", fontsize=10, zorder=4)
        if plain:
            axes.axhline(ys[0], color=colour, linestyle="--", linewidth=1, alpha=0.5, zorder=1)
    axes.set_xlabel(xlabel, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25)
    axes.margins(x=0.08, y=0.1)


def _styles(points: Sequence[FrontierPoint]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series, the same in all panels."""
    names = dict.fromkeys(point.series for point in points if point.policy != "never")
    styles = {name: _STYLES[place % len(_STYLES)] for place, name in enumerate(names)}
    return styles | {point.series: ("#000000", "*") for point in points if point.policy == "never"}


def _label(axes: Any, renderer: Any) -> None:
    """Move each number beside its point, where it covers the fewest other numbers and points."""
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
