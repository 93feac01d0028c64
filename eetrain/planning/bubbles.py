"""Extra micro-batches in the idle time of 1F1B: how many fit, and by what their gradients are divided.

Source: EE-LLM (arXiv 2312.04916), filling bubbles with partial micro-batches. Stages count from 0, ``P`` of them, and a
stage's backward takes ``r`` times its forward.

*Warm-up*: between its warm-up forwards and its first backward a stage waits ``r (P - 1 - k)`` forwards long. Extra
micro-batches run there forward and backward on the first stages only, with the losses of the exits they reach; on the
deepest stage only exits have a loss. *Cool-down*: behind the last backward of the regular ones stage ``k`` waits
``r k`` forwards long. Extra micro-batches follow the regular ones forward on all stages, and backward on the last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Literal

from eetrain.errors import ConfigError

BubbleNorm = Literal["unbiased", "eellm_code"]


def warmup_extras(stages: int, ratio: float, most: int | None = None) -> tuple[int, ...]:
    """How many extra micro-batches visit each stage in the warm-up: ``floor((r (P - 1 - k) - k) / (1 + r))``, not < 0.

    The ``k`` forwards taken off are those an extra micro-batch needs to come to stage ``k``.

    Args:
        stages: ``P``.
        ratio: ``r``, backward over forward, above 0.
        most: a limit.

    Example:
        >>> warmup_extras(4, 2), warmup_extras(8, 2)
        ((2, 1, 0, 0), (4, 3, 2, 1, 0, 0, 0, 0))
    """
    r = _positive(ratio)
    rooms = [math.floor((r * (stages - 1 - stage) - stage) / (1 + r)) for stage in range(stages)]
    return tuple(max(0, room if most is None else min(most, room)) for room in rooms)


def cooldown_extras(stages: int, ratio: float, most: int | None = None) -> tuple[int, ...]:
    """How many extra micro-batches each stage runs backward in the cool-down: ``floor(r k / (1 + r))``.

    Args:
        stages: ``P``.
        ratio: ``r``, backward over forward, above 0.
        most: a limit.

    Example:
        >>> cooldown_extras(4, 2)
        (0, 0, 1, 2)
    """
    r = _positive(ratio)
    rooms = [math.floor(r * stage / (1 + r)) for stage in range(stages)]
    return tuple(room if most is None else min(most, room) for room in rooms)


def with_exits(warmup: Sequence[int], exit_stages: Collection[int]) -> tuple[int, ...]:
    """The warm-up's extra micro-batches that are of use: each goes no farther than the last exit on its way.

    Args:
        warmup: from :func:`warmup_extras`.
        exit_stages: stages with an exit.

    Example:
        >>> with_exits((4, 3, 2, 1, 0, 0, 0, 0), {2})
        (2, 2, 2, 0, 0, 0, 0, 0)
    """
    ends = []
    for number in range(max(warmup)):
        way = [stage for stage, count in enumerate(warmup) if count > number]
        ends.append(max((stage for stage in way if stage in exit_stages), default=-1))
    return tuple(sum(end >= stage for end in ends) for stage in range(len(warmup)))


def term_counts(
    micro_batches: int, warmup: Sequence[int], cooldown: Sequence[int], terms: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """How many micro-batches give the parameters of each stage a gradient of each loss term.

    Stage ``i`` gets the gradient of a term on stage ``j >= i`` from ``M + warmup[j] + cooldown[i]`` micro-batches: the
    warm-up's extra ones that come as far as the term, and the cool-down's that come back as far as the stage.

    Args:
        micro_batches: ``M``, the regular ones.
        warmup: from :func:`warmup_extras`.
        cooldown: from :func:`cooldown_extras`.
        terms: stage of each loss term.

    Returns:
        A row a stage with a number a term; 0 for terms on earlier stages.
    """
    return tuple(
        tuple(micro_batches + warmup[term] + late if term >= stage else 0 for term in terms)
        for stage, late in enumerate(cooldown)
    )


def term_divisors(
    norm: BubbleNorm, micro_batches: int, warmup: Sequence[int], cooldown: Sequence[int], terms: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """What the sum over micro-batches of each stage's gradient of each term is divided by.

    ``unbiased`` divides by :func:`term_counts`, so that every term has the weight it has without extra micro-batches.
    ``eellm_code`` is what the paper's released code does: ``M`` and the cool-down's extra ones, everywhere. There
    exits that the warm-up's extra ones reach weigh too much, and gradients of stages that the cool-down's do not come
    back to weigh too little.

    Raises:
        ConfigError: another norm.
    """
    counts = term_counts(micro_batches, warmup, cooldown, terms)
    if norm == "unbiased":
        return counts
    if norm != "eellm_code":
        raise ConfigError(f"bubble_norm={norm!r} is not known.", hint="One of: unbiased, eellm_code.")
    every = micro_batches + max(cooldown)
    return tuple(tuple(every if count else 0 for count in row) for row in counts)


def _positive(ratio: float) -> Fraction:
    assert ratio > 0
    return Fraction(ratio)
