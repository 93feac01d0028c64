"""The arithmetic of depths against exact fractions and brute force."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product
from math import floor

import pytest

from eetrain.errors import ConfigError
from eetrain.schedules.depths import bottom_and_top, bounds_for_speed, decayed_depth, evenly_spaced, spreading_order


def half_up(number: Fraction) -> int:
    return floor(number + Fraction(1, 2))


def formula(index: int, deepest: int, shallowest: int, length: int) -> int:
    if length == 1:
        return shallowest
    share = Fraction(min(index, length - 1), length - 1)
    return max(shallowest, half_up(deepest - (deepest - shallowest) * share))


def test_decay_is_the_formula_in_exact_arithmetic():
    cases = 0
    for length, deepest in product(range(1, 13), range(1, 9)):
        for shallowest, index in product(range(1, deepest + 1), range(2 * length + 2)):
            assert decayed_depth(index, deepest, shallowest, length) == formula(index, deepest, shallowest, length)
            cases += 1
    assert cases == 36 * sum(2 * length + 2 for length in range(1, 13))


def test_halves_are_rounded_up():
    assert [decayed_depth(t, 3, 2, 3) for t in range(4)] == [3, 3, 2, 2], "2.5 in the middle"


# n_max, n_min and mean depth over 128 tokens for 2x, 3x, 4x, 5x, as recollected from the paper's table.
SETTINGS = {
    32: [(22, 11, "16.5"), (16, 6, "11"), (10, 6, "8"), (8, 5, "6.5")],
    24: [(16, 8, "12"), (10, 6, "8"), (8, 4, "6"), (6, 4, "5")],
}


@pytest.mark.parametrize("num_blocks", SETTINGS)
def test_settings_of_the_paper(num_blocks):
    for deepest, shallowest, average in SETTINGS[num_blocks]:
        depths = [decayed_depth(t, deepest, shallowest, 128) for t in range(128)]
        assert Fraction(sum(depths), 128) == Fraction(average)
        sets = [set(bottom_and_top(num_blocks, depth, 1)) for depth in depths]
        assert all(later <= earlier for earlier, later in pairwise(sets))
        assert (len(sets[0]), len(sets[-1])) == (deepest, shallowest)


def test_bottom_and_top_literally():
    for num_blocks in range(1, 9):
        for depth in range(num_blocks + 1):
            for bottom in range(depth + 1):
                below = {block for block in range(1, num_blocks + 1) if block <= bottom}
                above = {block for block in range(1, num_blocks + 1) if block >= num_blocks - (depth - bottom) + 1}
                found = bottom_and_top(num_blocks, depth, bottom)
                assert found == tuple(sorted(below | above))
                assert len(found) == depth


def test_evenly_spaced_blocks():
    for num_blocks in range(1, 34):
        assert evenly_spaced(num_blocks, 1) == (num_blocks,)
        for depth in range(2, num_blocks + 1):
            step = Fraction(num_blocks - 1, depth - 1)
            found = evenly_spaced(num_blocks, depth)
            assert found == tuple(half_up(1 + place * step) for place in range(depth))
            assert (found[0], found[-1], len(set(found))) == (1, num_blocks, depth)


def test_every_beginning_of_the_spreading_order_is_spread():
    """The last block, then the first, then each time a block that no other is farther from those before."""
    for num_blocks in range(1, 25):
        order = spreading_order(num_blocks)
        assert sorted(order) == list(range(1, num_blocks + 1))
        assert order[:2] == (num_blocks, 1)[:num_blocks]
        for place in range(2, num_blocks):
            before = order[:place]
            gaps = {b: min(abs(b - o) for o in before) for b in range(1, num_blocks + 1) if b not in before}
            farthest = max(gaps.values())
            assert order[place] == max(block for block, gap in gaps.items() if gap == farthest)


SPEEDS = (1.25, 1.5, 2, 2.5, 3, 4, 5)


@pytest.mark.parametrize(("length", "warmup"), [(1, 1), (7, 0), (16, 1), (10, 3)])
def test_bounds_for_a_speed_are_feasible_near_and_shaped(length, warmup):
    """By brute force over all bounds: never above the target, within 3 % of the nearest, of these the best shape."""
    totals = {
        (deepest, shallowest): sum(formula(t, deepest, shallowest, length) for t in range(length))
        for deepest, shallowest in product(range(1, 33), range(warmup + 1, 33))
        if shallowest <= deepest
    }
    refused = 0
    for num_blocks, speed in product(range(4, 33), SPEEDS):
        target = num_blocks / Fraction(speed)
        if target < warmup + 1:
            with pytest.raises(ConfigError):
                bounds_for_speed(num_blocks, speed, warmup, length)
            refused += 1
            continue
        most = floor(target * length)
        feasible = {b: total for b, total in totals.items() if b[0] <= num_blocks and total <= most}
        least = max(feasible.values()) - Fraction(3, 100) * target * length
        shapes = {b: abs(Fraction(b[0] - b[1], 2) - target / 3) for b, total in feasible.items() if total >= least}
        found = bounds_for_speed(num_blocks, speed, warmup, length)
        assert shapes[found] == min(shapes.values()), (num_blocks, speed)
    assert refused > 0, "speed 5 leaves less than a block of 4"


def test_a_speed_of_1_is_the_whole_model():
    for num_blocks in range(4, 33):
        assert bounds_for_speed(num_blocks, 1, 1, 64) == (num_blocks, num_blocks)


@pytest.mark.parametrize(
    ("speed", "message"),
    [
        (0.5, "A speed of 0.5 leaves 16 of 8 blocks. HINT: With warmup=1 it can be 1 to 4."),
        (4.5, "A speed of 4.5 leaves 1.78 of 8 blocks. HINT: With warmup=1 it can be 1 to 4."),
        (0, "speed=0. HINT: With warmup=1 it can be 1 to 4."),
        (-2.0, "speed=-2. HINT: With warmup=1 it can be 1 to 4."),
        (float("nan"), "speed=nan. HINT: With warmup=1 it can be 1 to 4."),
    ],
)
def test_speeds_that_cannot_be_met(speed, message):
    with pytest.raises(ConfigError) as caught:
        bounds_for_speed(8, speed, 1, 16)
    assert str(caught.value) == message


def test_a_warm_up_as_deep_as_the_model():
    with pytest.raises(ConfigError) as caught:
        bounds_for_speed(4, 1.0, 4, 16)
    assert str(caught.value) == "warmup=4 leaves none of 4 blocks above it. HINT: Set warmup to 3 or less."
