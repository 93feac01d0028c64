"""Tiny random decoders of every supported family, for tests on any machine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

_COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MOE["experts_implementation"] = "eager"  # the default kernel refuses float64

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED},
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, **_MIXED},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, **_MIXED},
    "phi3": {**_GROUPED},
    "gpt2": {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {**_COMMON, "intermediate_size": 48},
    "olmo2": {**_GROUPED},
    "mixtral": {**_GROUPED, **_MOE},
    "qwen3_moe": {**_GROUPED, **_MOE, "head_dim": 8},
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a 4-block model of ``family`` (a key of :data:`FAMILIES`) with ``changes`` applied."""
    return CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model in eval mode, dropout off, with norms and biases moved away from their trivial start.

    Fresh models have unit norms, which would hide a missing or doubled norm.
    """
    config = tiny_config(family, **changes)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.08))
    return model
