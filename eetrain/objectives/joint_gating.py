"""Exits and their gates trained in turn (JEI-DNN, brought to tokens).

Shape suffixes: ``C`` tokens of one chunk, ``N`` tokens, ``E`` depths (exits ascending, then the full depth),
``G = E - 1`` gates, ``K`` cost weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from eetrain.errors import ConfigError
from eetrain.exits.gates import Gate, cost_name
from eetrain.exits.gating import chosen_exit, stack_features, take_share
from eetrain.objectives.gate_targets import (
    ExitCosts,
    class_balance,
    gate_logits,
    gate_loss,
    optimal_exit,
    parse_exit_costs,
    predicted_index,
    stop_targets,
)
from eetrain.objectives.linear_ce import IGNORE_INDEX, linear_cross_entropy, shift_labels
from eetrain.objectives.objective import (
    FULL,
    HeadInputs,
    Objective,
    ObjectiveOutput,
    Unreached,
    assemble,
    depth_name,
    head_inputs,
    score,
)
from eetrain.objectives.token_statistics import TokenStatistics
from eetrain.objectives.weighted_sum import weighted_sum

Phase = Literal["warmup", "gates", "exits"]
_PHASES: tuple[Phase, ...] = ("warmup", "gates", "exits")


class JointGating(Objective):
    """Exits learn the tokens that leave at them, gates learn where each token is cheapest, in turn.

    JEI-DNN (arXiv 2310.09163) minimises ``E sum_l P_l (CE_l + lambda c_l)`` over exits and gates, ``P`` being
    :func:`~eetrain.exits.gating.exit_distribution`. One sample of the paper is one token with a label here.
    Three phases, of which the last two alternate every ``phase_steps``:

    - warm-up, without gates: ``CE_full + sum_l (G + 1 - l) CE_l`` over the ``G`` exits, numbered from 0 and the
      shallowest first. These are the paper's weights; their sum is not normalised.
    - gates: backbone and exits rest. With ``l* = argmin_l CE_l + lambda_k c_l`` for every token and cost weight, gate
      ``l`` learns ``1[l >= l*]`` by binary cross-entropy, the mean over gates and cost weights.
    - exits: gates rest. ``sum_l P_l CE_l`` for every token, times the constant that makes the total of the batch
      equal ``sum_l CE_l``.

    Where we differ: the gates of several cost weights share one set of exits, which learn under the mean of their
    ``P``. The phase after the warm-up is that of the gates, which are untrained until then. Classes are balanced by
    their counts in the batch (of each process), not on a validation set: the expectation is the same and a resumed run
    has no counts to restore. The backbone may learn as well (``tuning: full`` or ``lora``); the paper's is frozen.

    Example::

        JointGating(warmup_steps=100, phase_steps=50, exit_costs={3: 0.3, 6: 0.55, 9: 0.8})

    Args:
        warmup_steps: optimizer steps of the warm-up.
        phase_steps: optimizer steps until gates and exits take turns; 200 in the paper.
        exit_costs: ``c_l``: ``"blocks"`` for ``l / L``, or each exit's latency relative to the full depth, by layer.
        class_balance: whether leaving and staying count the same in total, for every gate.

    Raises:
        ConfigError: a negative warm-up or a phase without steps.
    """

    trains_gates: ClassVar[bool] = True
    unreached: Unreached = "parts rest"

    def __init__(
        self,
        warmup_steps: int = 200,
        phase_steps: int = 200,
        exit_costs: ExitCosts = "blocks",
        class_balance: bool = True,
    ) -> None:
        super().__init__()
        if warmup_steps < 0 or phase_steps < 1:
            raise ConfigError(
                f"JointGating has warmup_steps={warmup_steps} and phase_steps={phase_steps}.",
                hint="warmup_steps is 0 or more, phase_steps 1 or more.",
            )
        self.warmup_steps, self.phase_steps, self.class_balance = warmup_steps, phase_steps, class_balance
        self._exit_costs: ExitCosts = exit_costs
        self._costs: tuple[float, ...] = ()
        self._cost_weights: tuple[float, ...] = ()

    def needs_full_depth(self) -> bool:
        """Always: it is the depth of last resort."""
        return True

    def bind(self, exit_layers: Sequence[int], num_blocks: int) -> None:
        """Check the exits and their costs; see :meth:`Objective.bind`."""
        super().bind(exit_layers, num_blocks)
        if not self.exit_layers or self.exit_layers[-1] == num_blocks:
            raise ConfigError(
                f"JointGating needs exits below the last of {num_blocks} blocks and none after it; exits are at layers "
                f"{list(self.exit_layers)}.",
                hint="Set model.exits.layers to blocks below the last.",
            )
        self._costs = parse_exit_costs(self._exit_costs, self.exit_layers, num_blocks)

    def bind_gates(self, cost_weights: Sequence[float]) -> None:
        """Check that there are gates; see :meth:`Objective.bind_gates`."""
        if not cost_weights:
            raise ConfigError(
                "JointGating trains gates, and the model has none.",
                hint="Set model.exits.gates.cost_weights, for example [0.3,1,3].",
            )
        self._cost_weights = tuple(cost_weights)

    def prepare_run(self, total_steps: float, *, trial: bool = False) -> None:
        """Check that gates get a whole phase; see :meth:`Objective.prepare_run`."""
        needed = self.warmup_steps + self.phase_steps
        if total_steps < needed and not trial:
            raise ConfigError(
                f"JointGating trains gates in steps {self.warmup_steps} to {needed} first, but the run ends after "
                f"{total_steps:g}.",
                hint="Set warmup_steps and phase_steps of model.objective lower, or trainer.max_steps higher.",
            )

    @property
    def num_cost_weights(self) -> int:
        """Gates of every exit."""
        return len(self._cost_weights)

    def phase(self, step: int) -> Phase:
        """What is trained at an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return "warmup"
        turn = (step - self.warmup_steps) // self.phase_steps
        return "gates" if turn % 2 == 0 else "exits"

    def phase_number(self, step: int) -> float:
        """The phase as it is logged: 0 warm-up, 1 gates, 2 exits."""
        return float(_PHASES.index(self.phase(step)))

    def exit_policy(self) -> str | None:
        """The gates, if there is one trade-off; among several the user chooses."""
        return "gate:0.5" if len(self._cost_weights) == 1 else None

    def depth_weights(self, step: int) -> dict[int, float] | None:
        """The warm-up's weights; afterwards the loss is no such sum. See :meth:`Objective.depth_weights`."""
        return self._warmup_weights() if self.phase(step) == "warmup" else None

    def trains_model_at(self, step: int) -> bool:
        """Whether it is not the gates' turn."""
        return self.phase(step) != "gates"

    def __call__(
        self, output: HeadInputs, labels_BT: Tensor, *, step: int, statistics: bool = False
    ) -> ObjectiveOutput:
        """The loss of one batch; see :meth:`Objective.__call__`."""
        assert self.num_blocks, "bind the objective to a model first"
        assert self._cost_weights, "bind the objective to the model's gates first"
        phase = self.phase(step)
        losses = {"warmup": self._warmup, "gates": self._train_gates, "exits": self._train_exits}
        result = losses[phase](output, labels_BT, statistics)
        number = result.total.new_tensor(self.phase_number(step))
        return replace(result, terms={**result.terms, "phase": number})

    @property
    def _layers(self) -> tuple[int, ...]:
        return (*self.exit_layers, FULL)

    def _warmup(self, output: HeadInputs, labels_BT: Tensor, statistics: bool) -> ObjectiveOutput:
        return weighted_sum(output, labels_BT, self._warmup_weights(), statistics)

    def _warmup_weights(self) -> dict[int, float]:
        num_gates = len(self.exit_layers)
        return {**{layer: float(num_gates + 1 - place) for place, layer in enumerate(self.exit_layers)}, FULL: 1.0}

    def _train_exits(self, output: HeadInputs, labels_BT: Tensor, statistics: bool) -> ObjectiveOutput:
        labels_N = shift_labels(labels_BT)
        hidden, projections = head_inputs(output, self._layers)
        result = linear_cross_entropy(
            hidden,
            projections,
            labels_N,
            exit_weights=[1.0] * len(self._layers),
            token_weights=_ExitShares(output.gates, predicted_index(labels_N)),
            statistics="all",
        )
        weighted = result.loss.detach()
        factor = torch.where(weighted > 0, result.exit_losses.sum() / weighted, torch.ones_like(weighted))
        kept = result.statistics if statistics else None
        return assemble(output, result.loss * factor, result.exit_losses, self._layers, {}, kept)

    def _train_gates(self, output: HeadInputs, labels_BT: Tensor, statistics: bool) -> ObjectiveOutput:
        scored, layers = score(output, labels_BT)
        assert layers == self._layers, f"scored {layers}, trained are {self._layers}"
        result = self.gate_step(output.gates, scored, shift_labels(labels_BT))
        return replace(result, statistics=scored if statistics else None)

    def gate_step(
        self,
        gates: Mapping[int, Gate],
        scored: TokenStatistics,
        labels_N: Tensor,
        across: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> ObjectiveOutput:
        """The gates' loss of one batch from what the depths said about its tokens.

        Args:
            gates: of every exit.
            scored: all statistics, exits ascending, then the full depth.
            labels_N: shifted labels.
            across: adds up totals over the processes whose tokens the loss is a mean over. The loss is then this
                process's part of it.
        """
        logits_NKG = gate_logits(gates, scored, labels_N)
        nll_EN = scored.nll[:, labels_N != IGNORE_INDEX]
        costs_E, cost_weights_K = nll_EN.new_tensor(self._costs), nll_EN.new_tensor(self._cost_weights)
        optimal_NK = optimal_exit(nll_EN, costs_E, cost_weights_K)
        targets_NKG = stop_targets(optimal_NK, len(self.exit_layers)).to(logits_NKG.dtype)
        tokens = across(nll_EN.new_tensor(float(len(optimal_NK))))
        balance_KG = class_balance(across(targets_NKG.sum(0)), tokens) if self.class_balance else None
        loss = gate_loss(logits_NKG, targets_NKG, tokens, balance_KG)
        sums = {f"ce/{depth_name(layer)}": nll_EN[row].sum() for row, layer in enumerate(self._layers)}
        sums |= self._depths("optimal_depth", optimal_NK)
        sums |= self._depths("depth", chosen_exit(logits_NKG.detach() >= 0))
        values = across(torch.stack([total.to(nll_EN.dtype) for total in sums.values()])) / tokens.clamp(min=1)
        terms = {**dict(zip(sums, values, strict=True)), "gate_bce": across(loss.detach())}
        return ObjectiveOutput(loss, terms, None, self._layers)

    def _depths(self, name: str, places_NK: Tensor) -> dict[str, Tensor]:
        """Sum over tokens of the depth in blocks of places in the list of depths, for every cost weight."""
        blocks_E = torch.tensor([*self.exit_layers, self.num_blocks], device=places_NK.device, dtype=torch.float32)
        sums_K = blocks_E[places_NK].sum(0)
        return {f"gate/{cost_name(w)}/{name}": total for w, total in zip(self._cost_weights, sums_K, strict=True)}


class _ExitShares:
    """Weights of tokens at an exit: the probability to leave there, the mean over cost weights.

    Called for the exits of a chunk in their order, it keeps the probability left over after the exits so far.

    Args:
        gates: of every exit.
        index_N: index of every token among the generated ones.
    """

    def __init__(self, gates: Mapping[int, Gate], index_N: Tensor) -> None:
        self._gates = [gates[layer] for layer in sorted(gates)]
        self._index_N = index_N
        self._left_CK: Tensor | None = None

    def __call__(self, statistics: TokenStatistics, exit_index: int, rows_C: slice | Tensor) -> Tensor:
        if exit_index == len(self._gates):
            assert self._left_CK is not None
            return self._left_CK.mean(-1)
        gate_CK = self._gates[exit_index](stack_features(statistics), self._index_N[rows_C]).sigmoid()
        left_CK = torch.ones_like(gate_CK) if exit_index == 0 or self._left_CK is None else self._left_CK
        share_CK, self._left_CK = take_share(gate_CK, left_CK)
        return share_CK.mean(-1)
