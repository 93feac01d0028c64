"""Exit heads: hidden state to features that an output matrix turns into logits.

Shape suffixes: ``B`` batch, ``T`` positions, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from eetrain.backbones import (
    Anatomy,
    Call,
    Harvester,
    Projection,
    blocks_of,
    call_block,
    causal_lm_of,
    final_norm,
    output_projection,
)
from eetrain.backbones.recorder import Tap
from eetrain.errors import ConfigError, UnsupportedModelError
from eetrain.exits.config import ExitConfig


class ExitHead(nn.Module):
    """The parts of one exit that are its own; what is shared stays in the backbone and is passed in.

    Args:
        inner: ``mlp`` or ``block`` in front of the norm, or ``None``.
        norm: a norm of its own, or ``None`` for the backbone's.
        output: an output matrix of its own, or ``None`` for the backbone's.
        attends: whether ``inner`` has attention and so keys and values of its own.
    """

    def __init__(
        self, inner: nn.Module | None, norm: nn.Module | None, output: nn.Linear | None, attends: bool
    ) -> None:
        super().__init__()
        self.inner = inner
        self.norm = norm
        self.output = output
        self.attends = attends

    def forward(self, hidden_BTD: Tensor, call: Call, shared_norm: nn.Module) -> Tensor:
        """Features ``[B, T, D]`` ready for the output matrix.

        Args:
            hidden_BTD: residual stream after the exit's block, not normed.
            call: harvested arguments of the block ``inner`` was copied from.
            shared_norm: the backbone's final norm.
        """
        if self.inner is not None:
            hidden_BTD = call_block(self.inner, hidden_BTD, call)
        normed: Tensor = (shared_norm if self.norm is None else self.norm)(hidden_BTD)
        return normed

    def projection(self, shared: Projection) -> Projection:
        """The map to logits: the backbone's scaling with this exit's matrix, or the backbone's own."""
        if self.output is None:
            return shared
        return replace(shared, weight=self.output.weight, bias=self.output.bias)


def build_head(backbone: nn.Module, anatomy: Anatomy, config: ExitConfig, layer: int, cache_index: int) -> ExitHead:
    """Build the head of the exit after block ``layer``, copying its start from the backbone.

    Args:
        backbone: where to copy from; not modified.
        anatomy: its parts.
        config: resolved exit settings.
        layer: the exit's block, from 1.
        cache_index: where a head with attention keeps its keys and values in a cache.
    """
    if config.head == "tied":
        return ExitHead(None, None, None, attends=False)
    inner = None
    if config.head == "mlp":
        inner = _mlp_of_block(backbone, anatomy, layer)
    elif config.head == "block":
        inner = _plain_copy(blocks_of(backbone, anatomy)[anatomy.num_blocks - 1])
        _set_cache_index(inner, cache_index)
    norm = copy.deepcopy(final_norm(backbone, anatomy))
    output = _own_matrix(backbone, anatomy) if config.output == "own" else None
    head = ExitHead(inner, norm, output, attends=config.head == "block")
    head.requires_grad_(True)
    if config.head == "norm" and output is None and not any(True for _ in norm.parameters()):
        raise ConfigError(
            "exits.head=norm with a tied matrix: this backbone's final norm has no parameters to train.",
            hint="Set exits.output=own, or exits.head=mlp.",
        )
    return head


def _own_matrix(backbone: nn.Module, anatomy: Anatomy) -> nn.Linear:
    shared = output_projection(backbone, anatomy)
    rows, width = shared.weight.shape
    linear = nn.Linear(width, rows, bias=shared.bias is not None, device="meta")
    linear.weight = nn.Parameter(shared.weight.detach().clone())
    if shared.bias is not None:
        linear.bias = nn.Parameter(shared.bias.detach().clone())
    return linear


def _plain_copy(block: nn.Module) -> nn.Module:
    """A copy without adapters: LoRA layers are merged into the weights they adapt."""
    copied = copy.deepcopy(block)
    for path, module in list(copied.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            parent, _, name = path.rpartition(".")
            setattr(copied.get_submodule(parent), name, module.base_layer)
    return copied


def _set_cache_index(block: nn.Module, index: int) -> None:
    for module in block.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]


class _NoAttention(nn.Module):
    """Adds nothing to the residual stream, in the shape the block expects of its attention."""

    def __init__(self, num_outputs: int | None) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return zeros if self.num_outputs is None else (zeros, *(None for _ in range(self.num_outputs - 1)))


def _mlp_of_block(backbone: nn.Module, anatomy: Anatomy, layer: int) -> nn.Module:
    """A copy of block ``layer`` without its attention: ``h + MLP(N(h))`` in whatever form the family gives it."""
    block = _plain_copy(blocks_of(backbone, anatomy)[layer - 1])
    names = [name for name, child in block.named_children() if hasattr(child, "layer_idx")]
    if len(names) != 1:
        raise UnsupportedModelError(
            f"exits.head=mlp: {type(block).__name__} has {len(names)} parts that look like attention.",
            hint="Use exits.head=norm or exits.head=block with this family.",
        )
    example, call = _example(backbone, anatomy, layer)
    try:
        _silence_attention(block, names[0], example, call)
        _drop_idle_children(block, example, call)
    except RuntimeError as error:
        if not example.is_meta:
            raise
        raise UnsupportedModelError(
            f"exits.head=mlp runs the block once, but {type(block).__name__} needs values that the meta device lacks.",
            hint="Load the weights first, or use another head.",
        ) from error
    return block


def _silence_attention(block: nn.Module, name: str, example: Tensor, call: Call) -> None:
    """Put nothing in the place of the attention ``name``, in the shape of what it returned."""
    tap = Tap(getattr(block, name))
    setattr(block, name, tap)
    with torch.no_grad():
        call_block(block, example, call)
    setattr(block, name, _NoAttention(len(tap.output) if isinstance(tap.output, tuple) else None))


def _example(backbone: nn.Module, anatomy: Anatomy, layer: int) -> tuple[Tensor, Call]:
    ids = torch.ones(1, 2, dtype=torch.long, device=next(backbone.parameters()).device)
    with torch.no_grad():
        # Embeddings, not ids: some families look for padding among ids, which have no values on the meta device.
        embeds = causal_lm_of(backbone).get_input_embeddings()(ids)  # type: ignore[operator]
        harvest = Harvester(backbone, anatomy)(inputs_embeds=embeds, cache=DynamicCache() if ids.is_meta else None)
    return harvest.hidden_BTD.detach(), harvest.calls[layer - 1]


def _drop_idle_children(block: nn.Module, example: Tensor, call: Call) -> None:
    """Replace children whose parameters take no part (the norm that fed the attention) by identities."""
    block.requires_grad_(True)
    with torch.enable_grad():
        call_block(block, example, call).sum().backward()  # type: ignore[no-untyped-call]
    for name, child in list(block.named_children()):
        parameters = list(child.parameters())
        if parameters and all(parameter.grad is None for parameter in parameters):
            setattr(block, name, nn.Identity())
    block.zero_grad(set_to_none=True)
