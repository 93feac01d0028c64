"""Decoding under a schedule: a batch shares its depth at each position, and no key or value is ever missing.

Shape suffixes: ``B`` rows still running, ``R`` rows of one call, ``T`` slots of the prompt, ``D`` hidden size,
``V`` vocabulary.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eetrain.decoding.cache import Window
from eetrain.decoding.runner import StepRunner
from eetrain.schedules import PROMPT, BlockSchedule

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


class ScheduleRunner(StepRunner):
    """Run the blocks a schedule names; the last block's output gives the logits.

    Args:
        model: in eval mode, with its full depth; its exits are not used.
        schedule: for this model's number of blocks.
        input_ids: prompts ``[B, T]``, left-padded.
        attention_mask: ``[B, T]`` or ``None`` when nothing is padded.
        position_ids: ``[B, T]`` or ``None`` for ``0..T-1``.
    """

    def __init__(
        self,
        model: MultiExitModel,
        schedule: BlockSchedule,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        super().__init__(model, input_ids, attention_mask, position_ids)
        self.schedule = schedule

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Run the prompts; return logits ``[B, V]`` and depths ``[B]``."""
        slots = self.prompt_slots
        harvest = self._harvest(Window(0, slots))
        index_BT = self._index()
        state_BTD = harvest.hidden_BTD
        for reach, blocks in groupby(range(1, self.schedule.num_blocks + 1), lambda b: self.schedule.reach[b - 1]):
            runs_BT = index_BT < reach
            if not runs_BT.any():
                continue
            everywhere = bool(runs_BT.all())
            self.cache.window = Window(0, slots, valid=None if everywhere else runs_BT)
            after_BTD = self.harvester.run(harvest, state_BTD, list(blocks))
            state_BTD = after_BTD if everywhere else torch.where(runs_BT[..., None], after_BTD, state_BTD)
        depths = [self.schedule.depth(index) for index in index_BT[:, -1].tolist()]
        return self._logits(state_BTD), torch.tensor(depths, device=self.ids.device)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Feed one token a row ``[B]``; return the next logits ``[B, V]`` and the depth of each row ``[B]``."""
        self._append(tokens)
        index = self._index()[:, -1].tolist()
        sets = [self.schedule.active(place) for place in dict.fromkeys(index)]
        if len(set(sets)) == 1:
            return self._run(sets[0], None), torch.full_like(tokens, len(sets[0]))
        logits_BV, depth = None, torch.zeros_like(tokens)
        for blocks in dict.fromkeys(sets):
            rows = [row for row, place in enumerate(index) if self.schedule.active(place) == blocks]
            own_RV = self._run(blocks, rows)
            logits_BV = own_RV.new_zeros(len(tokens), own_RV.shape[-1]) if logits_BV is None else logits_BV
            logits_BV[rows], depth[rows] = own_RV, len(blocks)
        assert logits_BV is not None
        return logits_BV, depth

    def _run(self, blocks: tuple[int, ...], rows: list[int] | None) -> Tensor:
        """The newest slot of some rows, or of all, through ``blocks``; logits ``[R, V]``."""
        slots = self.ids.shape[1]
        index = None if rows is None else torch.tensor(rows, device=self.ids.device)
        harvest = self._harvest(Window(slots - 1, slots, index))
        self.block_calls += len(blocks) * (len(self.ids) if rows is None else len(rows))
        return self._logits(self.harvester.run(harvest, harvest.hidden_BTD, blocks))

    def _index(self) -> Tensor:
        """The schedule's index of every slot, ``[B, slots]``; padding counts as prompt."""
        if self.schedule.from_start:
            return self.positions if self.mask is None else self.positions.masked_fill(self.mask == 0, PROMPT)
        index = torch.arange(self.ids.shape[1], device=self.ids.device) - self.prompt_slots
        return index.clamp(min=PROMPT).expand_as(self.ids)

    def _logits(self, state_BTD: Tensor) -> Tensor:
        logits: Tensor = self.projection(self.norm(state_BTD[:, -1:]))[:, -1]
        return logits
