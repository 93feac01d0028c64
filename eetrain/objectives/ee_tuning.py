"""Training exits of a frozen backbone, each by its own cross-entropy (EE-Tuning)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from eetrain.errors import ConfigError
from eetrain.objectives.linear_ce import Kernel, linear_cross_entropy, shift_labels
from eetrain.objectives.objective import HeadInputs, Objective, ObjectiveOutput, assemble, head_inputs
from eetrain.objectives.token_statistics import TokenStatistics
from eetrain.objectives.weights import ExitWeights, ExitWeightSchedule


class EETuning(Objective):
    """``L = sum_l w_l mean_t [u_lt CE_lt]`` over the exits of a backbone that does not change.

    EE-Tuning (arXiv 2402.00518), stage 2. The gradients of exits with parameters of their own are disjoint,
    so exits trained together equal exits trained one by one, and ``w_l`` only scales their learning rate
    under plain SGD. With ``confidence_weights``, ``u_lt = sg(max_v p_lt(v))``: tokens count by the exit's own
    confidence, without renormalisation, which concentrates learning where the exit would fire. The paper
    offers this as an option beside plain cross-entropy (``u = 1``), which is the default here as well.

    Args:
        weights: of the exits: one number, a list with the shallowest exit first, or a dict by layer.
        confidence_weights: whether tokens count by the exit's confidence.
        kernel: ``"cce"`` uses the cut-cross-entropy GPU kernels for steps that ask for no statistics.

    Raises:
        ConfigError: the kernel cannot weight by confidence.
    """

    freezes_backbone: ClassVar[bool] = True

    def __init__(self, weights: ExitWeights = 1.0, confidence_weights: bool = False, kernel: Kernel = "torch") -> None:
        super().__init__()
        if confidence_weights and kernel == "cce":
            raise ConfigError(
                "kernel='cce' computes no confidence, and confidence_weights is on.",
                hint="set kernel='torch'.",
            )
        self._weights = weights
        self._weigh = _confidence if confidence_weights else None
        self._kernel: Kernel = kernel
        self._schedule = ExitWeightSchedule({}, {})

    def needs_full_depth(self) -> bool:
        """Never: the forward pass ends at the deepest exit."""
        return False

    def bind(self, exit_layers: Sequence[int], num_blocks: int) -> None:
        """Check the weights against the exits, of which there must be one; see :meth:`Objective.bind`."""
        super().bind(exit_layers, num_blocks)
        self._schedule = ExitWeightSchedule.parse(self._weights, self.exit_layers)
        if not any(self._schedule.final.values()):
            raise ConfigError(
                f"EETuning trains nothing: exits are {list(self.exit_layers)}, weights {self._weights!r}.",
                hint="add an exit, or give one a weight.",
            )

    def __call__(
        self, output: HeadInputs, labels_BT: Tensor, *, step: int, statistics: bool = False
    ) -> ObjectiveOutput:
        """The loss of one batch; see :meth:`Objective.__call__`."""
        assert self.num_blocks, "bind the objective to a model first"
        weights = self._schedule.at(step)
        hidden, projections = head_inputs(output, self.exit_layers)
        result = linear_cross_entropy(
            hidden,
            projections,
            shift_labels(labels_BT),
            exit_weights=list(weights.values()),
            token_weights=self._weigh,
            statistics="basic" if statistics else "none",
            kernel="torch" if statistics else self._kernel,
        )
        return assemble(output, result.loss, result.exit_losses, self.exit_layers, weights, result.statistics)


def _confidence(statistics: TokenStatistics, exit_index: int, rows_C: slice | Tensor) -> Tensor:
    return statistics.max_prob
