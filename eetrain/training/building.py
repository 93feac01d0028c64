"""From settings to a model that is ready to train: loaded, with exits, frozen or adapted as asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from eetrain.backbones import blocks_of, causal_lm_of, final_norm
from eetrain.backbones.loading import fresh_backbone, load_backbone, load_config
from eetrain.errors import ConfigError
from eetrain.exits import ExitConfig, MultiExitModel
from eetrain.training.settings import BackboneConfig, LoraSettings, ModelSettings


def build_model(settings: ModelSettings) -> MultiExitModel:
    """Load or initialise the backbone, attach fresh exits, then freeze it or add adapters.

    Exits come before adapters: heads start as plain copies of the backbone's weights.

    Raises:
        CheckpointError: the backbone cannot be loaded.
        ConfigError: exits or adapters that do not fit the backbone.
    """
    backbone, exits = _backbone(settings.backbone, settings.exits)
    return adapt(MultiExitModel(backbone, exits), settings)


def adapt(model: MultiExitModel, settings: ModelSettings) -> MultiExitModel:
    """Freeze the backbone of ``model`` or give it adapters, in place, and return it."""
    if settings.tuning == "frozen":
        model.backbone.requires_grad_(False)
    elif settings.tuning == "lora":
        model.backbone = _with_lora(model.backbone, settings.lora)
    return model


def vocabulary_size(config: BackboneConfig) -> int | None:
    """Rows of the backbone's embedding, without loading it; ``None`` if the configuration does not say."""
    if config.config is not None:
        size = config.config.get("vocab_size")
    else:
        assert config.path is not None
        text = load_config(config.path, trust_remote_code=config.trust_remote_code).get_text_config(decoder=True)
        size = getattr(text, "vocab_size", None)
    return None if size is None else int(size)


def freeze_idle(model: MultiExitModel, *, full_depth: bool, idle_blocks: Sequence[int] = ()) -> None:
    """Take parameters that no loss reaches out of training, in place.

    Without the full depth these are the blocks after the deepest exit, and the final norm and output matrix where no
    exit uses them. Training on several processes would otherwise wait for their gradients.

    Args:
        model: with its exits.
        full_depth: whether the last block's output has a loss.
        idle_blocks: blocks that never run, from 1.
    """
    for layer in idle_blocks:
        blocks_of(model.backbone, model.anatomy)[layer - 1].requires_grad_(False)
    if full_depth:
        return
    heads = [model.head(layer) for layer in model.exit_layers]
    deepest = max(model.exit_layers, default=0)
    for block in blocks_of(model.backbone, model.anatomy)[deepest:]:
        block.requires_grad_(False)
    if all(head.norm is not None for head in heads):
        final_norm(model.backbone, model.anatomy).requires_grad_(False)
    lm = causal_lm_of(model.backbone)
    matrix = lm.get_submodule(model.anatomy.head)
    embedding = lm.get_input_embeddings()  # type: ignore[operator]
    if all(head.output is not None for head in heads) and matrix.weight is not embedding.weight:
        matrix.requires_grad_(False)


def _backbone(config: BackboneConfig, exits: ExitConfig) -> tuple[nn.Module, ExitConfig]:
    extra: dict[str, Any] = {}
    if config.attn_implementation is not None:
        extra["attn_implementation"] = config.attn_implementation
    if config.config is not None:
        return fresh_backbone({**config.config, **extra}, dtype=config.dtype), exits
    assert config.path is not None
    if config.load == "exits":
        stored = load_config(config.path, trust_remote_code=config.trust_remote_code)
        exits = exits.resolved(stored.get_text_config(decoder=True).num_hidden_layers)
        extra["depth"] = max(exits.layers or [1])
    model = load_backbone(config.path, dtype=config.dtype, trust_remote_code=config.trust_remote_code, **extra)
    return model, exits


def _with_lora(backbone: nn.Module, lora: LoraSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        adapted: nn.Module = get_peft_model(backbone, config)
    except ValueError as error:
        raise ConfigError(
            f"model.lora does not fit the backbone: {error}",
            hint="Set model.lora.target_modules to all-linear, or to names of linear maps of this family.",
        ) from error
    return adapted


def resolved_settings(settings: ModelSettings, model: MultiExitModel) -> ModelSettings:
    """The settings with exits as explicit layers, so that a checkpoint names them."""
    return replace(settings, exits=model.config)
