"""Step times against closed forms, and against the longest path through the graph of what waits for what."""

import random
from fractions import Fraction
from graphlib import TopologicalSorter
from itertools import pairwise

import pytest

from eetrain.planning.schedule import Instruction, Schedule, one_forward_one_backward
from eetrain.planning.simulation import StageTimes, simulate


def seconds(times: list[StageTimes], micro_batches: int) -> float:
    return simulate(one_forward_one_backward(len(times), micro_batches), times).seconds


def formula(times: list[StageTimes], micro_batches: int) -> float:
    """EE-LLM's estimate: ``(M - 1) max(f + b) + sum(f + b)``."""
    return (micro_batches - 1) * max(time.total for time in times) + sum(time.total for time in times)


def longest_path(schedule: Schedule, times: list[StageTimes], activation: float, gradient: float) -> float:
    """The step's length without a simulation: a node an instruction, the two ends of a transfer one node."""
    length: dict[object, float] = {}
    before: dict[object, set[object]] = {}

    def node(stage: int, instruction: Instruction) -> object:
        verb, _, what = instruction.action.partition(" ")
        if not what:
            times_of = times[stage]
            made = (stage, instruction)
            length[made] = times_of.forward if verb == "forward" else times_of.heads + times_of.backward
            return made
        sender = stage if verb == "send" else stage - 1 if what == "activation" else stage + 1
        made = (sender, what, instruction.micro_batch)
        length[made] = activation if what == "activation" else gradient
        return made

    for stage, instructions in enumerate(schedule.stages):
        nodes = [node(stage, instruction) for instruction in instructions]
        for one, two in pairwise(nodes):
            before.setdefault(two, set()).add(one)
    ends: dict[object, float] = {}
    for current in TopologicalSorter(before).static_order():
        ends[current] = length[current] + max((ends[other] for other in before.get(current, ())), default=0)
    return max(ends.values())


def random_times(generator: random.Random, stages: int) -> list[StageTimes]:
    return [
        StageTimes(generator.randint(1, 9), generator.randint(0, 4), generator.randint(0, 15)) for _ in range(stages)
    ]


def test_equal_stages_have_the_closed_form():
    for stages in range(1, 7):
        for micro_batches in range(1, 10):
            for forward, heads, backward in ((1, 0, 2), (3, 2, 5), (4, 0, 1)):
                times = [StageTimes(forward, heads, backward)] * stages
                timeline = simulate(one_forward_one_backward(stages, micro_batches), times)
                one = forward + heads + backward
                assert timeline.seconds == (micro_batches - 1 + stages) * one
                assert timeline.bubbles == ((stages - 1) * one,) * stages
                assert timeline.bubble_share == (stages - 1) / (micro_batches - 1 + stages)
                assert timeline.in_flight == tuple(min(stages - stage, micro_batches) for stage in range(stages))


@pytest.mark.parametrize("extras", [False, True])
def test_any_stages_take_the_longest_path(extras):
    generator = random.Random(1)
    for _ in range(150):
        stages, micro_batches = generator.randint(1, 6), generator.randint(1, 9)
        early = sorted((generator.randint(0, 3) for _ in range(stages - 1)), reverse=True)
        late = sorted(generator.randint(0, 3) for _ in range(stages - 1))
        filling = {"warmup": [*early, 0], "cooldown": [0, *late]} if extras else {}
        schedule = one_forward_one_backward(stages, micro_batches, **filling)
        times = random_times(generator, stages)
        for activation, gradient in ((0, 0), (2, 1), (7, 5)):
            timeline = simulate(schedule, times, send_activation=activation, send_gradient=gradient)
            assert timeline.seconds == longest_path(schedule, times, activation, gradient)


def test_intervals_of_a_stage_are_disjoint_and_all_there():
    generator = random.Random(2)
    times = random_times(generator, 4)
    timeline = simulate(one_forward_one_backward(4, 7), times, send_activation=1, send_gradient=1)
    for stage, own in enumerate(times):
        lane = [interval for interval in timeline.intervals if interval.stage == stage]
        assert all(one.end <= two.start for one, two in pairwise(lane))
        assert timeline.busy[stage] == 7 * own.total
        assert timeline.bubbles[stage] == timeline.seconds - 7 * own.total
        sent = [interval for interval in lane if interval.work == "send"]
        assert len(sent) == 7 * 2 * (1 if stage in (0, 3) else 2)


def test_the_papers_estimate_is_exact_where_the_last_stage_is_the_slowest():
    generator = random.Random(3)
    for _ in range(300):
        times = random_times(generator, generator.randint(0, 5))
        slots = [time.heads + time.backward for time in times]
        last = StageTimes(max([time.forward for time in times], default=1), 0, max(slots, default=1))
        micro_batches = generator.randint(1, 12)
        assert seconds([*times, last], micro_batches) == formula([*times, last], micro_batches)


def test_the_papers_estimate_is_too_much_where_the_first_stage_is_the_slowest():
    # Stage 0 alone: three forwards, then a backward and a forward in turn, and nothing behind it takes longer.
    times = [StageTimes(3, 0, 6), StageTimes(1, 0, 2)]
    assert formula(times, 4) == 3 * 9 + 12
    assert seconds(times, 4) == 4 * 9 < formula(times, 4)


def test_the_picture_of_the_paper():
    """P=4, M=6; the backbone of a stage takes 2 forward, the head 1, backward twice as long."""
    plain = [StageTimes(2, 0, 4)] * 3 + [StageTimes(2, 3, 4)]
    assert seconds(plain, 6) == 5 * 9 + 6 + 6 + 6 + 9
    # One exit as heavy as the head on each of the two middle stages: 3 more each, once a step.
    exits = [plain[0], StageTimes(2, 3, 4), StageTimes(2, 3, 4), plain[3]]
    assert seconds(exits, 6) == seconds(plain, 6) + 2 * 3
    # Two on one stage make it the slowest: from then on they cost in every micro-batch.
    crowded = [plain[0], StageTimes(2, 6, 4), plain[2], plain[3]]
    assert seconds(crowded, 6) > seconds(plain, 6) + 2 * 3
    # So does an exit on the last stage: 3 in each of 6.
    assert seconds([*plain[:3], StageTimes(2, 6, 4)], 6) == seconds(plain, 6) + 6 * 3


def test_an_exit_on_a_middle_stage_costs_once_a_step():
    head = Fraction(3, 2)
    for stages in range(3, 7):
        for micro_batches in (1, 2, 8, 33):
            plain = [StageTimes(2, 0, 4)] * (stages - 1) + [StageTimes(2, head, 4)]
            for middle in range(1, stages - 1):
                exits = [*plain]
                exits[middle] = StageTimes(2, head, 4)
                assert seconds(exits, micro_batches) - seconds(plain, micro_batches) == head
            light = [StageTimes(2, head / 3, 4)] * (stages - 1) + [plain[-1]]
            assert seconds(light, micro_batches) - seconds(plain, micro_batches) == (stages - 1) * head / 3


def test_transfers_hold_both_stages():
    times = [StageTimes(2, 0, 3)] * 2
    timeline = simulate(one_forward_one_backward(2, 1), times, send_activation=5, send_gradient=7)
    assert timeline.seconds == 2 + 5 + 2 + 3 + 7 + 3
    assert [(i.work, i.start, i.end) for i in timeline.intervals if i.stage == 0] == [
        ("forward", 0, 2), ("send", 2, 7), ("send", 12, 19), ("backward", 19, 22)
    ]  # fmt: skip
