"""The order in which stages work: one forward, one backward (1F1B), as DeepSpeed's engine runs it; pure arithmetic.

Stage ``s`` of ``P`` (from 0) runs the forward pass of micro-batch ``m`` in step ``2 m + s`` and its backward pass in
step ``2 m + 2 P - 1 - s`` of ``2 (M + P - 1)``: ``min(P - s, M)`` forwards first, then backwards and forwards in turn.
What a step computed is sent at the beginning of the next one. Extra micro-batches in the bubbles (EE-LLM, arXiv
2312.04916) are ours to add: DeepSpeed has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Action = Literal["forward", "backward", "send activation", "receive activation", "send gradient", "receive gradient"]


class Instruction(NamedTuple):
    """One thing a stage does; a plain tuple, as long pipelines have a million of them.

    Attributes:
        action: what.
        micro_batch: ``0 .. M - 1``; extra ones of the warm-up are ``-1, -2, ...`` in the order they enter, those of the
            cool-down ``M, M + 1, ...``.
    """

    action: Action
    micro_batch: int


@dataclass(frozen=True)
class Schedule:
    """What every stage does, in order.

    Attributes:
        micro_batches: ``M``, the regular ones.
        stages: the instructions of each stage.
    """

    micro_batches: int
    stages: tuple[tuple[Instruction, ...], ...]

    def is_extra(self, micro_batch: int) -> bool:
        """Whether a micro-batch is one that fills bubbles."""
        return not 0 <= micro_batch < self.micro_batches


def one_forward_one_backward(
    stages: int, micro_batches: int, *, warmup: Sequence[int] = (), cooldown: Sequence[int] = ()
) -> Schedule:
    """The schedule of one optimizer step.

    Args:
        stages: ``P``.
        micro_batches: ``M``.
        warmup: how many extra micro-batches visit each stage, forward and backward, before its first backward; never
            rising from stage to stage (:func:`eetrain.planning.bubbles.warmup_extras`).
        cooldown: how many extra micro-batches each stage runs backward at the end; all of them run forward on every
            stage; never falling (:func:`eetrain.planning.bubbles.cooldown_extras`).
    """
    early = tuple(warmup) or (0,) * stages
    late = tuple(cooldown) or (0,) * stages
    assert stages >= 1 <= micro_batches
    assert len(early) == len(late) == stages
    assert list(early) == sorted(early, reverse=True)
    assert list(late) == sorted(late)
    assert early[-1] == late[0] == 0
    return Schedule(micro_batches, tuple(tuple(_stage(stage, micro_batches, early, late)) for stage in range(stages)))


def _stage(stage: int, micro_batches: int, early: tuple[int, ...], late: tuple[int, ...]) -> list[Instruction]:
    """Instructions of one stage; the order within a step is that of DeepSpeed's ``TrainSchedule.steps``."""
    stages, total = len(early), micro_batches + late[-1]
    has_previous, has_next = stage > 0, stage < stages - 1

    def backs(where: int, number: int) -> bool:
        """Whether stage ``where`` runs micro-batch ``number`` backward."""
        return 0 <= number < micro_batches + late[where]

    found: list[Instruction] = []
    for step in range(2 * (total + stages - 1)):
        forward = (step - stage) // 2
        backward = (step + stage + 1) // 2 - stages
        if (step - stage) % 2 == 0:
            # The step before was backward, of the number that `backward` has rounded down to.
            if has_previous and backs(stage - 1, backward):
                found.append(Instruction("send gradient", backward))
            if has_previous and 0 <= forward < total:
                found.append(Instruction("receive activation", forward))
            if 0 <= forward < total:
                found.append(Instruction("forward", forward))
        else:
            if backward == 0:
                found += _early(stage, early)
            if has_next and backs(stage, backward):
                found.append(Instruction("receive gradient", backward))
            if has_next and 0 <= forward < total:
                found.append(Instruction("send activation", forward))
            if backs(stage, backward):
                found.append(Instruction("backward", backward))
    return found


def _early(stage: int, early: tuple[int, ...]) -> list[Instruction]:
    """Extra micro-batches of the warm-up: all forward, then backward in the opposite order, the deepest one last."""
    here = early[stage]
    above = early[stage + 1] if stage + 1 < len(early) else 0
    found = []
    for place in range(here):
        number = -1 - place
        found += [Instruction("receive activation", number)] if stage else []
        found.append(Instruction("forward", number))
        found += [Instruction("send activation", number)] if place < above else []
    for place in reversed(range(here)):
        number = -1 - place
        found += [Instruction("receive gradient", number)] if place < above else []
        found.append(Instruction("backward", number))
        found += [Instruction("send gradient", number)] if stage else []
    return found
