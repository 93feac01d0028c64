"""How many blocks at which index, and which ones: the two halves of a schedule."""

from __future__ import annotations

from eetrain.errors import ConfigError


def decayed_depth(index: int, deepest: int, shallowest: int, length: int) -> int:
    """SkipDecode's number of executed blocks: linear from ``deepest`` to ``shallowest``, rounded half up.

    ``n(t) = max(n_min, round(n_max - (n_max - n_min) min(t, T - 1) / (T - 1)))`` (arXiv 2307.02628; that the numbers
    include the warm-up blocks, and the rounding, are our reading), in integers so that it is exact.

    Args:
        index: of the token, 0 for the first generated one.
        deepest: ``n_max``.
        shallowest: ``n_min``.
        length: ``T``, the number of tokens the decay takes; 1 is ``n_min`` throughout.
    """
    if index >= length - 1:
        return shallowest
    steps = length - 1
    return max(shallowest, (2 * (deepest * steps - (deepest - shallowest) * index) + steps) // (2 * steps))


def bottom_and_top(num_blocks: int, depth: int, bottom: int) -> tuple[int, ...]:
    """The ``bottom`` lowest and the ``depth - bottom`` highest blocks: what lies between is skipped."""
    assert 0 <= bottom <= depth <= num_blocks
    return (*range(1, bottom + 1), *range(num_blocks - (depth - bottom) + 1, num_blocks + 1))


def evenly_spaced(num_blocks: int, depth: int) -> tuple[int, ...]:
    """First, last and evenly spaced blocks between them (rounded half up); the last one only if ``depth`` is 1."""
    if depth == 1:
        return (num_blocks,)
    steps = depth - 1
    return tuple(1 + (2 * (num_blocks - 1) * place + steps) // (2 * steps) for place in range(depth))


def spreading_order(num_blocks: int) -> tuple[int, ...]:
    """All blocks in an order of which every beginning is spread out: each next one is farthest from those before.

    It starts with the last and the first block; of equally far ones the highest comes first.
    """
    order = [num_blocks, 1][:num_blocks]
    rest = set(range(1, num_blocks + 1)) - set(order)
    while rest:
        best = max(rest, key=lambda block: (min(abs(block - other) for other in order), block))
        order.append(best)
        rest.remove(best)
    return tuple(order)


def bounds_for_speed(num_blocks: int, speed: float, warmup: int, length: int) -> tuple[int, int]:
    """``n_max`` and ``n_min`` whose mean depth over ``length`` tokens is close to ``num_blocks / speed``, never above.

    Of means less than 3 % of the target below the closest one, that whose half range is closest to a third of the
    target is taken, as in the paper's settings. A speed of 1 is the whole model.

    Raises:
        ConfigError: the speed is below 1 or needs fewer blocks than ``warmup + 1``.
    """
    least = warmup + 1
    if least > num_blocks:
        raise ConfigError(
            f"warmup={warmup} leaves none of {num_blocks} blocks above it.",
            hint=f"Set warmup to {num_blocks - 1} or less.",
        )
    if not 1 <= speed <= num_blocks / least:
        raise ConfigError(
            f"A speed of {speed:g} leaves {num_blocks / speed:.3g} of {num_blocks} blocks."
            if speed > 0
            else f"speed={speed:g}.",
            hint=f"With warmup={warmup} it can be 1 to {num_blocks / least:g}.",
        )
    if speed == 1:
        return num_blocks, num_blocks
    target = num_blocks / speed
    found: list[tuple[float, float, int, int]] = []
    for span in range(num_blocks - least + 1):
        above = sum(decayed_depth(t, span, 0, length) for t in range(length)) / length  # rounding knows no offset
        for shallowest in range(least, num_blocks - span + 1):
            missing = target - (shallowest + above)
            if missing >= -1e-9:
                shape = abs(span / 2 - target / 3)
                found.append((round(missing, 9), shape, shallowest + span, shallowest))
    assert found, "the shallowest schedule runs warmup + 1 blocks throughout"
    nearest = min(found)[0]
    close = [item for item in found if item[0] <= nearest + _SLACK * target]
    _, _, deepest, shallowest = min(close, key=lambda item: (item[1], item[0]))
    return deepest, shallowest


_SLACK = 0.03
"""A mean this much of the target below the nearest one is as good as it, so that the shape can decide."""
