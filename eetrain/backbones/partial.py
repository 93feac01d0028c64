"""Blocks that run at some positions only: the training graph of schedules such as SkipDecode's, and of layer dropout.

Where a block does not run, the hidden state passes by unchanged, and the position offers the block's attention no key.
The rows and positions that do run are gathered into a smaller batch of shorter sequences for which masks and rotary
tables are harvested anew, so what is skipped costs nothing. Within a document the positions must be a prefix: then
those in the shorter sequence still go up by one, and causal attention over it is exactly that of cached decoding.

Shape suffixes: ``L`` blocks, ``B`` rows, ``T`` positions, ``R`` gathered rows, ``K`` gathered positions, ``D`` hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        reach_all: run a block that is active nowhere at one position, and let its output count 0: its parameters get
            gradients of zero, and all processes call the same blocks in the same order.
    """

    def __init__(
        self,
        harvester: Harvester,
        everything: Harvest,
        active_LBT: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        reach_all: bool = False,
    ) -> None:
        self._harvester, self._everything = harvester, everything
        self._mask, self._positions = attention_mask, position_ids
        self._active_LBT = active_LBT if attention_mask is None else active_LBT & attention_mask.bool()
        self._reach_all = reach_all
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
        if active_BT.any():
            gathered = self._gathered_for(state_BTD, active_BT)
            after_RKD = self._harvester.run(gathered.harvest, gathered.take(state_BTD), blocks)
            # Row by row in the same order: fillers of `place_RK` stand behind each row's valid ones.
            return state_BTD.masked_scatter(active_BT[..., None], after_RKD[gathered.valid_RK])
        if not self._reach_all:
            return state_BTD
        first_BT = torch.zeros_like(active_BT)
        first_BT[0, 0] = True
        gathered = self._gathered_for(state_BTD, first_BT)
        after_RKD = self._harvester.run(gathered.harvest, gathered.take(state_BTD.detach()), blocks)
        return count_zero(state_BTD, after_RKD)

    def _gathered_for(self, state_BTD: Tensor, active_BT: Tensor) -> _Gathered:
        if self._gathered is None or not torch.equal(self._gathered.active_BT, active_BT):
            row_R = active_BT.any(1).nonzero().squeeze(1)
            place_RK, valid_RK = _places(active_BT[row_R])
            positions = self._positions
            harvest = self._harvester(
                inputs_embeds=_take(state_BTD.detach(), row_R, place_RK),
                attention_mask=None if self._mask is None else valid_RK.to(self._mask.dtype),
                position_ids=None if positions is None else positions[row_R].gather(1, place_RK) * valid_RK,
            )
            self._gathered = _Gathered(active_BT, row_R, place_RK, valid_RK, harvest)
        return self._gathered


@dataclass(frozen=True)
class _Gathered:
    """Where rows and positions of a smaller batch come from, and what it hands to its blocks."""

    active_BT: Tensor
    row_R: Tensor
    place_RK: Tensor
    valid_RK: Tensor
    harvest: Harvest

    def take(self, state_BTD: Tensor) -> Tensor:
        """The smaller batch ``[R, K, D]``."""
        return _take(state_BTD, self.row_R, self.place_RK)


def count_zero(state: Tensor, *unused: Tensor) -> Tensor:
    """``state`` itself; backward sends zeros into ``unused``, whose parameters so have gradients."""
    result: Tensor = _CountZero.apply(state, *unused)  # type: ignore[no-untyped-call]
    return result


class _CountZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, *unused: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in unused]
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.like)


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


def _take(state_BTD: Tensor, row_R: Tensor, place_RK: Tensor) -> Tensor:
    """Some positions of some rows."""
    return state_BTD[row_R].gather(1, place_RK[..., None].expand(-1, -1, state_BTD.shape[-1]))


def _places(active_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's active positions stand ``[R, K]``, of which it has some, and which of these are no fillers."""
    counts_R = active_RT.sum(1)
    longest = int(counts_R.max())
    place_RK = torch.argsort(~active_RT, dim=1, stable=True)[:, :longest]
    valid_RK = torch.arange(longest, device=counts_R.device) < counts_R[:, None]
    return place_RK, valid_RK
