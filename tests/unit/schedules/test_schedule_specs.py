"""Schedules as settings: what each runs where, their strings, and what contradicts itself."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product
from math import floor

import pytest

from eetrain.errors import ConfigError
from eetrain.schedules import D3, FOREVER, HSD, SCHEDULES, BlockSchedule, SkipDecode, Static, Unified, parse_schedule
from eetrain.schedules.depths import bounds_for_speed, decayed_depth, spreading_order
from eetrain.schedules.specs import EXAMPLES


def everything(num_blocks: int) -> tuple[int, ...]:
    return tuple(range(1, num_blocks + 1))


def active_at(schedule: BlockSchedule, indices) -> list[set[int]]:
    return [set(schedule.active(index)) for index in indices]


def skipdecode_set(num_blocks: int, depth: int, warmup: int) -> set[int]:
    """``Active(t) = {1..w} + {L-(n(t)-w)+1 .. L}``."""
    return set(range(1, warmup + 1)) | set(range(num_blocks - (depth - warmup) + 1, num_blocks + 1))


def test_skipdecode_runs_the_published_sets_everywhere():
    cases = 0
    for num_blocks, warmup, length in product(range(2, 8), (0, 1, 2), (1, 2, 5, 8)):
        for least in range(warmup + 1, num_blocks + 1):
            for most in range(least, num_blocks + 1):
                wanted = [
                    skipdecode_set(num_blocks, decayed_depth(t, most, least, length), warmup) for t in range(length + 4)
                ]
                first = skipdecode_set(num_blocks, most, warmup)
                settings = {"max": most, "min": least, "warmup": warmup, "length": length}
                for prompt, start in (("max", first), ("full", set(everything(num_blocks))), ("decay", first)):
                    schedule = SkipDecode(**settings, prompt=prompt).build(num_blocks)
                    assert active_at(schedule, range(length + 4)) == wanted
                    assert set(schedule.active(-1)) == start
                    assert schedule.from_start == (prompt == "decay")
                    cases += 1
    assert cases > 2000


def test_a_speed_is_its_bounds():
    for num_blocks, speed, prompt in product((8, 12), (1, 1.5, 2, 4), ("max", "full", "decay")):
        most, least = bounds_for_speed(num_blocks, speed, 1, 20)
        by_speed = SkipDecode(speed=speed, length=20, prompt=prompt)
        by_bounds = SkipDecode(max=most, min=least, length=20, prompt=prompt)
        assert by_speed.bounds(num_blocks) == by_bounds.bounds(num_blocks) == (most, least)
        assert by_speed.build(num_blocks) == by_bounds.build(num_blocks)
        assert sum(map(by_speed.build(num_blocks).depth, range(20))) <= 20 * num_blocks / speed


def test_static_is_skipdecode_without_decay_and_the_same_in_the_prompt():
    for num_blocks, blocks, warmup in product(range(1, 8), range(1, 8), range(4)):
        if not warmup <= blocks <= num_blocks:
            continue
        if warmup == blocks < num_blocks:
            with pytest.raises(ConfigError, match="does not end in the last block"):
                Static(blocks, warmup).build(num_blocks)
            continue
        schedule = Static(blocks, warmup).build(num_blocks)
        assert active_at(schedule, (-1, 0, 5, FOREVER - 1)) == [skipdecode_set(num_blocks, blocks, warmup)] * 4
        if warmup < blocks:
            assert schedule == SkipDecode(max=blocks, min=blocks, warmup=warmup).build(num_blocks)


def test_unified_keeps_the_ends_and_spaces_the_rest():
    for num_blocks, speed in product(range(1, 33), (1, 1.2, 1.5, 2, 3, 4.5, 8)):
        if num_blocks < speed:
            continue
        schedule = Unified(speed).build(num_blocks)
        assert schedule.active(-1) == everything(num_blocks), "the prompt is run in full"
        blocks = schedule.active(0)
        assert blocks == schedule.active(1000)
        assert len(blocks) == int(num_blocks / speed)
        assert blocks[-1] == num_blocks
        if len(blocks) > 1:
            assert blocks[0] == 1
            gaps = {later - earlier for earlier, later in pairwise(blocks)}
            even = Fraction(num_blocks - 1, len(blocks) - 1)
            assert gaps <= {floor(even), -floor(-even)}


def test_d3_is_its_power_law_with_the_middle_skipped():
    for num_blocks, alpha, least in product((4, 7, 32), (0.5, 0.9, 0.98, 1.0), (2, 3, 4)):
        schedule = D3(alpha, least).build(num_blocks)
        for index in (*range(300), 10**6):
            depth = max(least, floor(num_blocks * alpha**index))
            low = -(-depth // 2)
            kept = [block for block in everything(num_blocks) if block <= low or block > num_blocks - (depth - low)]
            assert schedule.active(index) == tuple(kept), (num_blocks, alpha, index)
        assert schedule.active(-1) == everything(num_blocks)


def test_hsd_has_stages_of_equal_length_and_drops_blocks_in_order():
    for num_blocks, least, stages, length in product((4, 9), (1, 3), (2, 3, 4), (6, 12)):
        schedule = HSD(least, stages, length).build(num_blocks)
        assert schedule.active(-1) == everything(num_blocks)
        for index in range(2 * length):
            stage = min(index * (stages - 1) // length, stages - 1)
            share = Fraction(stage, stages - 1)
            depth = floor(num_blocks - (num_blocks - least) * share + Fraction(1, 2))
            assert schedule.active(index) == tuple(sorted(spreading_order(num_blocks)[:depth]))
        assert (schedule.depth(0), schedule.depth(length)) == (num_blocks, least)


GRID = [
    *(
        SkipDecode(most, least, None, warmup, length, prompt)
        for (most, least), warmup, length, prompt in product(
            ((9, 4), (4, 4)), (0, 1, 3), (1, 48, 64), ("max", "full", "decay")
        )
    ),
    *(
        SkipDecode(None, None, speed, warmup, length)
        for speed, warmup, length in product((1.0, 1.5, 2.0, 1 / 0.3), (0, 1), (1, 64))
    ),
    *(Static(blocks, warmup) for blocks, warmup in product((3, 12), (0, 1, 2))),
    *(Unified(speed) for speed in (1.0, 1.25, 2.0, 3.3333333)),
    *(D3(alpha, least) for alpha, least in product((0.98, 0.123456789, 1.0), (2, 3, 5))),
    *(HSD(least, stages, length) for least, stages, length in product((1, 6), (2, 4), (16, 64))),
]


def test_every_schedule_of_a_grid_is_read_back_as_written():
    assert len(GRID) == 54 + 16 + 6 + 4 + 9 + 8
    for spec in GRID:
        assert parse_schedule(str(spec)) == spec, str(spec)
    assert len({str(spec) for spec in GRID}) == len(GRID)
    assert {str(spec).partition(":")[0] for spec in GRID} == set(SCHEDULES)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("skipdecode:max=9,min=4", SkipDecode(9, 4, None, 1, 64, "max")),
        ("skipdecode:max=9, min=4, warmup=2, length=48, prompt=decay", SkipDecode(9, 4, None, 2, 48, "decay")),
        ("skipdecode:speed=2,length=48", SkipDecode(speed=2.0, length=48)),
        ("static:6", Static(6, 1)),
        ("static:blocks=6,warmup=3", Static(6, 3)),
        ("unified:2", Unified(2.0)),
        ("d3:0.98", D3(0.98, 2)),
        ("hsd:6", HSD(6, 4, 64)),
        ("hsd:6,stages=2,length=32", HSD(6, 2, 32)),
    ],
)
def test_strings(text, spec):
    assert parse_schedule(text) == spec


def test_every_example_parses():
    found = [parse_schedule(text) for text in EXAMPLES.split(", ")]
    assert len(found) == 6
    assert {type(spec) for spec in found} == {SkipDecode, Static, Unified, D3, HSD}


BOTH = "Set max and min, or speed alone: skipdecode:max=9,min=4 or skipdecode:speed=2."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skipdecode", f"skipdecode has max=None, min=None, speed=None. HINT: {BOTH}"),
        ("skipdecode:max=9", f"skipdecode has max=9, min=None, speed=None. HINT: {BOTH}"),
        ("skipdecode:min=4", f"skipdecode has max=None, min=4, speed=None. HINT: {BOTH}"),
        ("skipdecode:max=9,min=4,speed=2", f"skipdecode has max=9, min=4, speed=2.0. HINT: {BOTH}"),
        ("skipdecode:max=9,speed=2", f"skipdecode has max=9, min=None, speed=2.0. HINT: {BOTH}"),
        ("skipdecode:min=4,speed=2", f"skipdecode has max=None, min=4, speed=2.0. HINT: {BOTH}"),
        (
            "skipdecode:max=4,min=9",
            "skipdecode has min=9 above max=4: depth only shrinks along a text. HINT: Exchange them.",
        ),
        (
            "skipdecode:max=4,min=1",
            "skipdecode has warmup=1 and min=1: no block is left above the warm-up. "
            "HINT: Set min to 2 or more, or a smaller warmup.",
        ),
        ("skipdecode:max=4,min=2,warmup=-1", "skipdecode has warmup=-1. HINT: Set it to 0 or more."),
        ("skipdecode:max=4,min=2,length=0", "skipdecode has length=0. HINT: Set it to 1 or more."),
        ("skipdecode:max=4,min=2,prompt=none", "skipdecode has prompt=none. HINT: One of: max, full, decay."),
        ("static:0", "static has blocks=0. HINT: Set it to 1 or more."),
        ("static:2,warmup=-1", "static has warmup=-1. HINT: Set it to 0 or more."),
        ("static:2,warmup=3", "static runs 2 blocks, but warmup=3. HINT: Lower warmup."),
        ("unified:0.9", "unified has speed=0.9. HINT: Set it to 1 or more."),
        ("unified:nan", "unified has speed=nan. HINT: Set it to 1 or more."),
        ("d3:0", "d3 has alpha=0. HINT: Set it above 0 and to 1 at most."),
        ("d3:1.01", "d3 has alpha=1.01. HINT: Set it above 0 and to 1 at most."),
        ("d3:nan", "d3 has alpha=nan. HINT: Set it above 0 and to 1 at most."),
        ("d3:0.9,min=1", "d3 has min=1. HINT: Set it to 2 or more."),
        ("hsd:0", "hsd has min=0. HINT: Set it to 1 or more."),
        ("hsd:3,stages=1", "hsd has stages=1. HINT: Set it to 2 or more."),
        ("hsd:3,stages=4,length=2", "hsd has length=2. HINT: Set it to 3 or more."),
        (
            "spiral:3",
            "Schedule 'spiral:3' does not parse: 'spiral' is none of skipdecode, static, unified, d3, hsd. "
            f"HINT: For example {EXAMPLES}.",
        ),
        (
            "skipdecode:9",
            f"Schedule 'skipdecode:9' does not parse: 'skipdecode' takes no value. HINT: For example {EXAMPLES}.",
        ),
    ],
)
def test_settings_that_contradict_each_other(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_schedule(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skipdecode:max=9,min=4", "skipdecode has max=9, but the model has 8 blocks. HINT: Set max to 8 or less."),
        ("skipdecode:speed=5", "A speed of 5 leaves 1.6 of 8 blocks. HINT: With warmup=1 it can be 1 to 4."),
        ("static:9", "static has blocks=9, but the model has 8 blocks. HINT: Set it to 8 or less."),
        ("unified:9", "unified has speed=9, which leaves less than one of 8 blocks. HINT: Set it to 8 or less."),
        ("unified:inf", "unified has speed=inf, which leaves less than one of 8 blocks. HINT: Set it to 8 or less."),
        ("d3:0.9,min=9", "d3 has min=9, but the model has 8 blocks. HINT: Set it to 8 or less."),
        ("hsd:9", "hsd has min=9, but the model has 8 blocks. HINT: Set it to 8 or less."),
    ],
)
def test_settings_that_do_not_fit_the_model(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_schedule(text).build(8)
    assert str(caught.value) == message
