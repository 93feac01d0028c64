"""The contract of a training objective: features at the exits and labels in, named loss terms out.

Shape suffixes: ``B`` batch, ``T`` time, ``E`` exits, ``N = B * T``, ``D`` hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from eetrain.backbones.projection import Projection
from eetrain.errors import ConfigError
from eetrain.exits.gates import Gate
from eetrain.objectives.linear_ce import linear_cross_entropy, shift_labels
from eetrain.objectives.token_statistics import TokenStatistics

FULL = 0
"""Stands for the full depth where a layer number is expected; exits are numbered from 1."""

Unreached = Literal["nothing", "parts rest", "blocks rest", "zero"]
"""What becomes of trained parameters that the loss of a step does not reach.

``nothing``: every step reaches all. ``parts rest``: gates and the rest of the model take turns; without a gradient the
optimizer changes neither weights nor moments. ``blocks rest``: so do blocks that ran at no position. ``zero``: such
blocks, and exits that were left out, have a gradient of zero.
"""


class HeadInputs(Protocol):
    """What a multi-exit model hands to an objective: everything up to, but without, the logits."""

    @property
    def features(self) -> Mapping[int, Tensor]:
        """Per exit layer the normed states ``[B, T, D]``, ready for its projection."""

    @property
    def full_features(self) -> Tensor | None:
        """The same at full depth; ``None`` if the last blocks were not run."""

    @property
    def projections(self) -> Mapping[int, Projection]:
        """Per exit layer the map to logits."""

    @property
    def full_projection(self) -> Projection:
        """The backbone's own map to logits."""

    @property
    def router_loss(self) -> Tensor | None:
        """Auxiliary loss of a mixture-of-experts backbone, already times its coefficient."""

    @property
    def gates(self) -> Mapping[int, Gate]:
        """Per exit layer the gates, for the exits that have some."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """Result of an objective.

    Args:
        total: what to call ``backward`` on.
        terms: detached scalars to log: ``"ce/exit_3"``, ``"ce/full"``, ``"weight/exit_3"``, ``"router"``.
        statistics: per-token statistics ``[E, N]`` if asked for.
        layers: the exit layer of each row of ``statistics``; :data:`FULL` for the full depth.
    """

    total: Tensor
    terms: dict[str, Tensor]
    statistics: TokenStatistics | None
    layers: tuple[int, ...]


class Objective(ABC):
    """A published way to turn exits and labels into one loss.

    Bind it to a model's exits once, then call it with every batch. Whatever changes during training is a
    function of ``step`` alone.
    """

    freezes_backbone: ClassVar[bool] = False
    """Whether only exit heads are trained."""

    unreached: Unreached = "nothing"
    """What becomes of parameters that a step leaves out."""

    drops_blocks: bool = False
    """Whether blocks are left out at random in training."""

    schedule: str | None = None
    """The schedule under which the model runs in training and validation, if not all blocks run everywhere."""

    trains_gates: ClassVar[bool] = False
    """Whether gates are trained."""

    def __init__(self) -> None:
        self.exit_layers: tuple[int, ...] = ()
        self.num_blocks = 0

    @property
    def lets_rest(self) -> bool:
        """Whether a step may leave trained parameters without a gradient, which data parallelism must be told."""
        return self.unreached in ("parts rest", "blocks rest")

    @abstractmethod
    def needs_full_depth(self) -> bool:
        """Whether blocks beyond the deepest exit must run in training."""

    def bind(self, exit_layers: Sequence[int], num_blocks: int) -> None:
        """Check the settings against a model before training starts.

        Args:
            exit_layers: blocks that have an exit, counted from 1, in any order.
            num_blocks: blocks of the backbone.

        Raises:
            ConfigError: a layer the model does not have, a layer named twice, or settings that do not fit.
        """
        layers = sorted(exit_layers)
        outside = [layer for layer in layers if not 1 <= layer <= num_blocks]
        if outside or len(set(layers)) != len(layers):
            raise ConfigError(
                f"exits are at layers {layers} of a model with {num_blocks} blocks.",
                hint=f"use each layer once, from 1 to {num_blocks}.",
            )
        self.exit_layers, self.num_blocks = tuple(layers), num_blocks

    def active_blocks(
        self, labels_BT: Tensor, position_ids: Tensor | None = None, *, step: int, training: bool = True
    ) -> Tensor | None:
        """Where each block runs, bool ``[L, B, T]`` with a prefix of each document, or ``None`` for everywhere.

        Args:
            labels_BT: labels aligned with the input ids.
            position_ids: ``[B, T]``, restarting with every packed document, or ``None``.
            step: optimizer step, counted from 0.
            training: whether depths may be drawn at random, from torch's global generator.
        """
        return None

    def idle_blocks(self) -> tuple[int, ...]:
        """Blocks that run at no position, ever, counted from 1."""
        return ()

    def bind_gates(self, cost_weights: Sequence[float]) -> None:  # noqa: B027
        """Check the settings against the model's gates; called after :meth:`bind`. Without trained gates nothing to do.

        Args:
            cost_weights: one per gate of every exit below the last block; none if the model has no gates.

        Raises:
            ConfigError: gates are to be trained and there are none.
        """

    def prepare_run(self, total_steps: float, *, trial: bool = False) -> None:  # noqa: B027
        """Take note of the length of a run, and check the settings against it; called before the first step.

        Args:
            total_steps: optimizer steps, infinite if the run has no end.
            trial: whether it only tries out that everything works, however short it is.

        Raises:
            ConfigError: the run ends before what was set comes to its turn, or has no end where one is needed.
        """

    def depth_weights(self, step: int) -> dict[int, float] | None:
        """Weight of every depth, exits ascending, then :data:`FULL`; ``None`` if the loss of this step is no such sum.

        Args:
            step: optimizer step, counted from 0.
        """
        return None

    def trains_model_at(self, step: int) -> bool:
        """Whether backbone and exits learn at this step; if not, they are run without autograd."""
        return True

    def exit_policy(self) -> str | None:
        """The policy that decoding should run by default after this training; ``None`` leaves it to the user."""
        return None

    @abstractmethod
    def __call__(
        self, output: HeadInputs, labels_BT: Tensor, *, step: int, statistics: bool = False
    ) -> ObjectiveOutput:
        """The loss of one batch.

        Args:
            output: the model's features.
            labels_BT: labels aligned with the input ids, -100 where there is nothing to learn.
            step: optimizer step, counted from 0.
            statistics: also return token statistics (of the rows that enter the loss).
        """


def score(output: HeadInputs, labels_BT: Tensor) -> tuple[TokenStatistics, tuple[int, ...]]:
    """All statistics of every exit and, where it was run, of the full depth, without gradients.

    Returns:
        Statistics ``[E, N]`` and the layer of each row: exits ascending, then :data:`FULL`.
    """
    layers = tuple(sorted(output.features))
    if output.full_features is not None:
        layers = (*layers, FULL)
    hidden, projections = head_inputs(output, layers)
    with torch.no_grad():
        result = linear_cross_entropy(
            hidden, projections, shift_labels(labels_BT), exit_weights=[0.0] * len(layers), statistics="all"
        )
    assert result.statistics is not None
    return result.statistics, layers


def head_inputs(output: HeadInputs, layers: Sequence[int]) -> tuple[list[Tensor], list[Projection]]:
    """Flat features ``[N, D]`` and projections of the given layers, in that order."""
    hidden, projections = [], []
    for layer in layers:
        states_BTD = output.full_features if layer == FULL else output.features[layer]
        assert states_BTD is not None, "the objective needs the full depth and the model did not run it"
        hidden.append(states_BTD.flatten(0, 1))
        projections.append(output.full_projection if layer == FULL else output.projections[layer])
    return hidden, projections


def depth_name(layer: int) -> str:
    """How a depth is called in names of terms: ``exit_3``, or ``full``."""
    return "full" if layer == FULL else f"exit_{layer}"


def assemble(
    output: HeadInputs,
    loss: Tensor,
    exit_losses: Tensor,
    layers: tuple[int, ...],
    weights: Mapping[int, float],
    statistics: TokenStatistics | None,
) -> ObjectiveOutput:
    """Name the terms and add the router loss, which no exit weight scales.

    Args:
        output: the model's features, for its router loss.
        loss: weighted sum of the exits' losses.
        exit_losses: plain loss of each row, ``[E]``.
        layers: the layer of each row.
        weights: weight of each exit at this step.
        statistics: passed on.
    """
    terms = {f"ce/{depth_name(layer)}": exit_losses[row] for row, layer in enumerate(layers)}
    terms |= {f"weight/{depth_name(layer)}": exit_losses.new_tensor(w) for layer, w in weights.items()}
    if output.router_loss is not None:
        terms["router"] = output.router_loss.detach()
        loss = loss + output.router_loss.to(loss.dtype)
    return ObjectiveOutput(loss, terms, statistics, layers)
