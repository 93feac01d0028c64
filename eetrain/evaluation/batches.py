"""What ``generate`` is given: padded prompts and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eetrain.data.tokenization import TextEncoder

if TYPE_CHECKING:
    from eetrain.exits import MultiExitModel


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids and attention mask ``[B, T]``, all ending in the last column."""
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generate_options(model: MultiExitModel, encoder: TextEncoder, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of ``generate`` for greedy search, end and padding from the tokenizer if the model names none."""
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": encoder.pad_id}
    if model.causal_lm.generation_config.eos_token_id is None and encoder.eos_ids:
        options["eos_token_id"] = encoder.eos_ids[0]
    return options
