"""Find the parts of an unmodified Hugging Face decoder: blocks, final norm, output matrix, what scales the logits.

No table of families: the block list is found by its length, the rest by running two tokens through a shadow of the
model whose parts are taps, and looking at which module was handed what. Works on the meta device as well.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from eetrain.backbones.projection import Projection
from eetrain.backbones.recorder import Tap, hidden_of
from eetrain.backbones.shadow import shadow
from eetrain.errors import UnsupportedModelError

_HINT = "eetrain needs a decoder of equal blocks in one ModuleList, then a norm, then one output matrix."


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a causal LM are: plain data, so that models that hold it copy, pickle and spawn.

    Attributes:
        decoder: path of the module that embeds ids and runs the blocks, below the causal LM.
        blocks: path of the block list, below the decoder.
        norm: path of the final norm below the decoder; ``None`` if there is none.
        head: path of the output matrix, below the causal LM.
        num_blocks: how many blocks there are.
        hidden_size: width of the residual stream.
        vocab_size: rows of the output matrix.
        returns_tuple: whether blocks return a tuple instead of a tensor.
        takes_cache: whether the decoder's forward takes a key/value cache.
        takes_position_ids: whether the decoder's forward has that argument.
        scale: factor on the logits.
        softcap: bound on the logits or ``None``; see :class:`Projection`.
    """

    decoder: str
    blocks: str
    norm: str | None
    head: str
    num_blocks: int
    hidden_size: int
    vocab_size: int
    returns_tuple: bool
    takes_cache: bool
    takes_position_ids: bool
    scale: float = 1.0
    softcap: float | None = None


def causal_lm_of(backbone: nn.Module) -> nn.Module:
    """The Hugging Face causal LM inside ``backbone``, which may be a PEFT wrapper.

    Raises:
        UnsupportedModelError: a PEFT method that changes the inputs (prompt or prefix tuning).
    """
    if not hasattr(backbone, "get_base_model"):
        return backbone
    for name, config in getattr(backbone, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise UnsupportedModelError(
                f"PEFT adapter {name!r} is of type {config.peft_type}, which adds virtual tokens.",
                hint="Use an adapter that changes weights only, such as LoRA.",
            )
    model: nn.Module = backbone.get_base_model()  # type: ignore[operator]
    return model


def submodule(root: nn.Module, path: str | None) -> nn.Module:
    """The module at a dotted path; ``""`` is the root itself, ``None`` an identity."""
    if path is None:
        return nn.Identity()
    return root.get_submodule(path)


def decoder_of(backbone: nn.Module, anatomy: Anatomy) -> nn.Module:
    """The module that embeds ids and runs the blocks."""
    return submodule(causal_lm_of(backbone), anatomy.decoder)


def final_norm(backbone: nn.Module, anatomy: Anatomy) -> nn.Module:
    """The norm between the last block and the output matrix (an identity if the family has none)."""
    return submodule(decoder_of(backbone, anatomy), anatomy.norm)


def blocks_of(backbone: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    """The list of blocks."""
    blocks = submodule(decoder_of(backbone, anatomy), anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def output_projection(backbone: nn.Module, anatomy: Anatomy) -> Projection:
    """The backbone's own map from normed hidden states to logits."""
    head = submodule(causal_lm_of(backbone), anatomy.head)
    weight, bias = head.weight, getattr(head, "bias", None)
    assert isinstance(weight, Tensor)
    return Projection(weight, bias, anatomy.scale, anatomy.softcap)


def dissect(backbone: nn.Module) -> Anatomy:
    """Find the parts of ``backbone`` and check that it works the way eetrain runs it.

    Args:
        backbone: a Hugging Face causal LM or a PEFT wrapper; not modified; the meta device is fine.

    Raises:
        UnsupportedModelError: names the part that is missing or differs.
    """
    model = causal_lm_of(backbone)
    decoder_path = getattr(model, "base_model_prefix", "")
    decoder = getattr(model, decoder_path, None) if decoder_path else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if decoder is None or head is None or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is not a decoder-only causal language model.", hint=_HINT)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is spread over {', '.join(sorted(devices))}.",
            hint="Load it onto one device (device_map=None, or the name of one device).",
        )
    blocks_path, blocks = _find_blocks(decoder, _text_config(model).num_hidden_layers)
    head_path = next(name for name, module in model.named_modules() if module is head)
    _check_plain(model, head_path, head)
    trace = _trace(model, decoder_path, blocks_path, blocks, head_path)
    return Anatomy(
        decoder=decoder_path,
        blocks=blocks_path,
        norm=trace.norm,
        head=head_path,
        num_blocks=len(blocks),
        hidden_size=trace.hidden_size,
        vocab_size=head.weight.shape[0],
        returns_tuple=trace.returns_tuple,
        takes_cache="past_key_values" in inspect.signature(decoder.forward).parameters,
        takes_position_ids="position_ids" in inspect.signature(decoder.forward).parameters,
        scale=trace.scale,
        softcap=trace.softcap,
    )


def _check_plain(model: nn.Module, head_path: str, head: nn.Module) -> None:
    """Exits read the output matrix itself, so what an adapter adds to its output would be lost without a word."""
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter on its output matrix ({head_path}).",
            hint=f"Leave {head_path} out of the adapter's modules, or merge the adapter first (merge_and_unload).",
        )


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def _find_blocks(decoder: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    found = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if found:
        depth = min(name.count(".") for name, _ in found)
        found = [(name, module) for name, module in found if name.count(".") == depth]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise UnsupportedModelError(
            f"{type(decoder).__name__}: looked for one list of {count} blocks, found {names}.", hint=_HINT
        )
    return found[0]


@dataclass(frozen=True)
class _Trace:
    norm: str | None
    hidden_size: int
    returns_tuple: bool
    scale: float
    softcap: float | None


class _KnownLogits(nn.Module):
    """Stands for the output matrix: keeps its input, returns known numbers, whatever device the model is on."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, getattr(head, "bias", None)
        self.known = torch.linspace(0.5, 4.0, 8, dtype=torch.float64).view(1, 1, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        self.__dict__["seen"] = hidden
        return self.known


@torch.no_grad()
def _trace(model: nn.Module, decoder_path: str, blocks_path: str, blocks: nn.ModuleList, head_path: str) -> _Trace:
    owner_path, _, list_name = blocks_path.rpartition(".")
    owner = model.get_submodule(".".join(part for part in (decoder_path, owner_path) if part))
    taps = [Tap(block) for block in blocks]
    others = {
        name: Tap(child)
        for name, child in owner.named_children()
        if name != list_name and not isinstance(child, nn.Embedding)
    }
    head = _KnownLogits(model.get_submodule(head_path))
    prefix = ".".join(part for part in (decoder_path, owner_path) if part)
    replaced: dict[str, nn.Module] = {f"{prefix}.{name}": tap for name, tap in others.items()}
    replaced[f"{prefix}.{list_name}"] = nn.ModuleList(taps)
    replaced[head_path] = head
    weight = head.weight
    assert isinstance(weight, Tensor)
    logits = _run_two_tokens(model, shadow(model, replaced), owner, weight.device)
    _check_chain(model, taps)
    last = hidden_of(taps[-1].output)
    norm = _find_norm(others, last)
    normed = last if norm is None else others[norm].output
    seen = head.__dict__.get("seen")
    if seen is None or seen.shape != normed.shape or not _equal(seen, normed):
        raise UnsupportedModelError(
            f"{type(model).__name__} changes the hidden state between final norm and output matrix.",
            hint=_HINT,
        )
    scale, softcap = _logit_shape(model, head.known, logits)
    norm_path = norm if norm is None or not owner_path else f"{owner_path}.{norm}"
    return _Trace(norm_path, last.shape[-1], isinstance(taps[0].output, tuple), scale, softcap)


def _run_two_tokens(model: nn.Module, tapped: nn.Module, owner: nn.Module, device: torch.device) -> Tensor:
    """Logits of two equal tokens, from the model with taps in it."""
    hollow = device.type == "meta"
    embeds = model.get_input_embeddings()(torch.ones(1, 2, dtype=torch.long, device=device))  # type: ignore[operator]
    extra: dict[str, Any] = {}
    # With a cache transformers does not look for packed documents, which needs values: the meta device has none.
    if hollow and "past_key_values" in inspect.signature(owner.forward).parameters:
        extra["past_key_values"] = DynamicCache()
    if getattr(_text_config(model), "output_router_logits", False):
        extra["output_router_logits"] = False  # routers are out of sight behind the taps
    try:
        logits: Tensor = tapped(inputs_embeds=embeds, use_cache="past_key_values" in extra, **extra).logits
    except RuntimeError as error:
        if not hollow:
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} needs values that the meta device lacks: {error}",
            hint="Build it on a real device, or use a newer transformers.",
        ) from error
    return logits


def _check_chain(model: nn.Module, taps: list[Tap]) -> None:
    for number, (one, two) in enumerate(pairwise(taps), start=1):
        given = two.hidden
        if one.call is None or given is None or not _equal(hidden_of(one.output), given):
            raise UnsupportedModelError(
                f"{type(model).__name__} skips block {number} or changes the hidden state after it.",
                hint=_HINT,
            )


def _find_norm(others: dict[str, Tap], last: Tensor) -> str | None:
    for name, tap in others.items():
        if tap.hidden is not None and tap.hidden is last:
            return name
    return None


def _equal(one: Tensor, two: Tensor) -> bool:
    if one is two or one.is_meta or two.is_meta:
        return one.shape == two.shape
    return torch.equal(one, two)


def _logit_shape(model: nn.Module, known: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Solve ``logits = cap * tanh(scale * known / cap)`` for the scale; the cap is the config's."""
    softcap = getattr(_text_config(model), "final_logit_softcapping", None)
    got = logits.to(torch.float64)
    linear = got if softcap is None else torch.atanh((got / softcap).clamp(-1 + 1e-12, 1 - 1e-12)) * softcap
    ratios = (linear / known).flatten()
    scale = float(ratios[0])
    if not torch.allclose(ratios, ratios[0].expand_as(ratios), rtol=1e-5):
        raise UnsupportedModelError(
            f"{type(model).__name__} shapes its logits in a way eetrain does not know.",
            hint="Known are a factor and a soft cap (config.final_logit_softcapping).",
        )
    return (1.0 if abs(scale - 1.0) < 1e-9 else scale), softcap
