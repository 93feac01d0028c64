"""A plan as tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from eetrain.commands.output import print_table
from eetrain.planning.plan import Layout, Plan

_GB = 1e9


def show_plan(about: dict[str, Any], plan: Plan, layouts: Sequence[Layout]) -> None:
    """Write what was planned, a table of stages and one of exits, and the other numbers of stages if there are some.

    Args:
        about: the model: ``model``, ``device``, ``precision``, ``tuning``, ``exit_layers`` and ``parameters``.
        plan: the best one, or the one asked for.
        layouts: all that were compared, the best first.
    """
    if len(layouts) > 1:
        print_table("numbers of stages, the best first", *_candidates(layouts), left=0)
    sys.stdout.write(plan_title(about, plan) + "\n")
    print_table("stages", *_stages(plan), left=2)
    if plan.exits:
        print_table("what an exit adds to the step on these stages", *_exits(plan), left=0)
        sys.stdout.write(_exits_note(plan) + "\n")
    if plan.filling is not None:
        print_table("extra micro-batches in the bubbles", *_filling(plan), left=0)
        sys.stdout.write(_filling_note(plan) + "\n")


def picture_title(about: dict[str, Any], plan: Plan) -> str:
    """Above the timeline: as :func:`plan_title`, and of extra micro-batches if there are some."""
    return plan_title(about, plan) + ("" if plan.filling is None else f"\nextra micro-batches: {_filling_note(plan)}")


def plan_title(about: dict[str, Any], plan: Plan) -> str:
    """What was planned, and what comes of it: two lines."""
    layout, work = plan.layout, plan.layout.workload
    exits = ", ".join(map(str, about["exit_layers"])) or "none"
    return (
        f"{about['model']}, {about['parameters'] / 1e9:.4g} B parameters, {about['tuning']}, exits {exits}; "
        f"{layout.cluster.devices} x {about['device']} at {layout.cluster.utilisation:.0%}: "
        f"{_count(len(layout.stages), 'stage')} x {_count(layout.replicas, 'replica')}, "
        f"{_count(layout.micro_batches, 'micro-batch', 'es')} of {work.micro_batch_size} x {work.length} tokens\n"
        f"step {_seconds(layout.step_seconds)}, {layout.tokens_per_second:,.0f} tokens/s, {layout.peak_share:.1%} of "
        f"peak, bubble {layout.timeline.bubble_share:.1%}, {_memory_note(layout)}"
    )


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else ending}"


def _memory_note(layout: Layout) -> str:
    most, has = layout.peak_memory / _GB, layout.cluster.memory / _GB
    if not layout.misfits:
        return f"{most:.1f} of {has:.4g} GB"
    stages = ", ".join(map(str, layout.misfits))
    return f"DOES NOT FIT: {most:.1f} GB of {has:.4g}, stage{'s' if len(layout.misfits) > 1 else ''} {stages}"


def _candidates(layouts: Sequence[Layout]) -> tuple[list[str], list[list[Any]]]:
    columns = ["stages", "replicas", "micro-batches", "step s", "tokens/s", "% of peak", "bubble %", "GB", "fits"]
    rows = [
        [
            len(layout.stages),
            layout.replicas,
            layout.micro_batches,
            layout.step_seconds,
            round(layout.tokens_per_second),
            100 * layout.peak_share,
            100 * layout.timeline.bubble_share,
            layout.peak_memory / _GB,
            "no" if layout.misfits else "yes",
        ]
        for layout in layouts
    ]
    return columns, rows


def _stages(plan: Plan) -> tuple[list[str], list[list[Any]]]:
    columns = ["stage", "pieces", "forward ms", "heads ms", "backward ms", "bubble %", "in flight"]
    columns += ["weights GB", "gradients", "optimizer", "activations", "workspace", "total", "fits"]
    rows = []
    for place, stage in enumerate(plan.layout.stages):
        times, memory = stage.times, stage.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.workspace, memory.total)
        rows.append(
            [
                str(place),
                short_pieces(stage.pieces),
                *(1e3 * seconds for seconds in (times.forward, times.heads, times.backward)),
                100 * stage.bubble,
                stage.in_flight,
                *(size / _GB for size in parts),
                "no" if place in plan.layout.misfits else "yes",
            ]
        )
    return columns, rows


def short_pieces(names: Sequence[str]) -> str:
    """Names of pieces in a row, blocks that follow each other as a range.

    Example:
        >>> short_pieces(["embed", "block 1", "block 2", "exit 2", "block 3"])
        'embed, blocks 1-2, exit 2, block 3'
    """
    parts = []
    for kind, group in groupby(names, key=lambda name: name.partition(" ")[0]):
        numbers = [name.partition(" ")[2] for name in group]
        if kind == "block" and len(numbers) > 1:
            parts.append(f"blocks {numbers[0]}-{numbers[-1]}")
        else:
            parts.append(f"{kind} {numbers[0]}".strip())
    return ", ".join(parts)


def _exits_note(plan: Plan) -> str:
    return f"all exits: {plan.exits_percent:+.2f} % of the best pipeline without any ({_seconds(plan.plain_seconds)})"


def _exits(plan: Plan) -> tuple[list[str], list[list[Any]]]:
    columns = ["exit", "stage", "head ms", "step + ms", "micro-batches' worth", "step + %"]
    rows = [
        [own.layer, own.stage, 1e3 * own.head_seconds, 1e3 * own.seconds, own.seconds / own.head_seconds, own.percent]
        for own in plan.exits
    ]
    return columns, rows


def _filling_note(plan: Plan) -> str:
    assert plan.filling is not None
    filling, layout = plan.filling, plan.layout
    longer = f"the step takes {_seconds(filling.extra_seconds)} longer" if filling.extra_seconds else "they fit"
    full = [str(place) for place, size in enumerate(filling.memory) if size > layout.cluster.memory]
    memory = f"; too much memory on stage {', '.join(full)}" if full else ""
    return (
        f"{max(filling.warmup)} in the warm-up, {max(filling.cooldown)} in the cool-down: {longer}, bubble "
        f"{filling.timeline.bubble_share:.1%}{memory}"
    )


def _filling(plan: Plan) -> tuple[list[str], list[list[Any]]]:
    assert plan.filling is not None
    rows = [
        [place, early, late, size / _GB]
        for place, (early, late, size) in enumerate(
            zip(plan.filling.warmup, plan.filling.cooldown, plan.filling.memory, strict=True)
        )
    ]
    return ["stage", "warm-up", "backward in the cool-down", "total GB"], rows


def _seconds(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"
