"""Cut a pipeline into stages of equal cost: exact, by dynamic programming.

Among all ways to cut, in this order: the largest stage costs least; the sum of the squares of the stages' costs is
least, so that the other stages are even too; the cuts come earliest, the first cut counting most. Costs are compared
as exact fractions, so that no rounding decides between equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from eetrain.errors import TopologyError
from eetrain.planning.pieces import Piece


def partition(pieces: Sequence[Piece], costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Bounds of the best stages: stage ``i`` (from 0) holds ``pieces[bounds[i]:bounds[i + 1]]``.

    Every stage has a block. The embedding is on the first and the tail on the last stage by their places. An exit may
    be the first piece of a stage, behind its block on the stage before (the "pre" placement of EE-LLM, arXiv
    2312.04916).

    Args:
        pieces: from :func:`eetrain.planning.pieces.pipeline_pieces`.
        costs: of each piece, finite and not negative, in any unit; forward plus backward seconds, say.
        stages: how many.

    Returns:
        ``stages + 1`` bounds; the first is 0, the last ``len(pieces)``.

    Raises:
        TopologyError: no stage, or more stages than blocks.

    Example:
        >>> from eetrain.planning.pieces import pipeline_pieces
        >>> partition(pipeline_pieces(4, [2]), [0, 2, 2, 1, 2, 2, 0], 2)
        (0, 3, 7)
    """
    assert len(pieces) == len(costs)
    assert all(math.isfinite(cost) and cost >= 0 for cost in costs)
    check_stages(stages, sum(piece.kind == "block" for piece in pieces))
    prefix = [0, *accumulate(_whole(costs))]
    blocks = [0, *accumulate(int(piece.kind == "block") for piece in pieces)]
    most = _least_maximum(prefix, blocks, stages)
    return _most_even(prefix, blocks, stages, most)


def check_stages(stages: int, num_blocks: int) -> None:
    """Refuse a number of stages that a backbone cannot have.

    Raises:
        TopologyError: no stage, or more stages than blocks.
    """
    if stages < 1:
        raise TopologyError(f"stages={stages}, but a pipeline has at least one.", hint="Set it to 1 or more.")
    if stages > num_blocks:
        raise TopologyError(
            f"stages={stages}, but the backbone has {num_blocks} blocks and every stage needs one.",
            hint=f"Set stages to {num_blocks} or fewer.",
        )


def _whole(costs: Sequence[float]) -> list[int]:
    """The costs as integers, all times the same number: floats are fractions."""
    exact = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(cost.denominator for cost in exact))
    return [int(cost * unit) for cost in exact]


def _least_maximum(prefix: list[int], blocks: list[int], stages: int) -> int:
    """The smallest possible cost of the largest stage."""
    last = len(prefix) - 1
    # best[end]: for the pieces before `end` in as many stages as were done; None where there is no such cut.
    best: list[int | None] = [0, *(None for _ in range(last))]
    for _ in range(stages):
        best = [
            min(
                (
                    max(before, prefix[end] - prefix[start])
                    for start in range(end)
                    if (before := best[start]) is not None and blocks[end] > blocks[start]
                ),
                default=None,
            )
            for end in range(last + 1)
        ]
    found = best[last]
    assert found is not None
    return found


def _most_even(prefix: list[int], blocks: list[int], stages: int, most: int) -> tuple[int, ...]:
    """Bounds with the least sum of squares among those whose stages cost ``most`` at most, the earliest of these."""
    last = len(prefix) - 1
    # rest[start]: least sum of squares of the pieces from `start` on, in as many stages as were done, and the end of
    # their first stage; the earliest end among equals, as `min` compares pairs.
    rest: list[tuple[int, int] | None] = [*(None for _ in range(last)), (0, last)]
    ends: list[list[tuple[int, int] | None]] = []
    for _ in range(stages):
        rest = [
            min(
                (
                    ((prefix[end] - prefix[start]) ** 2 + after[0], end)
                    for end in range(start + 1, last + 1)
                    if (after := rest[end]) is not None
                    and blocks[end] > blocks[start]
                    and prefix[end] - prefix[start] <= most
                ),
                default=None,
            )
            for start in range(last + 1)
        ]
        ends.append(rest)
    bounds = [0]
    for choice in reversed(ends):
        step = choice[bounds[-1]]
        assert step is not None
        bounds.append(step[1])
    return tuple(bounds)
