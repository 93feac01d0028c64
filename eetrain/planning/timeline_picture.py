"""The picture of one step: a lane a stage, what it computes, and what it waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eetrain.planning.simulation import Interval, Timeline

# Okabe and Ito's palette, distinct with every kind of colour blindness; extra micro-batches are hatched, for print.
_COLOURS = {
    "forward": "#56b4e9",
    "heads": "#e69f00",
    "backward": "#0072b2",
    "extra forward": "#66c5ab",
    "extra backward": "#009e73",
    "send": "#333333",
}
_LABELS = {
    "forward": "forward",
    "heads": "exits and full depth: head and loss, forward and backward",
    "backward": "backward",
    "extra forward": "extra micro-batch, forward",
    "extra backward": "extra micro-batch, backward",
    "send": "transfer",
}
_OUTLINES = {
    (False, "forward"): "#2b7fb3",
    (False, "backward"): "#0072b2",
    (True, "forward"): "#00704f",
    (True, "backward"): "#00704f",
}
"""Around numbers, so that they can be read on every box."""
_BUBBLE = "#e8e8e8"
_MOST_BOXES = 1200
"""More are too narrow for numbers and edges."""


def draw_timeline(timeline: Timeline, path: str | Path, title: str) -> None:
    """Write the picture, as PNG, SVG or PDF by the file's suffix.

    Args:
        timeline: of one step.
        path: of the file.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    stages = len(timeline.schedule.stages)
    scale, unit = (1e3, "ms") if timeline.seconds < 1 else (1.0, "s")
    figure = Figure(figsize=(13, min(16.0, 1.9 + 0.42 * stages)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = _draw_lanes(axes, timeline, scale)
    axes.set_xlim(0, timeline.seconds * scale)
    axes.set_ylim(stages - 0.5, -0.5)
    axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    axes.set_xlabel(f"time in {unit}", fontsize=12)
    axes.set_title(title, fontsize=11, loc="left")
    handles = [Patch(facecolor=_COLOURS[kind], label=_LABELS[kind]) for kind in _COLOURS if kind in shown]
    handles.append(Patch(facecolor=_BUBBLE, label="bubble"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    figure.savefig(path, dpi=130)


def _draw_lanes(axes: Any, timeline: Timeline, scale: float) -> set[str]:
    """Draw all stages and return the kinds of work among them."""
    for stage in range(len(timeline.schedule.stages)):
        axes.broken_barh([(0, timeline.seconds * scale)], (stage - 0.4, 0.8), facecolors=_BUBBLE)
    spans: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for own in timeline.intervals:
        spans.setdefault((_kind(timeline, own), own.stage), []).append(
            (own.start * scale, (own.end - own.start) * scale)
        )
    few = len(timeline.intervals) <= _MOST_BOXES
    for (kind, stage), boxes in spans.items():
        height = 0.16 if kind == "send" else 0.8
        style: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.4} if few else {"linewidth": 0}
        style |= {"hatch": "////"} if few and kind.startswith("extra") else {}
        axes.broken_barh(boxes, (stage - height / 2, height), facecolors=_COLOURS[kind], **style)
    if few:
        _number(axes, timeline, scale)
    return {kind for kind, _ in spans}


def _kind(timeline: Timeline, interval: Interval) -> str:
    if interval.work == "send" or not timeline.schedule.is_extra(interval.micro_batch):
        return interval.work
    return "extra forward" if interval.work == "forward" else "extra backward"


def _number(axes: Any, timeline: Timeline, scale: float) -> None:
    """Write each micro-batch's number into its boxes: regular ones from 1, extra ones as letters."""
    from matplotlib.patheffects import withStroke

    for own in timeline.intervals:
        if own.work not in ("forward", "backward") or own.end - own.start < timeline.seconds / 90:
            continue
        middle = (own.start + own.end) / 2 * scale
        extra = timeline.schedule.is_extra(own.micro_batch)
        text = _letter(timeline, own.micro_batch) if extra else str(own.micro_batch + 1)
        number = axes.text(middle, own.stage, text, ha="center", va="center", fontsize=8, color="white")
        number.set_path_effects([withStroke(linewidth=2.5, foreground=_OUTLINES[extra, own.work])])


def _letter(timeline: Timeline, micro_batch: int) -> str:
    """Extra micro-batches of the warm-up are ``a``, ``b``, ..., those of the cool-down ``A``, ``B``, ..."""
    if micro_batch < 0:
        return chr(ord("a") + (-1 - micro_batch) % 26)
    return chr(ord("A") + (micro_batch - timeline.schedule.micro_batches) % 26)
