"""Published schedules as settings: each says which blocks run at which index of a model with so many blocks.

| string | meaning |
|---|---|
| ``skipdecode:max=9,min=4`` | SkipDecode: from 9 to 4 blocks over ``length`` tokens, skipping lower-middle blocks |
| ``skipdecode:speed=2`` | the same with bounds that run half of the blocks on average |
| ``static:6`` | 6 blocks for every token, the lowest and the highest |
| ``unified:2`` | Unified Layer Skipping at speed 2: evenly spaced blocks, the same for every token |
| ``d3:0.98`` | D3: ``floor(L 0.98^i)`` blocks at token ``i``, skipping the middle |
| ``hsd:6`` | Hierarchical Skip Decoding: evenly spaced blocks, fewer in each stage of the text |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from eetrain import shorthand
from eetrain.errors import ConfigError
from eetrain.schedules.depths import bottom_and_top, bounds_for_speed, decayed_depth, evenly_spaced, spreading_order
from eetrain.schedules.schedule import FOREVER, BlockSchedule
from eetrain.shorthand import Form

PromptDepth = Literal["max", "full", "decay"]


class ScheduleSpec(ABC):
    """A schedule before it knows the model."""

    def build(self, num_blocks: int) -> BlockSchedule:
        """The schedule for a model with ``num_blocks`` blocks.

        Raises:
            ConfigError: it does not fit.
        """
        schedule = self._build(num_blocks)
        if num_blocks not in schedule.active(FOREVER - 1):
            raise ConfigError(
                f"The schedule {self} does not end in the last block, whose output gives the logits.",
                hint="Let it run more blocks, or fewer warm-up blocks.",
            )
        return schedule

    @abstractmethod
    def _build(self, num_blocks: int) -> BlockSchedule:
        """The schedule, whatever it ends in."""


@dataclass(frozen=True)
class SkipDecode(ScheduleSpec):
    """SkipDecode (arXiv 2307.02628): one depth a position for the whole batch, shrinking along the text.

    ``warmup`` lowest blocks and the ``n(t) - warmup`` highest ones run, :func:`decayed_depth` gives ``n(t)``.

    Args:
        max: ``n_max``, blocks at the first generated token.
        min: ``n_min``, blocks from token ``length - 1`` on. Both numbers include the warm-up blocks.
        speed: instead of ``max`` and ``min``: run 1/speed of the blocks on average over ``length`` tokens.
        warmup: lowest blocks that always run.
        length: tokens the decay takes, a typical length of a text.
        prompt: blocks of the prompt. ``max``: ``n_max``; ``full``: all; ``decay``: the
            decay begins at the prompt's first token, ``length`` then counts the prompt too.

    Raises:
        ConfigError: settings that contradict each other.
    """

    max: int | None = None
    min: int | None = None
    speed: float | None = None
    warmup: int = 1
    length: int = 64
    prompt: PromptDepth = "max"

    def __post_init__(self) -> None:
        bounds = (self.max, self.min)
        if (self.speed is None) == (None in bounds) or (self.speed is not None and bounds != (None, None)):
            raise ConfigError(
                f"skipdecode has max={self.max}, min={self.min}, speed={self.speed}.",
                hint="Set max and min, or speed alone: skipdecode:max=9,min=4 or skipdecode:speed=2.",
            )
        _at_least("skipdecode", "warmup", self.warmup, 0)
        _at_least("skipdecode", "length", self.length, 1)
        if self.prompt not in get_args(PromptDepth):
            raise ConfigError(f"skipdecode has prompt={self.prompt}.", hint="One of: max, full, decay.")
        if self.max is not None and self.min is not None:
            if self.min > self.max:
                raise ConfigError(
                    f"skipdecode has min={self.min} above max={self.max}: depth only shrinks along a text.",
                    hint="Exchange them.",
                )
            if self.min <= self.warmup:
                raise ConfigError(
                    f"skipdecode has warmup={self.warmup} and min={self.min}: no block is left above the warm-up.",
                    hint=f"Set min to {self.warmup + 1} or more, or a smaller warmup.",
                )

    def bounds(self, num_blocks: int) -> tuple[int, int]:
        """``n_max`` and ``n_min`` for a model with ``num_blocks`` blocks."""
        if self.speed is not None:
            return _bounds(num_blocks, self.speed, self.warmup, self.length)
        assert self.max is not None
        assert self.min is not None
        if self.max > num_blocks:
            raise ConfigError(
                f"skipdecode has max={self.max}, but the model has {num_blocks} blocks.",
                hint=f"Set max to {num_blocks} or less.",
            )
        return self.max, self.min

    def _build(self, num_blocks: int) -> BlockSchedule:
        deepest, shallowest = self.bounds(num_blocks)
        depths = [decayed_depth(index, deepest, shallowest, self.length) for index in range(self.length)]
        sets = [bottom_and_top(num_blocks, depth, self.warmup) for depth in depths]
        prompt = bottom_and_top(num_blocks, num_blocks if self.prompt == "full" else deepest, self.warmup)
        if self.prompt == "decay":
            return BlockSchedule.from_sets(num_blocks, prompt=prompt, generated=sets, from_start=True)
        return BlockSchedule.from_sets(num_blocks, prompt=prompt, generated=sets)

    def __str__(self) -> str:
        return shorthand.spell("skipdecode", self, None)


@dataclass(frozen=True)
class Static(ScheduleSpec):
    """One depth for all of a request, its prompt too: SkipDecode's set with ``max = min``.

    Args:
        blocks: how many run.
        warmup: of these, the lowest ones; the others are the highest.
    """

    blocks: int
    warmup: int = 1

    def __post_init__(self) -> None:
        _at_least("static", "blocks", self.blocks, 1)
        _at_least("static", "warmup", self.warmup, 0)
        if self.warmup > self.blocks:
            raise ConfigError(f"static runs {self.blocks} blocks, but warmup={self.warmup}.", hint="Lower warmup.")

    def _build(self, num_blocks: int) -> BlockSchedule:
        _fits("static", "blocks", self.blocks, num_blocks)
        blocks = bottom_and_top(num_blocks, self.blocks, self.warmup)
        return BlockSchedule.from_sets(num_blocks, prompt=blocks, generated=[blocks])

    def __str__(self) -> str:
        return shorthand.spell("static", self, "blocks")


@dataclass(frozen=True)
class Unified(ScheduleSpec):
    """Unified Layer Skipping (arXiv 2404.06954): full prompt, then ``int(L / speed)`` evenly spaced blocks.

    The paper copies keys and values of skipped blocks from below; as the set never changes nobody reads them, and they
    are not written here.

    Args:
        speed: target, at least 1.
    """

    speed: float

    def __post_init__(self) -> None:
        if not self.speed >= 1:
            raise ConfigError(f"unified has speed={self.speed:g}.", hint="Set it to 1 or more.")

    def _build(self, num_blocks: int) -> BlockSchedule:
        depth = int(num_blocks / self.speed)
        if depth < 1:
            raise ConfigError(
                f"unified has speed={self.speed:g}, which leaves less than one of {num_blocks} blocks.",
                hint=f"Set it to {num_blocks} or less.",
            )
        everything = range(1, num_blocks + 1)
        return BlockSchedule.from_sets(num_blocks, prompt=everything, generated=[evenly_spaced(num_blocks, depth)])

    def __str__(self) -> str:
        return shorthand.spell("unified", self, "speed")


@dataclass(frozen=True)
class D3(ScheduleSpec):
    """Position-aware depth decay (D3, arXiv 2503.08524): ``max(min, floor(L alpha^i))`` blocks, the middle skipped.

    Half of the blocks that run, rounded up, are the lowest and the others the highest.

    Args:
        alpha: in (0, 1].
        min: the power law goes to 0; it stops here, at 2 or more: one block at each end.
    """

    alpha: float
    min: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"d3 has alpha={self.alpha:g}.", hint="Set it above 0 and to 1 at most.")
        _at_least("d3", "min", self.min, 2)

    def _build(self, num_blocks: int) -> BlockSchedule:
        _fits("d3", "min", self.min, num_blocks)
        depths = [num_blocks]
        steps = 0 if self.alpha == 1 else math.ceil(math.log(self.min / num_blocks) / math.log(self.alpha)) + 1
        depths += [max(self.min, math.floor(num_blocks * self.alpha**index)) for index in range(1, steps + 1)]
        sets = [bottom_and_top(num_blocks, depth, (depth + 1) // 2) for depth in depths]
        return BlockSchedule.from_sets(num_blocks, prompt=sets[0], generated=sets)

    def __str__(self) -> str:
        return shorthand.spell("d3", self, "alpha")


@dataclass(frozen=True)
class HSD(ScheduleSpec):
    """Hierarchical Skip Decoding (arXiv 2403.14919): the longer the text, the fewer blocks, spread over the depth.

    The abstract says that layers are skipped hierarchically by the current length; stages of equal length, with evenly
    falling depth and blocks that drop out in a fixed order (:func:`spreading_order`), are our reading.

    Args:
        min: blocks in the last stage.
        stages: the first runs all blocks.
        length: tokens until the last stage begins.
    """

    min: int
    stages: int = 4
    length: int = 64

    def __post_init__(self) -> None:
        _at_least("hsd", "min", self.min, 1)
        _at_least("hsd", "stages", self.stages, 2)
        _at_least("hsd", "length", self.length, self.stages - 1)

    def _build(self, num_blocks: int) -> BlockSchedule:
        _fits("hsd", "min", self.min, num_blocks)
        order, sets = spreading_order(num_blocks), []
        for index in range(self.length + 1):
            stage = index * (self.stages - 1) // self.length
            depth = decayed_depth(stage, num_blocks, self.min, self.stages)
            sets.append(sorted(order[:depth]))
        return BlockSchedule.from_sets(num_blocks, prompt=sets[0], generated=sets)

    def __str__(self) -> str:
        return shorthand.spell("hsd", self, "min")


SCHEDULES: dict[str, Form] = {
    "skipdecode": Form(
        SkipDecode, None, {"max": int, "min": int, "speed": float, "warmup": int, "length": int, "prompt": str}
    ),
    "static": Form(Static, "blocks", {"blocks": int, "warmup": int}),
    "unified": Form(Unified, "speed", {"speed": float}),
    "d3": Form(D3, "alpha", {"alpha": float, "min": int}),
    "hsd": Form(HSD, "min", {"min": int, "stages": int, "length": int}),
}
EXAMPLES = "skipdecode:max=9,min=4, skipdecode:speed=2,length=48, static:6, unified:2, d3:0.98, hsd:6"


def parse_schedule(text: str) -> ScheduleSpec:
    """The schedule a string stands for.

    Raises:
        ConfigError: the string is none of the known forms, or its settings contradict each other.
    """
    spec: ScheduleSpec = shorthand.parse(text, SCHEDULES, "Schedule", EXAMPLES)
    return spec


@lru_cache
def _bounds(num_blocks: int, speed: float, warmup: int, length: int) -> tuple[int, int]:
    return bounds_for_speed(num_blocks, speed, warmup, length)


def _at_least(name: str, key: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} has {key}={value}.", hint=f"Set it to {least} or more.")


def _fits(name: str, key: str, value: int, num_blocks: int) -> None:
    if value > num_blocks:
        raise ConfigError(
            f"{name} has {key}={value}, but the model has {num_blocks} blocks.", hint=f"Set it to {num_blocks} or less."
        )
