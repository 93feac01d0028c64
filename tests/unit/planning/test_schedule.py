"""The order of work is DeepSpeed's own."""

from itertools import pairwise

import pytest

from eetrain.planning.schedule import one_forward_one_backward

NAMES = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "SendActivation": "send activation",
    "RecvActivation": "receive activation",
    "SendGrad": "send gradient",
    "RecvGrad": "receive gradient",
}


def deepspeed_order(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """What DeepSpeed's engine does on one stage; buffers are told apart by counting each kind of instruction."""
    schedule = pytest.importorskip("deepspeed.runtime.pipe.schedule", reason="deepspeed is an extra")
    steps = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
    seen = dict.fromkeys(NAMES, 0)
    found = []
    for command in (command for step in steps.steps() for command in step):
        name = type(command).__name__
        if name in NAMES:
            assert command.buffer_id == seen[name] % steps.num_pipe_buffers()
            found.append((NAMES[name], seen[name]))
            seen[name] += 1
    return found


def test_every_small_pipeline_runs_in_deepspeeds_order():
    cases = 0
    for stages in range(1, 7):
        for micro_batches in range(1, 10):
            schedule = one_forward_one_backward(stages, micro_batches)
            for stage, instructions in enumerate(schedule.stages):
                got = [(instruction.action, instruction.micro_batch) for instruction in instructions]
                assert got == deepspeed_order(stage, stages, micro_batches)
                cases += 1
    assert cases == 21 * 9


def test_extra_micro_batches_go_as_far_as_they_are_let():
    schedule = one_forward_one_backward(3, 2, warmup=(2, 1, 0), cooldown=(0, 0, 1))
    worked = [[i for i in stage if i.action in ("forward", "backward")] for stage in schedule.stages]
    assert [[f"{i.action[0].upper()}{i.micro_batch}" for i in stage] for stage in worked] == [
        ["F0", "F1", "F2", "F-1", "F-2", "B-2", "B-1", "B0", "B1"],
        ["F0", "F1", "F-1", "B-1", "B0", "F2", "B1"],
        ["F0", "B0", "F1", "B1", "F2", "B2"],
    ]
    assert [schedule.is_extra(number) for number in (-2, -1, 0, 1, 2)] == [True, True, False, False, True]
    for one, two in pairwise(schedule.stages):
        for verb, what, other in (("send", "activation", "receive"), ("receive", "gradient", "send")):
            below = [i.micro_batch for i in one if i.action == f"{verb} {what}"]
            above = [i.micro_batch for i in two if i.action == f"{other} {what}"]
            assert below == above
