"""Where the tokens of a training batch would stand if they were generated.

Shape suffixes: ``B`` rows, ``T`` positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eetrain.objectives.linear_ce import IGNORE_INDEX
from eetrain.schedules import PROMPT


def generated_index(
    labels_BT: Tensor, position_ids: Tensor | None = None, prompt_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Index of each token among the generated ones of its document, and its document.

    The first scored token of a document is the first generated one and has index 0; all before it has index -1. So the
    index is that of the token *fed in*, as in decoding.

    Args:
        labels_BT: aligned with the input ids, -100 where nothing is scored.
        position_ids: ``[B, T]``, restarting at 0 with every packed document; ``None``: one document a row.
        prompt_tokens: where the whole document is scored: take its first so many tokens as the prompt.

    Returns:
        The index and a document number that is unique in the batch, both int64 ``[B, T]``.
    """
    rows, length = labels_BT.shape
    if position_ids is None:
        position_ids = row_positions(labels_BT)
    starts_BT = position_ids == 0
    starts_BT = starts_BT.index_fill(1, starts_BT.new_zeros(1, dtype=torch.int64), True)
    document_BT = starts_BT.flatten().cumsum(0).view(rows, length) - 1
    never = torch.full_like(position_ids, length)
    first_BT = torch.where(labels_BT != IGNORE_INDEX, position_ids, never)
    first_of_document = never.flatten().clone().scatter_reduce_(0, document_BT.flatten(), first_BT.flatten(), "amin")
    begin_BT = first_of_document[document_BT]
    if prompt_tokens is not None:
        begin_BT = begin_BT.clamp(min=prompt_tokens)
    index_BT = position_ids - begin_BT
    return torch.where(index_BT < 0, PROMPT, index_BT), document_BT


def row_positions(labels_BT: Tensor) -> Tensor:
    """Position ids ``[B, T]`` of batches with one document a row, padded on the right."""
    return torch.arange(labels_BT.shape[1], device=labels_BT.device).expand_as(labels_BT)
