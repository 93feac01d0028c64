"""Attention masks for rows that have got unequally far: each row's window begins at a slot of its own.

transformers' mask functions give all rows one offset. Here every row has one, and the masks are made by the same
interface, so that they come in the form the attention implementation takes, and handed to the model ready-made.

Shape suffixes: ``B`` rows, ``W`` positions of a window, ``N`` key slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from eetrain.errors import UnsupportedModelError

IMPLEMENTATIONS = ("sdpa", "eager")
Masks = Tensor | dict[str, Tensor]


def check_ragged(config: Any) -> None:
    """Find out whether masks of this kind can be handed to a decoder.

    Args:
        config: the decoder's.

    Raises:
        UnsupportedModelError: its attention takes no mask.
    """
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"Rows of unequal length need a mask of their own, which attn_implementation="
            f"{config._attn_implementation!r} does not take.",
            hint=f"Load the model with attn_implementation one of {', '.join(IMPLEMENTATIONS)}.",
        )


def ragged_masks(config: Any, first_B: Tensor, width: int, visible_BN: Tensor, dtype: torch.dtype) -> Masks:
    """Causal masks ``[B, 1, W, N]`` for windows that begin at ``first_B``, one for each kind of attention.

    Position ``w`` of row ``b`` stands in slot ``first_B[b] + w`` and sees the visible slots up to its own, with sliding
    attention only the last ``config.sliding_window`` of them.

    Args:
        config: the decoder's.
        first_B: int64.
        width: ``W``.
        visible_BN: bool, false for padding.
        dtype: of the hidden states.

    Returns:
        What a decoder takes as ``attention_mask``: by kind where its config has ``layer_types``, else one mask.
    """
    rows, slots = visible_BN.shape
    make = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]

    def masks(window: int | None) -> Tensor:
        mask: Tensor = make(
            batch_size=rows,
            q_length=width,
            kv_length=slots,
            mask_function=_seen(first_B, visible_BN, window),
            allow_is_causal_skip=False,
            dtype=dtype,
            device=visible_BN.device,
            config=config,
        )
        return mask

    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return masks(sliding)
    return {kind: masks(sliding if kind == "sliding_attention" else None) for kind in dict.fromkeys(kinds)}


def narrowed(masks: Masks, start: int, width: int, slots: int) -> Masks:
    """The part of ``masks`` for ``width`` positions of the windows from ``start`` on, over the first ``slots`` keys."""
    if isinstance(masks, dict):
        return {kind: mask[:, :, start : start + width, :slots] for kind, mask in masks.items()}
    return masks[:, :, start : start + width, :slots]


def picked(masks: Masks, place_BW: Tensor, slots: int) -> Masks:
    """The part of ``masks`` for the places ``place_BW`` of each row's window, over the first ``slots`` keys."""
    if isinstance(masks, dict):
        return {kind: _picked(mask, place_BW, slots) for kind, mask in masks.items()}
    return _picked(masks, place_BW, slots)


def _picked(mask_B1WN: Tensor, place_BW: Tensor, slots: int) -> Tensor:
    row_B1 = torch.arange(len(place_BW), device=place_BW.device)[:, None]
    return mask_B1WN[row_B1, 0, place_BW, :slots][:, None]


def _seen(first_B: Tensor, visible_BN: Tensor, window: int | None) -> Callable[..., Tensor]:
    def seen(row: Tensor, head: Tensor, position: Tensor, slot: Tensor) -> Tensor:
        own = first_B[row] + position
        found = (slot <= own) & visible_BN[row, slot]
        return found if window is None else found & (slot > own - window)

    return seen
