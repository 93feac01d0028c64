"""The backbone with its exits: what is trained, saved and decoded with.

Shape suffixes: ``B`` batch, ``T`` positions, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eetrain.backbones import (
    Anatomy,
    Call,
    Harvest,
    Harvester,
    PartialBlocks,
    Projection,
    causal_lm_of,
    count_zero,
    dissect,
    final_norm,
    output_projection,
)
from eetrain.backbones.loading import load_backbone
from eetrain.backbones.routers import record_routers, router_loss
from eetrain.errors import ConfigError
from eetrain.exits.config import ExitConfig
from eetrain.exits.gates import Gate
from eetrain.exits.heads import ExitHead, build_head

if TYPE_CHECKING:
    from eetrain.decoding.policy import Policy

RunBlocks = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class MultiExitOutput:
    """What a forward pass leaves for an objective: hidden states at the exits only, never logits.

    Attributes:
        hidden: exit layer -> residual stream ``[B, T, D]`` after that block.
        features: exit layer -> ``[B, T, D]``, through the exit's head up to its output matrix.
        projections: exit layer -> its map from features to logits.
        full_features: normed output of the last block, or ``None`` if it was not run.
        full_projection: the backbone's map to logits.
        router_loss: weighted auxiliary loss of a mixture of experts, or ``None``.
        gates: exit layer -> its gates, for the exits of this pass that have some.
    """

    hidden: dict[int, Tensor]
    features: dict[int, Tensor]
    projections: dict[int, Projection]
    full_features: Tensor | None
    full_projection: Projection
    router_loss: Tensor | None
    gates: dict[int, Gate]


class MultiExitModel(nn.Module):
    """A Hugging Face decoder with exits after some of its blocks.

    ``backbone``, ``exits.<l>`` and ``gates.<l>`` are the names of its parts in every state dict.

    Args:
        backbone: a causal LM or a PEFT wrapper around one; used as it is, never modified.
        config: where exits stand and what their heads are; resolved against the backbone's depth.

    Raises:
        UnsupportedModelError: the backbone works in a way eetrain cannot follow.
        ConfigError: exits outside the backbone.

    Example:
        >>> from eetrain.testing.tiny import tiny_model
        >>> model = MultiExitModel(tiny_model("llama"), ExitConfig(layers=[1, 2]))
        >>> sorted(model.exits)
        ['1', '2']
    """

    def __init__(self, backbone: nn.Module, config: ExitConfig) -> None:
        super().__init__()
        self.anatomy: Anatomy = dissect(backbone)
        self.config = config.resolved(self.anatomy.num_blocks)
        self.backbone = backbone
        total = getattr(causal_lm_of(backbone).config, "eetrain_full_depth", None)
        self.full_depth_loaded = total is None
        if config.head == "block" and not self.full_depth_loaded:
            raise ConfigError(
                "exits.head=block copies the last block, but only the first blocks were loaded.",
                hint="Load the whole backbone (depth=None).",
            )
        heads = {
            str(layer): build_head(backbone, self.anatomy, self.config, layer, self.anatomy.num_blocks + place)
            for place, layer in enumerate(self.exit_layers)
        }
        self.exits = nn.ModuleDict(heads)
        self.gates = nn.ModuleDict()
        if self.config.gates is not None:
            gated = [layer for layer in self.exit_layers if layer < self.anatomy.num_blocks]
            self.gates.update({str(layer): Gate(self.config.gates) for layer in gated})

    @classmethod
    def attach(cls, backbone: nn.Module | str | Path, config: ExitConfig, **loading: Any) -> MultiExitModel:
        """Attach fresh exits to a pretrained backbone.

        Args:
            backbone: a model, or a folder or hub id for :func:`eetrain.backbones.loading.load_backbone`.
            config: the exits.
            **loading: passed to ``load_backbone``: ``dtype``, ``depth``, ``trust_remote_code``...
        """
        if isinstance(backbone, nn.Module):
            return cls(backbone, config)
        return cls(load_backbone(backbone, **loading), config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **loading: Any) -> MultiExitModel:
        """Load a multi-exit checkpoint written by :meth:`save_pretrained` or ``eetrain export``."""
        from eetrain.checkpoints import load_checkpoint

        return load_checkpoint(folder, **loading)

    def save_pretrained(self, folder: str | Path, **extras: Any) -> Path:
        """Write a folder that both this class and plain ``AutoModelForCausalLM`` open."""
        from eetrain.checkpoints import save_checkpoint

        return save_checkpoint(self, folder, **extras)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Blocks after which exits stand, ascending."""
        return tuple(self.config.layers or ())

    @property
    def num_blocks(self) -> int:
        """Blocks of the backbone that are loaded."""
        return self.anatomy.num_blocks

    @property
    def device(self) -> torch.device:
        """Where the backbone's input goes."""
        return next(self.backbone.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model inside ``backbone`` (the same object unless PEFT wraps it)."""
        return causal_lm_of(self.backbone)

    def head(self, layer: int) -> ExitHead:
        """The head of the exit after block ``layer``."""
        return self.exits[str(layer)]  # type: ignore[return-value]

    def gate(self, layer: int) -> Gate:
        """The gates of the exit after block ``layer``, which must have some."""
        return self.gates[str(layer)]  # type: ignore[return-value]

    def gates_by_layer(self, layers: Sequence[int] | None = None) -> dict[int, Gate]:
        """Exit layer -> its gates, for the given exits (all by default) that have some."""
        among = self.exit_layers if layers is None else layers
        return {layer: self.gate(layer) for layer in among if str(layer) in self.gates}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        exits: Sequence[int] | None = None,
        full_depth: bool = True,
        routers: bool = False,
        active_LBT: Tensor | None = None,
        reach_all: bool = False,
    ) -> MultiExitOutput:
        """Run the backbone once and keep the hidden states at the exits.

        Where blocks run at some positions only, routers of a mixture of experts get no auxiliary loss: each of them
        sees other positions.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 1 for real tokens; ``None`` when all are, or when documents are packed.
            position_ids: ``[B, T]``; restarting at 0 keeps packed documents apart.
            exits: exit layers to keep; all by default.
            full_depth: also run the blocks after the deepest exit. A frozen backbone is run without autograd.
            routers: also compute the auxiliary loss of a mixture of experts.
            active_LBT: bool, where each of the ``L`` blocks runs; everywhere if left out. See
                :class:`eetrain.backbones.PartialBlocks`.
            reach_all: let parameters of blocks that run nowhere, and of exits that are not kept, take part with
                gradients of zero: one position passes through them. Needs the full depth.

        Raises:
            ConfigError: an exit the model does not have, or a full depth that is not loaded.
        """
        layers = self.exit_layers if exits is None else tuple(sorted(exits))
        self._check_exits(layers)
        if full_depth:
            self._check_full_depth("the full depth")
        harvester = Harvester(self.backbone, self.anatomy)
        passed = self._trained_exits_besides(layers) if reach_all else ()
        trains = any(parameter.requires_grad for parameter in self.backbone.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            with record_routers(self.backbone, self.anatomy, enabled=routers and active_LBT is None) as router_logits:
                harvest = harvester(input_ids, attention_mask=attention_mask, position_ids=position_ids)
                run: RunBlocks = partial(harvester.run, harvest)
                if active_LBT is not None:
                    masks = (active_LBT, attention_mask, position_ids)
                    run = PartialBlocks(harvester, harvest, *masks, reach_all=reach_all).run
                stops = sorted({*layers, *passed})
                hidden, last = self._run_to_exits(run, harvest.hidden_BTD, stops, full_depth)
            auxiliary = router_loss(self.backbone, router_logits, attention_mask)
        shared_norm, shared = self.shared_tail()
        full_features = None if last is None else shared_norm(last)
        if passed:
            assert full_features is not None, "parameters are reached by way of the full depth"
            one = harvester(inputs_embeds=harvest.hidden_BTD[:1, :1].detach())
            full_features = count_zero(full_features, *(self._one_position(k, hidden[k], one) for k in passed))
        kept = {layer: hidden[layer] for layer in layers}
        return MultiExitOutput(
            hidden=kept,
            features={
                layer: self.head(layer)(state, self.head_call(layer, harvest), shared_norm)
                for layer, state in kept.items()
            },
            projections={layer: self.head(layer).projection(shared) for layer in layers},
            full_features=full_features,
            full_projection=shared,
            router_loss=auxiliary,
            gates=self.gates_by_layer(layers),
        )

    def _run_to_exits(
        self, run: RunBlocks, state: Tensor, layers: Sequence[int], full_depth: bool
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        done, hidden = 0, {}
        for layer in layers:
            state = run(state, range(done + 1, layer + 1))
            hidden[layer], done = state, layer
        return hidden, run(state, range(done + 1, self.num_blocks + 1)) if full_depth else None

    def _trained_exits_besides(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Other exits with trained parameters of their own."""
        others = [layer for layer in self.exit_layers if layer not in layers]
        return tuple(layer for layer in others if any(p.requires_grad for p in self.head(layer).parameters()))

    def _one_position(self, layer: int, hidden_BTD: Tensor, one: Harvest) -> Tensor:
        """Logits of an exit at the first position, for which ``one`` was harvested."""
        shared_norm, shared = self.shared_tail()
        head = self.head(layer)
        features_11D = head(hidden_BTD[:1, :1].detach(), self.head_call(layer, one), shared_norm)
        return head.projection(shared)(features_11D)

    def shared_tail(self) -> tuple[nn.Module, Projection]:
        """The backbone's final norm and map to logits."""
        return final_norm(self.backbone, self.anatomy), output_projection(self.backbone, self.anatomy)

    def head_call(self, layer: int, harvest: Harvest) -> Call:
        """Arguments for the inner block of exit ``layer``: those of the block it was copied from."""
        return harvest.calls[-1] if self.head(layer).attends else harvest.calls[layer - 1]

    def logits(self, output: MultiExitOutput, layer: int | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of one exit, or of the full depth when ``layer`` is ``None``."""
        if layer is not None:
            return output.projections[layer](output.features[layer])
        assert output.full_features is not None, "the forward pass stopped before the last block"
        return output.full_projection(output.full_features)

    def generate(self, inputs: Tensor | None = None, *, exit_policy: str | Policy | None = None, **kwargs: Any) -> Any:
        """Decode with the signature of ``transformers.generate`` and an exit policy.

        Args:
            inputs: prompt ids ``[B, T]`` (or ``input_ids=``), left-padded with an ``attention_mask``.
            exit_policy: a policy or its string (``never``, ``always:6``, ``threshold:0.9``); by default the policy
                stored in the generation config, else ``never``.
            **kwargs: everything greedy search and sampling of ``transformers.generate`` take.

        Returns:
            What ``generate`` returns: ids ``[B, T + new]``, or with ``return_dict_in_generate=True`` an output whose
            ``exit_trace`` ``[B, new]`` holds the depth of every generated token, 0 after a row's end.

        Raises:
            ConfigError: a policy that does not parse or fit, or an unsupported mode of generation.
        """
        from eetrain.decoding import generate

        return generate(self, inputs, exit_policy=exit_policy, **kwargs)

    def _check_exits(self, layers: Sequence[int]) -> None:
        missing = [layer for layer in layers if layer not in self.exit_layers]
        if missing:
            raise ConfigError(
                f"forward(exits={list(layers)}): the model has no exit after block {missing[0]}.",
                hint=f"Exits stand after blocks {', '.join(map(str, self.exit_layers)) or 'none'}.",
            )

    def _check_full_depth(self, what: str) -> None:
        if not self.full_depth_loaded:
            raise ConfigError(
                f"{what} was asked for, but only blocks 1..{self.num_blocks} of the backbone were loaded.",
                hint="Load the whole backbone (depth=None).",
            )
