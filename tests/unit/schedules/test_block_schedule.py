"""Sets of blocks and one reach a block are the same thing, over all small cases."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from eetrain.errors import ConfigError
from eetrain.schedules import FOREVER, BlockSchedule

HORIZON = 6


def subsets(blocks):
    return [chosen for size in range(1, len(blocks) + 1) for chosen in combinations(blocks, size)]


def nested_families(num_blocks, generated):
    """All (prompt, set at index 0, ...) that only shrink."""
    families = [(prompt,) for prompt in subsets(range(1, num_blocks + 1))]
    for _ in range(generated):
        families = [(*family, inner) for family in families for inner in subsets(family[-1])]
    return families


ALL = [(n, family) for n, steps in ((1, 3), (2, 3), (3, 3), (4, 2)) for family in nested_families(n, steps)]


def test_every_nested_family_comes_back_from_active():
    # A block leaves after the prompt, after index 0, ..., or never: k + 2 choices with "not at all", less empty ends.
    assert len(ALL) == (1 + (5**2 - 4**2) + (5**3 - 4**3) + (4**4 - 3**4))
    for num_blocks, (prompt, *generated) in ALL:
        schedule = BlockSchedule.from_sets(num_blocks, prompt=prompt, generated=generated)
        assert schedule.num_blocks == num_blocks
        assert schedule.active(-1) == prompt
        assert [schedule.active(index) for index in range(len(generated))] == generated
        for later in (len(generated), 99, FOREVER - 1):
            assert schedule.active(later) == generated[-1]
        for index in range(-1, HORIZON):
            assert schedule.depth(index) == len(schedule.active(index))


def test_reach_by_its_definition():
    for num_blocks, (prompt, *generated) in ALL:
        schedule = BlockSchedule.from_sets(num_blocks, prompt=prompt, generated=generated)
        for block, reach in enumerate(schedule.reach, start=1):
            if block in generated[-1]:
                assert reach == FOREVER
            elif block not in prompt:
                assert reach == -1
            else:
                assert reach == next(index for index, blocks in enumerate(generated) if block not in blocks)


def test_every_family_that_grows_is_refused():
    refused = 0
    for sets in product(subsets(range(1, 4)), repeat=3):
        first = next((place for place in (1, 2) if not set(sets[place]) <= set(sets[place - 1])), None)
        if first is None:
            continue
        grown = min(set(sets[first]) - set(sets[first - 1]))
        with pytest.raises(ConfigError) as caught:
            BlockSchedule.from_sets(3, prompt=sets[0], generated=sets[1:])
        assert str(caught.value) == (
            f"The schedule runs block {grown} at index {first - 1} but not before, so the block would lack keys and "
            "values of earlier positions. HINT: Let the sets of blocks only shrink along the text."
        )
        refused += 1
    assert refused == 7**3 - (4**3 - 3**3)


@pytest.mark.parametrize(
    ("prompt", "generated", "found"),
    [
        ((), [(1,)], "blocks [] at the prompt of a model with 3 blocks"),
        ((1, 2), [(1, 2), ()], "blocks [] at index 1 of a model with 3 blocks"),
        ((0, 1), [(1,)], "blocks [0, 1] at the prompt of a model with 3 blocks"),
        ((1, 2), [(1, 4)], "blocks [1, 4] at index 0 of a model with 3 blocks"),
    ],
)
def test_sets_that_are_none(prompt, generated, found):
    with pytest.raises(ConfigError) as caught:
        BlockSchedule.from_sets(3, prompt=prompt, generated=generated)
    assert (
        str(caught.value) == f"The schedule runs {found}. HINT: Use at least one block at each position, from 1 to 3."
    )


def test_the_start_of_the_text_is_kept_as_the_origin():
    sets = {"prompt": (1, 2), "generated": [(1, 2), (2,)]}
    assert not BlockSchedule.from_sets(2, **sets).from_start
    assert BlockSchedule.from_sets(2, **sets, from_start=True) == BlockSchedule((1, FOREVER), from_start=True)


def test_reaches_fit_the_integers_they_are_compared_in():
    assert FOREVER == 2**31 - 1
