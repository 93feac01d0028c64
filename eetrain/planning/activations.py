"""What autograd keeps of every piece for its backward pass, counted by running it on the meta device.

Shapes and types are those of the real pass, so the count is exact up to what a kernel keeps inside: scaled dot-product
attention is taken to be a flash kernel, which keeps queries, keys, values, its output and a number for each query, but
no copy of a mask; grouped products of experts keep their input. Eager attention keeps its scores, as on any device.

Shape suffixes: ``B`` rows (1 here), ``T`` positions, ``D`` hidden size, ``H`` heads, ``K`` width of a head,
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache, DynamicCache

from eetrain.backbones import Call, Harvest, Harvester, Projection, blocks_of, call_block
from eetrain.errors import UnsupportedModelError
from eetrain.exits import MultiExitModel
from eetrain.planning.costs import PieceCost


@dataclass(frozen=True)
class PieceActivations:
    """What one piece keeps from its forward to its backward pass.

    Attributes:
        own: bytes a row, without the hidden state it was given.
        keeps_input: whether that hidden state is kept as well.
        vocabulary: logits of a token, for exits and the tail; 0 for others.
        logit_bytes: what one logit takes while its chunk lives.
        matrix_gradient: bytes of the gradient of its output matrix while the loss is computed; not per row.
    """

    own: int
    keeps_input: bool
    vocabulary: int = 0
    logit_bytes: int = 0
    matrix_gradient: int = 0


def saved_activations(model: MultiExitModel, costs: Iterable[PieceCost], length: int) -> tuple[PieceActivations, ...]:
    """What every piece keeps, for rows of ``length`` tokens.

    Parameters and what all blocks are handed (masks, rotary tables) are not counted, nor are ids; a piece without
    backward pass keeps nothing. Exits and the tail run within the backward step, from a hidden state that is kept for
    them; their logits live for one chunk, in float32 beside a copy in 16-bit types, and twice with a soft cap. The
    gradient of a trained output matrix is summed in float32 before it is cast.

    Args:
        model: on the meta device.
        costs: its pieces, from :func:`eetrain.planning.costs.piece_costs` with the same ``length``.
        length: tokens of a row.

    Raises:
        UnsupportedModelError: a block needs values, which the meta device lacks.
    """
    assert model.device.type == "meta"
    counter = _Counter(model, length)
    trained_before = False
    found = []
    for cost in costs:
        found.append(counter.count(cost, trained_before) if cost.backward_flops else PieceActivations(0, False))
        if cost.piece.kind in ("embed", "block"):
            trained_before |= cost.trained_parameters > 0
    return tuple(found)


class _Counter:
    """Runs the pieces of one model; equal blocks once."""

    def __init__(self, model: MultiExitModel, length: int) -> None:
        self.model = model
        self.blocks = blocks_of(model.backbone, model.anatomy)
        self.harvest = _harvest(model, length)
        self.shared_norm, self.shared = model.shared_tail()
        self.handed = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers(), *self._handed())}
        self.known: dict[object, PieceActivations] = {}

    def count(self, cost: PieceCost, differentiable: bool) -> PieceActivations:
        """What a piece keeps; ``differentiable`` if its input needs a gradient."""
        piece = cost.piece
        if piece.kind == "block":
            block, call = self.blocks[piece.layer - 1], self.harvest.calls[piece.layer - 1]
            key = _signature(block, call, differentiable)
            if key not in self.known:
                own, keeps = self._kept(lambda hidden_BTD: call_block(block, hidden_BTD, call), differentiable)
                self.known[key] = PieceActivations(own, keeps)
            return self.known[key]
        if piece.kind == "tail":
            own, _ = self._kept(self.shared_norm, differentiable)
            return _with_loss(own, self.shared)
        head, call = self.model.head(piece.layer), self.model.head_call(piece.layer, self.harvest)
        own, _ = self._kept(lambda hidden_BTD: head(hidden_BTD, call, self.shared_norm), differentiable)
        return _with_loss(own, head.projection(self.shared))

    def _kept(self, run: Callable[[Tensor], Tensor], differentiable: bool) -> tuple[int, bool]:
        hidden_BTD = torch.empty_like(self.harvest.hidden_BTD).requires_grad_(differentiable)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in self.handed:
                kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        try:
            with torch.enable_grad(), _Kernels(), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
                output_BTD = run(hidden_BTD)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"Activations of {type(self.model.causal_lm).__name__} cannot be counted without values: "
                f"{str(error).splitlines()[0]}",
                hint="With experts, set experts_implementation to grouped_mm in the model's configuration.",
            ) from error
        del output_BTD  # its graph held what was saved, so that no two storages had one address
        keeps_input = kept.pop(_storage(hidden_BTD), None) is not None
        return sum(kept.values()), keeps_input

    def _handed(self) -> Iterator[Tensor]:
        return (tensor for call in self.harvest.calls for tensor in _tensors(call))


def _with_loss(own: int, projection: Projection) -> PieceActivations:
    """An exit or the tail: what its head keeps, and what its loss needs while it is computed."""
    rows, width = projection.weight.shape
    size = projection.weight.element_size()
    wide, copy = max(4, size), size if size < 4 else 0
    logit_bytes = wide * (1 if projection.softcap is None else 2) + copy
    gradient = rows * width * (wide + copy) if projection.weight.requires_grad else 0
    return PieceActivations(own, True, rows, logit_bytes, gradient)


def _harvest(model: MultiExitModel, length: int) -> Harvest:
    """What blocks are handed for one row of ``length`` tokens, without caches."""
    ids_BT = torch.ones(1, length, dtype=torch.long, device="meta")
    with torch.no_grad():
        # With a cache transformers does not look for packed documents, which needs values.
        embeds_BTD = model.causal_lm.get_input_embeddings()(ids_BT)
        harvest = Harvester(model.backbone, model.anatomy)(inputs_embeds=embeds_BTD, cache=DynamicCache())
    calls = tuple(Call(_uncached(call.args), _uncached(call.kwargs)) for call in harvest.calls)
    return Harvest(harvest.hidden_BTD.detach(), calls)


def _uncached(values: Any) -> Any:
    def is_cache(value: Any) -> bool:
        return isinstance(value, Cache)

    return tree_map(lambda value: None if is_cache(value) else value, values, is_leaf=is_cache)


def _signature(block: nn.Module, call: Call, differentiable: bool) -> object:
    """What the count of a block depends on."""
    weights = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return type(block), weights, tuple(tensor.shape for tensor in _tensors(call)), differentiable


def _tensors(call: Call) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class _Kernels(TorchFunctionMode):
    """Stands in for kernels that a device has and the meta device computes another way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FlashAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps; its output lies in memory as the queries do."""

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
        output_BHTK = torch.empty_like(q_BHTK)[..., : v_BHTK.shape[-1]]
        normalizer_BHT = q_BHTK.new_empty(q_BHTK.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q_BHTK, k_BHTK, v_BHTK, output_BHTK, normalizer_BHT)
        return output_BHTK
