"""Fine-tuning a decoder for a schedule of depths fixed in advance (SkipDecode).

Shape suffixes: ``B`` rows, ``T`` positions, ``L`` blocks, ``S`` documents of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from eetrain import schedules
from eetrain.errors import ConfigError
from eetrain.objectives.linear_ce import Kernel
from eetrain.objectives.objective import FULL, Unreached
from eetrain.objectives.text_positions import generated_index, row_positions
from eetrain.objectives.weighted_sum import WeightedSum
from eetrain.schedules import PROMPT, BlockSchedule, parse_schedule

TrainDepth = Literal["schedule", "random"]
_NUM_SPEEDS = 16


class SkipDecode(WeightedSum):
    """``CE`` of the last block's output, where each position has run only the blocks its schedule gives it.

    SkipDecode (arXiv 2307.02628): the backbone learns to predict with the blocks that decoding under the same schedule
    runs. There is one loss, as every path ends in the last block. The graph is that of cached decoding: a block runs
    on the positions where it is active, and sees keys of these only. Any schedule string will do.

    With ``train_depth="random"`` every document draws a speed, evenly in 1 / speed, from a grid between ``speeds``, and
    the schedule is SkipDecode's for that speed: one model for all of them. Validation then runs the schedule given.

    Example::

        SkipDecode("skipdecode:max=8,min=4,length=32")

    Args:
        schedule: what decoding will run, written as for ``eetrain generate --policy``.
        train_depth: ``schedule``: exactly that; ``random``: see above.
        speeds: slowest and fastest, for ``random``.
        prompt_tokens: for plain text, which has no prompt: take a document's first so many tokens as one.
        kernel: ``"cce"`` uses the cut-cross-entropy GPU kernels for steps that ask for no statistics.

    Raises:
        ConfigError: a schedule that does not parse, or settings that contradict each other.
    """

    unreached: Unreached = "blocks rest"

    def __init__(
        self,
        schedule: str,
        train_depth: TrainDepth = "schedule",
        speeds: tuple[float, float] = (1.5, 4.0),
        prompt_tokens: int | None = None,
        kernel: Kernel = "torch",
    ) -> None:
        super().__init__(kernel=kernel)
        self.spec = parse_schedule(schedule)
        self.schedule = str(self.spec)
        self.train_depth, self.speeds, self.prompt_tokens = train_depth, speeds, prompt_tokens
        self._check()
        self._schedule: BlockSchedule | None = None
        self._reach_SL = torch.empty(0)

    def needs_full_depth(self) -> bool:
        """Always: every path ends in the last block."""
        return True

    def bind(self, exit_layers: Sequence[int], num_blocks: int) -> None:
        """Build the schedule for the model, which must have no exits; see :meth:`Objective.bind`."""
        super().bind(exit_layers, num_blocks)
        if self.exit_layers:
            raise ConfigError(
                f"SkipDecode trains the last block's output only, but there are exits after blocks "
                f"{list(self.exit_layers)}.",
                hint="Set model.exits.layers=[].",
            )
        self._schedule = self.spec.build(num_blocks)
        if self._schedule.from_start and self.prompt_tokens is not None:
            raise ConfigError(
                f"prompt_tokens={self.prompt_tokens}, but the schedule {self.spec} begins at the start of the text.",
                hint="Leave prompt_tokens out, or use prompt=max or full.",
            )
        drawn = [self._schedule] if self.train_depth == "schedule" else self._range(num_blocks)
        self._reach_SL = torch.tensor([schedule.reach for schedule in drawn])

    def active_blocks(
        self, labels_BT: Tensor, position_ids: Tensor | None = None, *, step: int, training: bool = True
    ) -> Tensor | None:
        """Where each block runs, bool ``[L, B, T]``; see :meth:`Objective.active_blocks`."""
        assert self._schedule is not None, "bind the objective to a model first"
        if position_ids is None:
            position_ids = row_positions(labels_BT)
        index_BT, document_BT = generated_index(labels_BT, position_ids, self.prompt_tokens)
        if self._schedule.from_start:
            index_BT = position_ids
        if training and self.train_depth == "random":
            reach_SL = self._reach_SL.to(labels_BT.device)
            drawn_S = torch.randint(len(reach_SL), (int(document_BT.max()) + 1,)).to(labels_BT.device)
            return index_BT < reach_SL[drawn_S[document_BT]].permute(2, 0, 1)
        reach_L = torch.tensor(self._schedule.reach, device=labels_BT.device)
        return index_BT < reach_L[:, None, None]

    def idle_blocks(self) -> tuple[int, ...]:
        """Blocks that the schedule never runs."""
        most_L = self._reach_SL.max(0).values.tolist()
        return tuple(block for block, reach in enumerate(most_L, start=1) if reach <= PROMPT)

    def exit_policy(self) -> str | None:
        """The schedule trained for."""
        return self.schedule

    def depth_weights(self, step: int) -> dict[int, float]:
        """The full depth alone; see :meth:`Objective.depth_weights`."""
        return {FULL: 1.0}

    def _range(self, num_blocks: int) -> list[BlockSchedule]:
        """Schedules at speeds whose mean depths are evenly spaced, fastest first: if one does not fit, that one."""
        assert isinstance(self.spec, schedules.SkipDecode)
        slow, fast = self.speeds
        shares = [1 / fast + (1 / slow - 1 / fast) * place / (_NUM_SPEEDS - 1) for place in range(1, _NUM_SPEEDS - 1)]
        # The ends as they were given: the inverse of an inverse may be too fast by a rounding error.
        speeds = (fast, *(1 / share for share in shares), slow)
        return [replace(self.spec, max=None, min=None, speed=speed).build(num_blocks) for speed in speeds]

    def _check(self) -> None:
        if self.train_depth not in get_args(TrainDepth):
            raise ConfigError(f"train_depth={self.train_depth!r} is not known.", hint="One of: schedule, random.")
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise ConfigError(f"prompt_tokens={self.prompt_tokens}.", hint="Set it to 1 or more, or leave it out.")
        slow, fast = self.speeds
        if not 1 <= slow < fast:
            raise ConfigError(f"speeds={list(self.speeds)}.", hint="Give two rising numbers from 1 on: [1.5, 4].")
        if self.train_depth == "random" and not isinstance(self.spec, schedules.SkipDecode):
            raise ConfigError(
                f"train_depth=random draws SkipDecode schedules, but schedule={str(self.spec)!r}.",
                hint="Give a skipdecode schedule, whose warmup, length and prompt all of them take.",
            )
