"""The picture: quality against the cost in blocks, and against measured speed.

Policies that differ in their main numbers only (thresholds, layers) are one series: a line with the number beside
each point. With one model each series has a colour and a marker. With several models the colour says which model and
the marker which kind of policy, so that the legend grows with their sum and not with their product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eetrain.evaluation.frontier_labels import place_numbers
from eetrain.evaluation.frontier_point import FrontierPoint

# Okabe and Ito's palette, distinct with every kind of colour blindness; markers differ as well, for print.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#777777")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_PLAIN_COLOUR, _PLAIN_MARKER = "#000000", "*"
_NEUTRAL = "#444444"
"""Of markers in a legend whose colours stand for models."""

_Styles = dict[str, tuple[str, str]]


def draw_frontier(
    points: Sequence[FrontierPoint],
    path: str | Path,
    *,
    quality: str,
    num_blocks: int | None,
    lower_is_better: bool = False,
) -> None:
    """Write the picture as PNG.

    Args:
        points: ``never`` among them gives the dashed line of reference; intervals of the quality become whiskers.
        path: of the file.
        quality: what the vertical axis shows.
        num_blocks: of the model; ``None`` if models differ.
        lower_is_better: turn the vertical axis round, so that better is always up.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = any(point.speedup is not None for point in points)
    several = len({point.model for point in points}) > 1
    figure = Figure(figsize=(12.5 if timed else 7, 7 if several else 5.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    styles = _styles(points, several)
    of = "" if num_blocks is None else f" (of {num_blocks})"
    _panel(panels[0], points, styles, lambda point: point.blocks, f"blocks per token, repair included{of}")
    panels[0].set_ylabel(f"{quality} (less is better)" if lower_is_better else quality, fontsize=12)
    if timed:
        _panel(panels[1], points, styles, lambda point: point.speedup, "decoding speed, times never of the same run")
    if lower_is_better:
        panels[0].invert_yaxis()
    handles = _legend(points, styles, several)
    columns = min(len(handles), 5 if timed else 3) if several else 3 if timed else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    canvas.draw()
    for panel in panels:
        place_numbers(panel, canvas.get_renderer())
    figure.savefig(path, dpi=130)


def _styles(points: Sequence[FrontierPoint], several: bool) -> _Styles:
    """Colour and marker of each series, the same in all panels."""
    kinds = _numbered(point.kind for point in points if point.policy != "never")
    models = _numbered(point.model for point in points)
    styles = {}
    for point in points:
        plain = point.policy == "never"
        kind = kinds.get(point.kind, 0)
        colour = _COLOURS[(models[point.model] if several else kind) % len(_COLOURS)]
        styles[point.series] = (
            _PLAIN_COLOUR if plain and not several else colour,
            _PLAIN_MARKER if plain else _MARKERS[kind % len(_MARKERS)],
        )
    return styles


def _numbered(names: Any) -> dict[str, int]:
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def _panel(
    axes: Any,
    points: Sequence[FrontierPoint],
    styles: _Styles,
    cost: Callable[[FrontierPoint], float | None],
    xlabel: str,
) -> None:
    series: dict[str, list[tuple[float, FrontierPoint]]] = {}
    for point in points:
        x = cost(point)
        if x is not None:
            series.setdefault(point.series, []).append((x, point))
    for name, placed in series.items():
        _line(axes, sorted(placed, key=lambda pair: pair[0]), *styles[name])
    axes.set_xlabel(xlabel, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25)
    axes.margins(x=0.08, y=0.1)


def _line(axes: Any, placed: Sequence[tuple[float, FrontierPoint]], colour: str, marker: str) -> None:
    """One series: whiskers, a line, markers and numbers."""
    from matplotlib.patheffects import withStroke

    plain = placed[0][1].policy == "never"
    xs, ys = [x for x, _ in placed], [point.quality for _, point in placed]
    for x, point in placed:
        if point.low is not None and point.high is not None:
            axes.plot([x, x], [point.low, point.high], color=colour, linewidth=1, alpha=0.35, zorder=1)
        number = axes.annotate(point.number, (x, point.quality), color=colour, gid="number", fontsize=9, zorder=4)
        number.set_path_effects([withStroke(linewidth=2, foreground="white")])  # lines may run behind it
    axes.plot(xs, ys, color=colour, linewidth=1.2, alpha=0.5, zorder=2)
    axes.scatter(xs, ys, s=150 if plain else 45, marker=marker, color=colour, zorder=3)
    if plain:
        axes.axhline(ys[0], color=colour, linestyle="--", linewidth=1, alpha=0.5, zorder=1)


def _legend(points: Sequence[FrontierPoint], styles: _Styles, several: bool) -> list[Any]:
    """An entry a series; with several models one a model and one a kind of policy."""
    if not several:
        return [_handle(name, colour, marker) for name, (colour, marker) in styles.items()]
    colours = {point.model: styles[point.series][0] for point in points}
    markers = {point.kind: styles[point.series][1] for point in points}
    lines = [_handle(model, colour, "", linewidth=3) for model, colour in colours.items()]
    return lines + [_handle(kind, _NEUTRAL, marker) for kind, marker in markers.items()]


def _handle(label: str, colour: str, marker: str, linewidth: float = 0) -> Any:
    from matplotlib.lines import Line2D

    size = 12 if marker == _PLAIN_MARKER else 7
    return Line2D([], [], color=colour, marker=marker, linewidth=linewidth, markersize=size, label=label)
