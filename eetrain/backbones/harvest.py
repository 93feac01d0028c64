"""Harvest, then run: what a decoder hands to each of its blocks, without a table per family.

The model's own forward runs over a *shadow* whose blocks are recorders: each keeps the arguments its block would
have got (masks, rotary tables, cache) and passes the hidden state on. The real blocks are then called in a plain
loop, any range of them. One harvest costs one model forward without its blocks.

Shape suffixes: ``B`` batch, ``T`` positions fed in, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eetrain.backbones.anatomy import Anatomy, decoder_of, submodule
from eetrain.backbones.packing import packed_mask
from eetrain.backbones.recorder import Call, Recorder, hidden_of
from eetrain.backbones.shadow import shadow
from eetrain.errors import UnsupportedModelError


@dataclass(frozen=True)
class Harvest:
    """What one forward pass hands to its blocks.

    Attributes:
        hidden_BTD: input of block 1.
        calls: for block ``l`` (1-based), ``calls[l - 1]`` holds its arguments besides the hidden state.
    """

    hidden_BTD: Tensor
    calls: tuple[Call, ...]


class Harvester:
    """Harvest one backbone again and again; the shadow is built once.

    Args:
        backbone: a Hugging Face causal LM, or a PEFT wrapper around one.
        anatomy: its parts, from :func:`eetrain.backbones.dissect`.
        depth: harvest blocks ``1..depth`` only; all by default.
    """

    def __init__(self, backbone: nn.Module, anatomy: Anatomy, depth: int | None = None) -> None:
        decoder = decoder_of(backbone, anatomy)
        blocks: Sequence[nn.Module] = list(submodule(decoder, anatomy.blocks))  # type: ignore[call-overload]
        self.blocks = blocks
        self._decoder = decoder
        self.anatomy = anatomy
        self._recorders = [Recorder(block, anatomy.returns_tuple) for block in blocks[:depth]]
        replaced: dict[str, nn.Module] = {anatomy.blocks: nn.ModuleList(self._recorders)}
        if anatomy.norm is not None:
            replaced[anatomy.norm] = nn.Identity()  # its output is not looked at
        self._shadow = shadow(decoder, replaced)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Harvest:
        """Run everything but the blocks.

        Args:
            input_ids: ``[B, T]``; or give ``inputs_embeds`` ``[B, T, D]``.
            attention_mask: ``[B, cached + T]``, 1 for real tokens, or ``None`` if all are real; or masks ready for the
                blocks, from :func:`eetrain.backbones.ragged_masks`.
            position_ids: ``[B, T]``; positions that restart at 0 keep packed documents apart.
            cache: a transformers cache whose lengths say what came before, or ``None``.

        Raises:
            UnsupportedModelError: the model did not call all its blocks (LayerDrop is on, say), or it cannot keep
                packed documents apart.
        """
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if position_ids is not None and attention_mask is None and cache is None:
            attention_mask = packed_mask(self._decoder, self.anatomy, position_ids, self._widthless(position_ids))
        kwargs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": cache is not None, **inputs}
        if self.anatomy.takes_position_ids and position_ids is not None:
            kwargs["position_ids"] = position_ids
        if cache is not None:
            kwargs["past_key_values"] = cache
        self._shadow(**kwargs)
        recorded = [recorder.take() for recorder in self._recorders]
        calls = tuple(call for call, _ in recorded if call is not None)
        hidden = recorded[0][1]
        if hidden is None or len(calls) != len(recorded):
            raise UnsupportedModelError(
                f"The decoder called {len(calls)} of its {len(recorded)} blocks.",
                hint="Turn off LayerDrop (config.layerdrop = 0): eetrain decides which blocks run.",
            )
        return Harvest(hidden, calls)

    def _widthless(self, position_ids: Tensor) -> Tensor:
        """``[B, T, 0]`` of the backbone's type: all that mask functions want to know about hidden states."""
        parameter = next(self._decoder.parameters())
        return position_ids.new_empty(*position_ids.shape, 0, dtype=parameter.dtype)

    def run(self, harvest: Harvest, hidden_BTD: Tensor, blocks: Sequence[int]) -> Tensor:
        """Run the real blocks ``blocks`` (1-based, in the order given) on ``hidden_BTD`` and return the result."""
        for number in blocks:
            hidden_BTD = call_block(self.blocks[number - 1], hidden_BTD, harvest.calls[number - 1])
        return hidden_BTD


def call_block(block: nn.Module, hidden_BTD: Tensor, call: Call) -> Tensor:
    """Call one block with harvested arguments; a block that returns a tuple gives its first element."""
    return hidden_of(block(hidden_BTD, *call.args, **call.kwargs))
