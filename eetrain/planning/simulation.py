"""When every stage of a pipeline works and when it waits: an exact simulation of its schedule.

A stage runs its instructions one after the other. A transfer starts when the sender has come to its ``send`` and the
receiver to its ``receive``, and holds both until it ends, as blocking ``torch.distributed`` calls do, in DeepSpeed's
pipeline on NCCL as on gloo. Seconds may be any numbers; integers and fractions stay exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from eetrain.planning.schedule import Action, Instruction, Schedule

Work = Literal["forward", "heads", "backward", "send"]


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one stage and micro-batch.

    Attributes:
        forward: of its blocks.
        heads: of its exits and, on the last stage, the tail: forward and backward, both in the backward step, where
            their losses are computed.
        backward: of its blocks.
    """

    forward: float
    heads: float
    backward: float

    @property
    def total(self) -> float:
        """All that one micro-batch costs the stage."""
        return self.forward + self.heads + self.backward


class Interval(NamedTuple):
    """A stretch of time in which a stage works; ``send`` is a transfer, on both stages."""

    stage: int
    work: Work
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One optimizer step of a pipeline.

    Attributes:
        schedule: what was simulated.
        intervals: of all stages, each stage's in order of time.
    """

    schedule: Schedule
    intervals: tuple[Interval, ...]

    @cached_property
    def seconds(self) -> float:
        """From the first forward to the last backward."""
        return max(interval.end for interval in self.intervals)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds each stage computes, transfers not included."""
        sums: list[float] = [0] * len(self.schedule.stages)
        for interval in self.intervals:
            if interval.work != "send":
                sums[interval.stage] += interval.end - interval.start
        return tuple(sums)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Seconds each stage does not compute: the pipeline's idle time, and transfers."""
        return tuple(self.seconds - busy for busy in self.busy)

    @property
    def bubble_share(self) -> float:
        """Share of all stages' time that is not computing, 0 to 1."""
        return sum(self.bubbles) / (len(self.busy) * self.seconds)

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """The most micro-batches each stage holds activations of at one time; ``min(P - s, M)`` without extra ones.

        An extra one of the cool-down is held only where it comes back.
        """
        return tuple(_most_held(instructions) for instructions in self.schedule.stages)


def simulate(
    schedule: Schedule, times: Sequence[StageTimes], *, send_activation: float = 0, send_gradient: float = 0
) -> Timeline:
    """Run a schedule.

    Args:
        schedule: instructions of every stage.
        times: of every stage, for one micro-batch, regular or extra.
        send_activation: seconds from one stage to the next.
        send_gradient: seconds back.
    """
    assert len(times) == len(schedule.stages)
    run = _Run(schedule, times, {"activation": send_activation, "gradient": send_gradient})
    waiting = deque(range(len(times)))
    while waiting:
        waiting.extend(run.advance(waiting.popleft()))
    assert run.finished, "stages wait for each other"
    return Timeline(schedule, tuple(interval for lane in run.lanes for interval in lane))


_COUNTERPARTS: dict[Action, Action] = {
    "send activation": "receive activation",
    "receive activation": "send activation",
    "send gradient": "receive gradient",
    "receive gradient": "send gradient",
}


class _Run:
    """Where every stage is, in its instructions and in time."""

    def __init__(self, schedule: Schedule, times: Sequence[StageTimes], transfers: dict[str, float]) -> None:
        self.instructions, self.times, self.transfers = schedule.stages, times, transfers
        self.place = [0] * len(times)
        self.clock: list[float] = [0] * len(times)
        self.lanes: list[list[Interval]] = [[] for _ in times]

    @property
    def finished(self) -> bool:
        """Whether every stage has run all its instructions."""
        return all(place == len(own) for place, own in zip(self.place, self.instructions, strict=True))

    def advance(self, stage: int) -> list[int]:
        """Run ``stage`` up to a transfer that its neighbour has not come to; name the neighbours it set free."""
        freed = []
        own, times = self.instructions[stage], self.times[stage]
        while self.place[stage] < len(own):
            action, micro_batch = own[self.place[stage]]
            if action == "forward":
                self._spend(stage, "forward", micro_batch, times.forward)
            elif action == "backward":
                self._spend(stage, "heads", micro_batch, times.heads)
                self._spend(stage, "backward", micro_batch, times.backward)
            else:
                other = stage + (1 if action in ("send activation", "receive gradient") else -1)
                if not self._comes_to(other, (_COUNTERPARTS[action], micro_batch)):
                    break
                self._transfer(stage, other, micro_batch, self.transfers[action.split()[1]])
                freed.append(other)
            self.place[stage] += 1
        return freed

    def _comes_to(self, stage: int, instruction: tuple[Action, int]) -> bool:
        """Whether ``stage`` is at ``instruction``."""
        own, place = self.instructions[stage], self.place[stage]
        return place < len(own) and own[place] == instruction

    def _transfer(self, stage: int, other: int, micro_batch: int, seconds: float) -> None:
        start = max(self.clock[stage], self.clock[other])
        for where in (stage, other):
            self.clock[where] = start
            self._spend(where, "send", micro_batch, seconds)
        self.place[other] += 1

    def _spend(self, stage: int, work: Work, micro_batch: int, seconds: float) -> None:
        start = self.clock[stage]
        if seconds:
            self.clock[stage] = start + seconds
            self.lanes[stage].append(Interval(stage, work, micro_batch, start, start + seconds))


def _most_held(instructions: Sequence[Instruction]) -> int:
    back = {instruction.micro_batch for instruction in instructions if instruction.action == "backward"}
    held = most = 0
    for instruction in instructions:
        if instruction.micro_batch in back:
            held += (instruction.action == "forward") - (instruction.action == "backward")
        most = max(most, held)
    return most
