"""Rows of unequal length: their tokens by slot, their cache, and what blocks are called with over a window of them.

A row's tokens lie in the slots from the prompt's first on, without gaps. Nothing is cropped: slots behind a row's end
are written anew before they are seen.

Shape suffixes: ``B`` rows, ``T`` slots of the prompt, ``N`` slots, ``C`` columns, ``W`` positions of a window,
``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eetrain.backbones import Harvest, Harvester, check_ragged, decoder_of
from eetrain.decoding.cache import SlotCache
from eetrain.errors import UnsupportedModelError

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


class RaggedRows:
    """The rows of a run.

    Args:
        model: in eval mode.
        cache: of the run.
        input_ids: prompts ``[B, T]``, left-padded.
        attention_mask: ``[B, T]`` or ``None`` when nothing is padded.
        positions: ``[B, T]``.

    Attributes:
        config: the decoder's.
        dtype: of hidden states.
        ids: tokens by slot ``[B, N]``, with room behind each row's end.
        visible: false for padding, ``[B, N]``.
        complete: slots of each row that all blocks have run over.
        newest: the token of each row behind these.
        block_calls: (block, row, slot) triples run so far.

    Raises:
        UnsupportedModelError: the backbone cannot run rows of unequal length.
    """

    def __init__(
        self,
        model: MultiExitModel,
        cache: SlotCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
    ) -> None:
        self.model, self.cache, self.ids = model, cache, input_ids
        self.config: Any = decoder_of(model.backbone, model.anatomy).config
        check_ragged(self.config)
        if not model.anatomy.takes_position_ids:
            raise UnsupportedModelError(
                f"{type(model.causal_lm).__name__} takes no position ids, which rows of unequal length need.",
                hint="Use another policy.",
            )
        rows, slots = input_ids.shape
        self.dtype = next(model.backbone.parameters()).dtype
        self.visible = input_ids.new_ones(rows, slots).bool() if attention_mask is None else attention_mask.bool()
        self.complete = [slots] * rows
        self.newest = [0] * rows
        self.block_calls = 0
        self._offset_B1 = positions[:, -1:] - (slots - 1)
        self._limit: int | None = getattr(self.config, "max_position_embeddings", None)
        self._norm, self._projection = model.shared_tail()
        self._harvesters: dict[int, Harvester] = {}

    def keep(self, rows: list[int], index: Tensor) -> None:
        """Go on with these rows only, named twice."""
        self.ids, self.visible, self._offset_B1 = self.ids[index], self.visible[index], self._offset_B1[index]
        self.complete = [self.complete[row] for row in rows]
        self.newest = [self.newest[row] for row in rows]

    def reserve(self, slots: int) -> None:
        """Make room for tokens up to slot ``slots``."""
        missing = slots - self.ids.shape[1]
        if missing > 0:
            rows, grown = self.ids.shape[0], max(missing, self.ids.shape[1])
            self.ids = torch.cat([self.ids, self.ids.new_zeros(rows, grown)], dim=1)
            self.visible = torch.cat([self.visible, self.visible.new_ones(rows, grown)], dim=1)

    def positions_in(self, slot_BC: Tensor) -> Tensor:
        """Position ids of slots; those beyond the model's positions, which no token keeps, get the last one."""
        positions = slot_BC + self._offset_B1
        return positions if self._limit is None else positions.clamp(max=self._limit - 1)

    def harvester_to(self, depth: int) -> Harvester:
        """Harvests for blocks ``1..depth``."""
        attends = depth in self.model.exit_layers and self.model.head(depth).attends
        depth = self.model.num_blocks if attends else depth  # its block was copied from the last one
        if depth not in self._harvesters:
            self._harvesters[depth] = Harvester(self.model.backbone, self.model.anatomy, depth)
        return self._harvesters[depth]

    def features(self, layer: int, state_BWD: Tensor, harvest: Harvest) -> Tensor:
        """States behind exit ``layer``, through its head up to the output matrix."""
        features_BWD: Tensor = self.model.head(layer)(state_BWD, self.model.head_call(layer, harvest), self._norm)
        return features_BWD

    def exit_logits(self, layer: int, features_BWD: Tensor) -> Tensor:
        """Raw logits ``[B, W, V]`` of exit ``layer``."""
        return self.model.head(layer).projection(self._projection)(features_BWD)

    def full_logits(self, state_BWD: Tensor) -> Tensor:
        """Raw logits ``[B, W, V]`` of the full depth."""
        return self._projection(self._norm(state_BWD))
