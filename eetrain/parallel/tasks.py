"""What happens at exits and full depth while a batch passes through a pipeline.

While exits learn under their gates, the probability of not having left yet travels beside the hidden state. It needs no
gradient, so its bits travel as integers: the engine sends gradients of floats only.

Shape suffixes: ``B`` rows, ``T`` positions, ``N = B * T`` tokens, ``D`` hidden size, ``K`` cost weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eetrain.backbones import count_zero
from eetrain.exits.gates import Gate
from eetrain.exits.gating import stack_features, take_share
from eetrain.objectives import FULL
from eetrain.objectives.gate_targets import predicted_index
from eetrain.objectives.linear_ce import (
    IGNORE_INDEX,
    Kernel,
    LinearCEOutput,
    TokenWeights,
    linear_cross_entropy,
)
from eetrain.objectives.teacher import Distillation, Teacher
from eetrain.objectives.token_statistics import StatisticsLevel, TokenStatistics
from eetrain.parallel.injection import inject
from eetrain.parallel.layers import Task
from eetrain.parallel.stage import MicroBatch, Stage
from eetrain.parallel.teaching import carrier_like, relay, teach

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_FLOATS = {integer: real for real, integer in _INTEGERS.items()}


@dataclass
class Sums:
    """Totals of this process, to be added up over all of them.

    Args:
        nll: by depth, the sum of its cross-entropies over tokens.
        divergence: by exit that is distilled, the sum of ``KL(p_T || p_e)`` over tokens.
        loss: the sum of what the objective makes of them, divided by the tokens of the step.
    """

    nll: dict[int, Tensor] = field(default_factory=dict)
    divergence: dict[int, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None

    def add(self, depth: int, nll: Tensor, loss: Tensor) -> None:
        """Add a micro-batch."""
        self.nll[depth] = self.nll[depth] + nll if depth in self.nll else nll
        self.loss = loss if self.loss is None else self.loss + loss

    def add_divergence(self, depth: int, divergence: Tensor) -> None:
        """Add a micro-batch of an exit that is distilled."""
        seen = self.divergence
        seen[depth] = seen[depth] + divergence if depth in seen else divergence


class WeightedLosses(Task):
    """Injects ``w_l`` times the loss of every depth that has a weight.

    Exits that are distilled get the full depth's features in backward; see :mod:`eetrain.parallel.teaching`.

    Args:
        weights: by depth.
        token_weights: see :class:`eetrain.objectives.weighted_sum.WeightedSum`.
        kernel: see there.
        num_tokens: scored tokens of the step, over all micro-batches and replicas.
        scale: of the injected gradients; the engine averages them over the replicas.
        distillation: see :class:`eetrain.objectives.weighted_sum.WeightedSum`.
    """

    def __init__(
        self,
        weights: Mapping[int, float],
        token_weights: TokenWeights | None,
        kernel: Kernel,
        num_tokens: Tensor,
        scale: float,
        distillation: Distillation | None = None,
    ) -> None:
        self.weights, self.token_weights, self.kernel = weights, token_weights, kernel
        self.num_tokens, self.scale, self.distillation = num_tokens, scale, distillation
        self.travels = distillation is not None
        self.sums = Sums()

    def start(self, hidden_BTD: Tensor) -> Tensor | None:
        """The carrier of the teacher, if exits are distilled."""
        return carrier_like(hidden_BTD) if self.travels else None

    def leave(self, beside: Tensor | None, micro: MicroBatch) -> Tensor | None:
        """Wait for the teacher."""
        return None if beside is None else relay(beside, micro)

    def visit(
        self, stage: Stage, depth: int, hidden_BTD: Tensor, beside: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Inject the depth's loss; the full depth teaches."""
        if depth in self.weights:
            hidden_BTD = self._injected(stage, depth, hidden_BTD, micro)
        else:
            hidden_BTD = count_zero(hidden_BTD, *(stage.trained_at(depth) if stage.reach_all else ()))
        if depth == FULL and beside is not None:

            def features(last_BTD: Tensor) -> Tensor:
                return stage.features(FULL, last_BTD, micro)[0].view_as(last_BTD)

            hidden_BTD = teach(hidden_BTD, beside, features, micro)
        return hidden_BTD, beside

    def _injected(self, stage: Stage, depth: int, hidden_BTD: Tensor, micro: MicroBatch) -> Tensor:
        def loss(hidden_BTD: Tensor) -> Tensor:
            result = _cross_entropy(
                stage,
                depth,
                hidden_BTD,
                micro,
                weight=self.weights[depth],
                token_weights=self._placed(depth),
                num_tokens=self.num_tokens,
                kernel=self.kernel,
                teacher=self._teacher(stage, depth, micro),
            )
            self.sums.add(depth, result.exit_losses[0] * result.num_tokens, result.loss.detach())
            if result.divergences is not None:
                self.sums.add_divergence(depth, result.divergences[0] * result.num_tokens)
            return result.loss * self.scale

        return inject(hidden_BTD, loss, stage.trained_at(depth), through=not stage.frozen)

    def _teacher(self, stage: Stage, depth: int, micro: MicroBatch) -> Teacher | None:
        if self.distillation is None or depth == FULL:
            return None
        assert micro.teacher_BTD is not None, "the teacher comes back before the gradient of the hidden state"
        return Teacher(micro.teacher_BTD.flatten(0, 1), stage.model.shared_tail()[1], self.distillation)

    def _placed(self, depth: int) -> TokenWeights | None:
        """The token weights, told the depth's place among all depths and not that on this stage."""
        weigh = self.token_weights
        if weigh is None:
            return None
        place = list(self.weights).index(depth)
        return lambda statistics, _, rows_C: weigh(statistics, place, rows_C)


class SharedLosses(Task):
    """Injects the cross-entropy of every token at every depth, times the probability that it leaves there.

    The probability of not having left yet travels with the hidden state. An exit's statistics, which its gate decides
    by, are taken when the micro-batch passes; the loss is computed again in backward.

    Args:
        gates: of every exit.
        num_cost_weights: of each gate.
        num_tokens: see :class:`WeightedLosses`.
        scale: see there.
    """

    travels = True

    def __init__(self, gates: Mapping[int, Gate], num_cost_weights: int, num_tokens: Tensor, scale: float) -> None:
        self.gates, self.num_cost_weights = gates, num_cost_weights
        self.num_tokens, self.scale = num_tokens, scale
        self.sums = Sums()

    def start(self, hidden_BTD: Tensor) -> Tensor | None:
        """Everything is left."""
        return _bits(torch.ones(*hidden_BTD.shape[:2], self.num_cost_weights, device=hidden_BTD.device))

    @torch.no_grad()
    def _shares(
        self, stage: Stage, depth: int, hidden_BTD: Tensor, left_BTK: Tensor, micro: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """Probability ``[N]`` to leave here, the mean over cost weights, and what is left ``[B, T, K]`` behind."""
        left_NK = left_BTK.flatten(0, 1)
        measured = _cross_entropy(stage, depth, hidden_BTD, micro, level="all", num_tokens=self.num_tokens)
        share_NK, after_NK = left_NK, left_NK
        if depth != FULL:
            assert measured.statistics is not None
            features_N4 = stack_features(measured.statistics)[0]
            gate_NK = self.gates[depth](features_N4, predicted_index(micro.labels_N)).sigmoid()
            share_NK, after_NK = take_share(gate_NK, left_NK)
        share_N = share_NK.mean(-1)
        assert measured.statistics is not None
        weighted = (measured.statistics.nll[0] * share_N).sum() / self.num_tokens
        self.sums.add(depth, measured.exit_losses[0] * measured.num_tokens, weighted)
        return share_N, after_NK.view_as(left_BTK)

    def visit(
        self, stage: Stage, depth: int, hidden_BTD: Tensor, beside: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Take the depth's share of what is left, and inject its loss."""
        assert beside is not None
        share_N, left_BTK = self._shares(stage, depth, hidden_BTD, beside.view(_FLOATS[beside.dtype]), micro)

        def loss(hidden_BTD: Tensor) -> Tensor:
            result = _cross_entropy(
                stage, depth, hidden_BTD, micro, weight=1.0, token_weights=share_N[None], num_tokens=self.num_tokens
            )
            return result.loss * self.scale

        return inject(hidden_BTD, loss, stage.trained_at(depth), through=not stage.frozen), _bits(left_BTK)


class Scores(Task):
    """Keeps all statistics of every depth; for passes without autograd."""

    def __init__(self) -> None:
        self.found: dict[int, list[TokenStatistics]] = {}

    def visit(
        self, stage: Stage, depth: int, hidden_BTD: Tensor, beside: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Measure the depth."""
        result = _cross_entropy(stage, depth, hidden_BTD, micro, level="all")
        assert result.statistics is not None
        self.found.setdefault(depth, []).append(result.statistics)
        return hidden_BTD, beside


def _cross_entropy(
    stage: Stage,
    depth: int,
    hidden_BTD: Tensor,
    micro: MicroBatch,
    *,
    weight: float = 0.0,
    token_weights: TokenWeights | Tensor | None = None,
    level: StatisticsLevel = "none",
    num_tokens: Tensor | None = None,
    kernel: Kernel = "torch",
    teacher: Teacher | None = None,
) -> LinearCEOutput:
    features_ND, projection = stage.features(depth, hidden_BTD, micro)
    return linear_cross_entropy(
        [features_ND],
        [projection],
        micro.labels_N,
        exit_weights=[weight],
        token_weights=token_weights,
        statistics=level,
        normalizer=num_tokens,
        ignore_index=IGNORE_INDEX,
        kernel=kernel,
        teacher=teacher,
    )


def _bits(left_BTK: Tensor) -> Tensor:
    return left_BTK.contiguous().view(_INTEGERS[left_BTK.dtype])
