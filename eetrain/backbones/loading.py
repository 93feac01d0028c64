"""Get a backbone: from a folder or the hub, whole or only its first blocks, or fresh from a configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from eetrain.errors import CheckpointError, ConfigError, UnsupportedModelError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def parse_dtype(name: str | torch.dtype) -> str | torch.dtype:
    """``"auto"`` or the torch type of a name such as ``bfloat16``.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(name, torch.dtype) or name == "auto":
        return name
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not known.", hint=f"One of: auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_backbone(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    depth: int | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Load a causal LM from safetensors, in eval mode.

    Args:
        path: a folder or a hub id; a folder with an adapter instead of weights is loaded as a PEFT wrapper.
        dtype: ``auto`` keeps the stored type.
        depth: load blocks ``1..depth`` only; the rest is never read. The model then has no full depth.
        trust_remote_code: run code that comes with the checkpoint; off unless asked.
        **kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (``attn_implementation``, ``device_map``...).

    Raises:
        CheckpointError: nothing there, a file cut short, weights missing.
        ConfigError: a depth outside the model.
    """
    base = _base_of_adapter(path)
    if base is not None:
        under = load_backbone(base, dtype=dtype, depth=depth, trust_remote_code=trust_remote_code, **kwargs)
        return _with_adapter(under, path)
    config = load_config(path, trust_remote_code=trust_remote_code)
    if depth is not None:
        _limit_depth(config, depth)
    with _reporting_errors(path), _without_partial_load_warning(depth is not None):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=parse_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lost:
        raise CheckpointError(
            f"{path}: {len(lost)} weights of the model are missing or have another shape, first {lost[0]!r}.",
            hint="The checkpoint is incomplete or its config.json is of another model; copy or export it again.",
        )
    backbone: nn.Module = model.eval()
    return backbone


def _base_of_adapter(path: str | Path) -> str | None:
    """The model that the adapter in a folder belongs to; ``None`` if the folder holds weights of its own."""
    settings = Path(path) / "adapter_config.json"
    if not settings.exists() or any(Path(path).glob("model*.safetensors")):
        return None
    with _reporting_errors(path):
        base: str = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base


def _with_adapter(backbone: nn.Module, path: str | Path) -> nn.Module:
    with _reporting_errors(path):
        wrapped: nn.Module = PeftModel.from_pretrained(backbone, path)
        if (Path(path) / "generation_config.json").exists():
            backbone.generation_config = GenerationConfig.from_pretrained(path)
    return wrapped.eval()


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        CheckpointError: no such folder or hub id.
    """
    with _reporting_errors(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def fresh_backbone(config: dict[str, Any], *, dtype: str | torch.dtype = "float32") -> nn.Module:
    """A randomly initialised causal LM, for training from scratch.

    Args:
        config: ``model_type`` and the fields of its transformers configuration.
        dtype: of the parameters.

    Raises:
        ConfigError: no or an unknown ``model_type``, or fields it does not accept.
    """
    fields = dict(config)
    model_type = fields.pop("model_type", None)
    try:
        built = AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"The backbone's configuration does not build: {error}",
            hint="Give model_type (llama, gpt2, ...) and the fields of its transformers configuration.",
        ) from error
    resolved = parse_dtype(dtype)
    kind = torch.float32 if isinstance(resolved, str) else resolved
    model: nn.Module = AutoModelForCausalLM.from_config(built, dtype=kind)
    return model


def _limit_depth(config: Any, depth: int) -> None:
    text = config.get_text_config(decoder=True)
    total = text.num_hidden_layers
    if not 1 <= depth <= total:
        raise ConfigError(f"depth={depth}, but the backbone has blocks 1..{total}.", hint="Leave depth unset for all.")
    if depth == total:
        return
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:depth]
    config.eetrain_full_depth = total


@contextmanager
def _reporting_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, ConfigError, UnsupportedModelError):
        raise
    except Exception as error:
        # Libraries raise OSError, ValueError, SafetensorError and more for a folder that is missing or broken.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"Cannot load a causal language model from {str(path)!r}: {reason}",
            hint="Give a folder with config.json and *.safetensors, or a hub id (which needs a network or a cache).",
        ) from error


@contextmanager
def _without_partial_load_warning(quiet: bool) -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    if quiet:
        transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
