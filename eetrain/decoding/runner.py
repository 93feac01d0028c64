"""What every decoding run has: the rows still running, their tokens, positions and cache.

Shape suffixes: ``B`` rows still running, ``R`` rows of one call, ``T`` slots so far, ``V`` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eetrain.backbones import Harvest, Harvester
from eetrain.decoding.cache import SlotCache, Window

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


class Runner(ABC):
    """What runs a model; made by :func:`eetrain.decoding.start`.

    Args:
        model: in eval mode.
        input_ids: prompts ``[B, T]``, left-padded.
        attention_mask: ``[B, T]`` or ``None`` when nothing is padded.
        position_ids: ``[B, T]`` or ``None`` for ``0..T-1``.

    Attributes:
        block_calls: (block, row, slot) triples run so far for generated tokens, recomputation included
            (propagation runs a fraction of a block and is not counted).
    """

    def __init__(
        self,
        model: MultiExitModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        self.model = model
        self.harvester = Harvester(model.backbone, model.anatomy)
        self.cache = SlotCache(model.num_blocks + len(model.exit_layers))
        self.norm, self.projection = model.shared_tail()
        self.ids = input_ids
        self.mask = attention_mask
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        self.positions = position_ids
        self.prompt_slots = input_ids.shape[1]
        self.block_calls = 0

    @abstractmethod
    def prefill(self) -> tuple[Tensor, Tensor]:
        """Run the prompts; return logits ``[B, V]`` and depths ``[B]``."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only; the others have ended."""
        index = torch.tensor(rows, device=self.ids.device)
        self.ids, self.positions = self.ids[index], self.positions[index]
        self.mask = None if self.mask is None else self.mask[index]
        self.cache.keep(index)

    def _harvest(self, window: Window) -> Harvest:
        self.cache.window = window
        rows = slice(None) if window.rows is None else window.rows
        slots = slice(window.first, window.last)
        return self.harvester(
            self.ids[rows, slots],
            attention_mask=None if self.mask is None else self.mask[rows, : window.last],
            position_ids=self.positions[rows, slots],
            cache=self.cache,
        )


class StepRunner(Runner):
    """Runs a model token by token, all rows in step."""

    @abstractmethod
    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Feed one token a row ``[B]``; return the next logits ``[B, V]`` and the depth of each row ``[B]``."""

    def _append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.ids), 1)], dim=1)
