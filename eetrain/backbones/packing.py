"""Packed documents: several in one row, told apart by positions that restart; none may attend to another.

Most families hand the positions to transformers' mask functions, which then keep documents apart. Some (OPT) do not,
and would attend across documents without a word. So the mask is made here, by the same function, and handed over.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from eetrain.backbones.anatomy import Anatomy
from eetrain.errors import UnsupportedModelError

_ATTENTION = {"full_attention", "sliding_attention"}


def packed_mask(decoder: nn.Module, anatomy: Anatomy, position_ids: Tensor, embeds_BTD: Tensor) -> Any:
    """The causal mask ``[B, 1, T, T]`` within documents, in the form the decoder's attention takes.

    Args:
        decoder: the module that embeds ids and runs the blocks.
        anatomy: its parts.
        position_ids: ``[B, T]``; a document starts wherever they do not go up by one.
        embeds_BTD: any tensor with the batch, length, type and device of the decoder's hidden states.

    Returns:
        ``None`` when nothing is packed, or when the decoder itself keeps documents apart: with sliding windows there
        are several masks, and every such family hands its positions on; flash attention reads the positions.

    Raises:
        UnsupportedModelError: positions do not tell documents apart in this family (ALiBi, recurrent blocks).
    """
    if position_ids.is_meta or find_packed_sequence_indices(position_ids) is None:
        return None
    config: Any = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ())
    if not anatomy.takes_position_ids or getattr(config, "alibi", False) or kinds - _ATTENTION:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} cannot keep packed documents apart: its blocks do not go by position ids.",
            hint="Turn packing off, so that every row holds one document.",
        )
    if "sliding_attention" in kinds or getattr(config, "sliding_window", None) is not None:
        return None
    return create_causal_mask(
        config=config,
        inputs_embeds=embeds_BTD,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )
