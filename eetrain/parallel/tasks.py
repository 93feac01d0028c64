"""What happens at exits and full depth while a batch passes through a pipeline.

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
from eetrain.objectives.token_statistics import StatisticsLevel, TokenStatistics
from eetrain.parallel.injection import inject
from eetrain.parallel.stage import MicroBatch, Stage


@dataclass
class Sums:
    """Totals of this process, to be added up over all of them.

    Args:
        nll: by depth, the sum of its cross-entropies over tokens.
        loss: the sum of what the objective makes of them, divided by the tokens of the step.
    """

    nll: dict[int, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None

    def add(self, depth: int, nll: Tensor, loss: Tensor) -> None:
        """Add a micro-batch."""
        self.nll[depth] = self.nll[depth] + nll if depth in self.nll else nll
        self.loss = loss if self.loss is None else self.loss + loss


class WeightedLosses:
    """Injects ``w_l`` times the cross-entropy of every depth that has a weight.

    Args:
        weights: by depth.
        token_weights: see :class:`eetrain.objectives.weighted_sum.WeightedSum`.
        kernel: see there.
        num_tokens: scored tokens of the step, over all micro-batches and replicas.
        scale: of the injected gradients; the engine averages them over the replicas.
    """

    def __init__(
        self,
        weights: Mapping[int, float],
        token_weights: TokenWeights | None,
        kernel: Kernel,
        num_tokens: Tensor,
        scale: float,
    ) -> None:
        self.weights, self.token_weights, self.kernel = weights, token_weights, kernel
        self.num_tokens, self.scale = num_tokens, scale
        self.sums = Sums()

    def start(self, micro: MicroBatch) -> Tensor | None:
        """Nothing travels."""
        return None

    def visit(
        self, stage: Stage, depth: int, hidden_BTD: Tensor, left_BTK: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Inject the depth's loss."""
        if depth not in self.weights:
            left_out = stage.trained_at(depth) if stage.reach_all else ()
            return count_zero(hidden_BTD, *left_out), left_BTK

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
            )
            self.sums.add(depth, result.exit_losses[0] * result.num_tokens, result.loss.detach())
            return result.loss * self.scale

        trained = stage.trained_at(depth)
        return inject(hidden_BTD, loss, trained, through=not stage.frozen), left_BTK

    def _placed(self, depth: int) -> TokenWeights | None:
        """The token weights, told the depth's place among all depths and not that on this stage."""
        weigh = self.token_weights
        if weigh is None:
            return None
        place = list(self.weights).index(depth)
        return lambda statistics, _, rows_C: weigh(statistics, place, rows_C)


class SharedLosses:
    """Injects the cross-entropy of every token at every depth, times the probability that it leaves there.

    The probability of not having left yet travels with the hidden state. An exit's statistics, which its gate decides
    by, are taken when the micro-batch passes; the loss is computed again in backward.

    Args:
        gates: of every exit.
        num_cost_weights: of each gate.
        num_tokens: see :class:`WeightedLosses`.
        scale: see there.
    """

    def __init__(self, gates: Mapping[int, Gate], num_cost_weights: int, num_tokens: Tensor, scale: float) -> None:
        self.gates, self.num_cost_weights = gates, num_cost_weights
        self.num_tokens, self.scale = num_tokens, scale
        self.sums = Sums()

    def start(self, micro: MicroBatch) -> Tensor | None:
        """Everything is left."""
        return torch.ones(*micro.input_ids.shape, self.num_cost_weights, device=micro.input_ids.device)

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
        self, stage: Stage, depth: int, hidden_BTD: Tensor, left_BTK: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Take the depth's share of what is left, and inject its loss."""
        assert left_BTK is not None
        share_N, left_BTK = self._shares(stage, depth, hidden_BTD, left_BTK, micro)

        def loss(hidden_BTD: Tensor) -> Tensor:
            result = _cross_entropy(
                stage, depth, hidden_BTD, micro, weight=1.0, token_weights=share_N[None], num_tokens=self.num_tokens
            )
            return result.loss * self.scale

        return inject(hidden_BTD, loss, stage.trained_at(depth), through=not stage.frozen), left_BTK


class Scores:
    """Keeps all statistics of every depth; for passes without autograd."""

    def __init__(self) -> None:
        self.found: dict[int, list[TokenStatistics]] = {}

    def start(self, micro: MicroBatch) -> Tensor | None:
        """Nothing travels."""
        return None

    def visit(
        self, stage: Stage, depth: int, hidden_BTD: Tensor, left_BTK: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Measure the depth."""
        result = _cross_entropy(stage, depth, hidden_BTD, micro, level="all")
        assert result.statistics is not None
        self.found.setdefault(depth, []).append(result.statistics)
        return hidden_BTD, left_BTK


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
    )
