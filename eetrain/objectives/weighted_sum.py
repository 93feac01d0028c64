"""Objectives that are weighted sums of cross-entropies over depths: most published ones.

Such a sum can be taken apart: every stage of a pipeline adds the terms of its own exits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from eetrain.errors import ConfigError
from eetrain.objectives.linear_ce import Kernel, TokenWeights, linear_cross_entropy, shift_labels
from eetrain.objectives.objective import (
    FULL,
    HeadInputs,
    Objective,
    ObjectiveOutput,
    assemble,
    depth_name,
    head_inputs,
)
from eetrain.objectives.teacher import Distillation, Teacher


class WeightedSum(Objective):
    """``L = sum_l w_l(t) mean_n [u_ln CE_ln]`` over exits and full depth.

    Args:
        token_weights: ``u_ln`` from the exit's own statistics; 1 if left out.
        kernel: what computes the cross-entropies of steps that ask for no statistics.
        distillation: how exits learn from the full depth, which must run then; from labels alone if left out.

    Raises:
        ConfigError: the kernel cannot distil.
    """

    def __init__(
        self,
        token_weights: TokenWeights | None = None,
        kernel: Kernel = "torch",
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        if distillation is not None and kernel == "cce":
            raise ConfigError(
                "kernel='cce' knows labels only, and distillation is on.",
                hint="set kernel='torch', or leave distillation out.",
            )
        self.token_weights = token_weights
        self.kernel: Kernel = kernel
        self.distillation = distillation

    @abstractmethod
    def depth_weights(self, step: int) -> dict[int, float]:
        """See :meth:`Objective.depth_weights`."""

    def __call__(
        self, output: HeadInputs, labels_BT: Tensor, *, step: int, statistics: bool = False
    ) -> ObjectiveOutput:
        """The loss of one batch; see :meth:`Objective.__call__`."""
        assert self.num_blocks, "bind the objective to a model first"
        weights = self.depth_weights(step)
        return weighted_sum(output, labels_BT, weights, statistics, self.token_weights, self.kernel, self.distillation)


def weighted_sum(
    output: HeadInputs,
    labels_BT: Tensor,
    weights: Mapping[int, float],
    statistics: bool = False,
    token_weights: TokenWeights | None = None,
    kernel: Kernel = "torch",
    distillation: Distillation | None = None,
) -> ObjectiveOutput:
    """The sum of one batch.

    Args:
        output: the model's features.
        labels_BT: labels aligned with the input ids.
        weights: by depth, exits ascending, then :data:`FULL`.
        statistics: also return token statistics.
        token_weights: see :class:`WeightedSum`.
        kernel: see :class:`WeightedSum`.
        distillation: see :class:`WeightedSum`.
    """
    layers = tuple(weights)
    depths = layers if distillation is None or FULL in weights else (*layers, FULL)
    hidden, projections = head_inputs(output, depths)
    teacher = None
    if distillation is not None:
        place = layers.index(FULL) if FULL in weights else None
        teacher = Teacher(hidden[depths.index(FULL)], projections[depths.index(FULL)], distillation, place)
    result = linear_cross_entropy(
        hidden[: len(layers)],
        projections[: len(layers)],
        shift_labels(labels_BT),
        exit_weights=list(weights.values()),
        token_weights=token_weights,
        statistics="basic" if statistics else "none",
        kernel="torch" if statistics else kernel,
        teacher=teacher,
    )
    logged = {layer: weight for layer, weight in weights.items() if layer != FULL}
    assembled = assemble(output, result.loss, result.exit_losses, layers, logged, result.statistics)
    if result.divergences is None:
        return assembled
    distances = {distance_name(layer): result.divergences[row] for row, layer in enumerate(layers) if layer != FULL}
    return replace(assembled, terms=assembled.terms | distances)


def distils(objective: Objective) -> bool:
    """Whether exits learn from the full depth."""
    return isinstance(objective, WeightedSum) and objective.distillation is not None


def distance_name(layer: int) -> str:
    """How the term is called that says how far an exit is from the full depth it learns from, in nats."""
    return f"distill/{depth_name(layer)}"
