"""Blocks that run at some positions only: the training graph of schedules such as SkipDecode's.

Where a block does not run, the hidden state passes by unchanged, and the position offers the block's attention no key.
The positions that do run are gathered into a shorter sequence for which masks and rotary tables are harvested anew, so
a skipped position costs nothing. Within a document they must be a prefix: then the positions in the shorter sequence
still go up by one, and causal attention over it is exactly that of cached decoding.

Shape suffixes: ``L`` blocks, ``B`` rows, ``T`` positions, ``K`` gathered positions, ``D`` hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eetrain.backbones.harvest import Harvester


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
        active_LBT: bool; for each block and document a prefix of its positions.
        attention_mask: ``[B, T]``, padded on the right, or ``None``.
        position_ids: ``[B, T]``; restarting at 0 keeps packed documents apart.
    """
    everything = harvester(input_ids, attention_mask=attention_mask, position_ids=position_ids)
    state_BTD = everything.hidden_BTD
    if attention_mask is not None:
        active_LBT = active_LBT & attention_mask.bool()
    for active_BT, blocks in _groups(active_LBT):
        wanted = active_BT if attention_mask is None else active_BT | ~attention_mask.bool()
        if wanted.all():
            state_BTD = harvester.run(everything, state_BTD, blocks)
            continue
        if not active_BT.any():
            continue
        place_BK, valid_BK = _places(active_BT)
        part = harvester(
            input_ids.gather(1, place_BK),
            attention_mask=None if attention_mask is None else _seen(valid_BK).to(attention_mask.dtype),
            position_ids=None if position_ids is None else position_ids.gather(1, place_BK) * valid_BK,
        )
        index_BKD = place_BK[..., None].expand(-1, -1, state_BTD.shape[-1])
        after_BKD = harvester.run(part, state_BTD.gather(1, index_BKD), blocks)
        # Row by row in the same order: fillers of `place_BK` stand behind each row's valid ones.
        state_BTD = state_BTD.masked_scatter(active_BT[..., None], after_BKD[valid_BK])
    return state_BTD


def _groups(active_LBT: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Runs of neighbouring blocks that are active at the same positions, blocks counted from 1."""
    groups: list[tuple[Tensor, list[int]]] = []
    for block, active_BT in enumerate(active_LBT, start=1):
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
