"""Models to plan for without their weights: known shapes by name, any other by its configuration."""

from __future__ import annotations

import json
from typing import Any

import torch

from eetrain.backbones.loading import fresh_backbone, load_config
from eetrain.errors import CheckpointError, ConfigError
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.planning.memory import Precision
from eetrain.training.building import adapt, freeze_idle
from eetrain.training.settings import BackboneConfig, LoraSettings, ModelSettings, Tuning

_LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
    "llama-3-70b": {
        **_LLAMA,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
    },
    "llama-3.1-405b": {
        **_LLAMA,
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 53248,
        "vocab_size": 128256,
    },
}


def find_config(name: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The configuration behind a name: of :data:`SHAPES`, a folder or a hub id.

    Raises:
        CheckpointError: nothing of that name.
    """
    if name in SHAPES:
        return dict(SHAPES[name])
    try:
        found = load_config(name, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        failed = error
    else:
        return _fields(found)
    # Outside of the handler: the command line shows the error at the root of a chain.
    raise CheckpointError(failed.message, hint=f"{failed.hint} Shapes by name: {', '.join(SHAPES)}.")


def _fields(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.get_text_config(decoder=True).to_json_string(use_diff=False))
    return fields


def hollow_model(
    config: dict[str, Any],
    exits: ExitConfig,
    *,
    precision: Precision = "bfloat16",
    tuning: Tuning = "full",
    full_depth: bool = True,
) -> MultiExitModel:
    """A model on the meta device, as a run with these settings would train it.

    Args:
        config: ``model_type`` and the fields of its transformers configuration.
        exits: its exits.
        precision: of all parameters.
        tuning: what of the backbone is trained: ``full``, ``frozen`` or ``lora`` with the default adapters.
        full_depth: whether the full depth has a loss; if not, what no loss reaches is not trained.

    Raises:
        ConfigError: a configuration that does not build, exits that do not fit it, or nothing to train.
        UnsupportedModelError: a backbone that eetrain cannot follow.
    """
    settings = ModelSettings(BackboneConfig(config=config), exits, tuning, LoraSettings())
    with torch.device("meta"):
        backbone = fresh_backbone(config, dtype=precision)
    model = MultiExitModel(backbone, exits)
    with torch.device("meta"):
        adapt(model, settings)
    freeze_idle(model, full_depth=full_depth)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "There is nothing to train: the backbone is frozen and the exits have no parameters.",
            hint="Set tuning to full or lora, or give exits with parameters of their own.",
        )
    return model
