"""Router logits of mixture-of-experts backbones, and the auxiliary loss transformers computes from them.

transformers declares which modules are routers (``_can_record_outputs``) and ships the loss beside the model; both
are used as they are, so that the loss equals the model's own with ``output_router_logits=True``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eetrain.backbones.anatomy import Anatomy, causal_lm_of, decoder_of
from eetrain.errors import ConfigError


def has_routers(backbone: nn.Module) -> bool:
    """Whether ``backbone`` is a mixture of experts with an auxiliary loss."""
    model = causal_lm_of(backbone)
    return getattr(model.config, "router_aux_loss_coef", None) is not None and _loss_function(model) is not None


@contextmanager
def record_routers(backbone: nn.Module, anatomy: Anatomy, *, enabled: bool = True) -> Iterator[list[Tensor]]:
    """Collect the router logits ``[tokens, experts]`` of all blocks run inside, in order.

    Nothing is collected from a dense model, or if not enabled.

    Forward hooks are on the routers inside the context only. Under activation checkpointing the recomputation runs
    outside it, so nothing is counted twice.

    Raises:
        ConfigError: reentrant checkpoints, which run blocks without autograd: the loss would have no gradient.
    """
    collected: list[Tensor] = []
    trains = torch.is_grad_enabled()
    handles = []
    if enabled and has_routers(backbone):
        spec = _router_spec(decoder_of(backbone, anatomy))
        kind, index = (spec, 0) if isinstance(spec, type) else (spec.target_class, spec.index)

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if trains and not torch.is_grad_enabled():
                raise ConfigError(
                    "The router loss gets no gradient under reentrant activation checkpointing (use_reentrant=True).",
                    hint='gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).',
                )
            collected.append(output[index] if isinstance(output, tuple) else output)

        handles = [m.register_forward_hook(keep) for m in backbone.modules() if isinstance(m, kind)]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def router_loss(backbone: nn.Module, router_logits: list[Tensor], attention_mask: Tensor | None) -> Tensor | None:
    """The load-balancing loss times its coefficient, or ``None`` without routers (Fedus et al. 2021, eq. 4-6).

    Args:
        backbone: the model whose config holds the number of experts and the coefficient.
        router_logits: one ``[tokens, experts]`` tensor a block, from :func:`record_routers`.
        attention_mask: ``[B, T]`` or ``None``; padding does not count.
    """
    if not router_logits:
        return None
    model = causal_lm_of(backbone)
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    loss_function = _loss_function(model)
    assert loss_function is not None
    loss = loss_function(tuple(router_logits), experts, config.num_experts_per_tok, attention_mask)  # type: ignore[union-attr]
    weighted: Tensor = config.router_aux_loss_coef * loss  # type: ignore[union-attr]
    return weighted


def _router_spec(decoder: nn.Module) -> Any:
    specs: dict[str, Any] = getattr(decoder, "_can_record_outputs", None) or {}
    return specs["router_logits"]


def _loss_function(model: nn.Module) -> Any:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
