"""Blocks that run at some positions only: the training graph of schedules such as SkipDecode's.

Where a block does not run, the hidden state passes by unchanged, and the position offers the block's attention no key.
The positions that do run are gathered into a shorter sequence for which masks and rotary tables are harvested anew, so
a skipped position costs nothing. Within a document they must be a prefix: then the positions in the shorter sequence
still go up by one, and causal attention over it is exactly that of cached decoding.

Shape suffixes: ``L`` blocks, ``B`` rows, ``T`` positions, ``K`` gathered positions, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eetrain.backbones.harvest import Harvest, Harvester


class PartialBlocks:
    """Runs any range of blocks, each at its positions only.

    Args:
        harvester: of the backbone.
        everything: harvest of all positions.
        active_LBT: bool; for each block and document a prefix of its positions.
        attention_mask: ``[B, T]``, padded on the right, or ``None``.
        position_ids: ``[B, T]``; restarting at 0 keeps packed documents apart.
    """

    def __init__(
        self,
        harvester: Harvester,
        everything: Harvest,
        active_LBT: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        self._harvester, self._everything = harvester, everything
        self._mask, self._positions = attention_mask, position_ids
        self._active_LBT = active_LBT if attention_mask is None else active_LBT & attention_mask.bool()
        self._gathered: _Gathered | None = None

    def run(self, state_BTD: Tensor, blocks: Sequence[int]) -> Tensor:
        """Residual stream ``[B, T, D]`` after ``blocks`` (1-based, neighbours, rising)."""
        for active_BT, group in _groups(self._active_LBT, blocks):
            state_BTD = self._run_group(state_BTD, active_BT, group)
        return state_BTD

    def _run_group(self, state_BTD: Tensor, active_BT: Tensor, blocks: Sequence[int]) -> Tensor:
        mask = self._mask
        wanted = active_BT if mask is None else active_BT | ~mask.bool()
        if wanted.all():
            return self._harvester.run(self._everything, state_BTD, blocks)
        if not active_BT.any():
            return state_BTD
        if self._gathered is None or not torch.equal(self._gathered.active_BT, active_BT):
            self._gathered = self._gather(state_BTD, active_BT)
        gathered = self._gathered
        index_BKD = gathered.place_BK[..., None].expand(-1, -1, state_BTD.shape[-1])
        after_BKD = self._harvester.run(gathered.harvest, state_BTD.gather(1, index_BKD), blocks)
        # Row by row in the same order: fillers of `place_BK` stand behind each row's valid ones.
        return state_BTD.masked_scatter(active_BT[..., None], after_BKD[gathered.valid_BK])

    def _gather(self, state_BTD: Tensor, active_BT: Tensor) -> _Gathered:
        place_BK, valid_BK = _places(active_BT)
        harvest = self._harvester(
            inputs_embeds=state_BTD.detach().gather(1, place_BK[..., None].expand(-1, -1, state_BTD.shape[-1])),
            attention_mask=None if self._mask is None else _seen(valid_BK).to(self._mask.dtype),
            position_ids=None if self._positions is None else self._positions.gather(1, place_BK) * valid_BK,
        )
        return _Gathered(active_BT, place_BK, valid_BK, harvest)


@dataclass(frozen=True)
class _Gathered:
    """Where the positions of a shorter sequence come from, and what it hands to its blocks."""

    active_BT: Tensor
    place_BK: Tensor
    valid_BK: Tensor
    harvest: Harvest


def run_partially(
    harvester: Harvester,
    input_ids: Tensor,
    active_LBT: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Residual stream ``[B, T, D]`` after the last block, with block ``l`` run where ``active_LBT[l - 1]`` is true.

    Args:
        harvester: of the backbone.
        input_ids: ``[B, T]``.
        active_LBT: see :class:`PartialBlocks`.
        attention_mask: see :class:`PartialBlocks`.
        position_ids: see :class:`PartialBlocks`.
    """
    everything = harvester(input_ids, attention_mask=attention_mask, position_ids=position_ids)
    partial = PartialBlocks(harvester, everything, active_LBT, attention_mask, position_ids)
    return partial.run(everything.hidden_BTD, range(1, len(active_LBT) + 1))


def _groups(active_LBT: Tensor, blocks: Sequence[int]) -> list[tuple[Tensor, list[int]]]:
    """Runs of neighbouring blocks that are active at the same positions, blocks counted from 1."""
    groups: list[tuple[Tensor, list[int]]] = []
    for block in blocks:
        active_BT = active_LBT[block - 1]
        if groups and torch.equal(groups[-1][0], active_BT):
            groups[-1][1].append(block)
        else:
            groups.append((active_BT, [block]))
    return groups


def _places(active_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's active positions stand ``[B, K]``, and which of these are no fillers."""
    counts = active_BT.sum(1)
    longest = int(counts.max())
    place_BK = torch.argsort(~active_BT, dim=1, stable=True)[:, :longest]
    valid_BK = torch.arange(longest, device=counts.device) < counts[:, None]
    return place_BK, valid_BK


def _seen(valid_BK: Tensor) -> Tensor:
    """``valid_BK``, and one filler in rows without any: attention to no key at all may give NaN gradients."""
    return valid_BK | (torch.arange(valid_BK.shape[1], device=valid_BK.device) == 0)
