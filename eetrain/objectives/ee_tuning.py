"""Training exits of a frozen backbone, each by its own loss (EE-Tuning, self-supervised exits, EESD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from eetrain.errors import ConfigError
from eetrain.objectives.linear_ce import Kernel
from eetrain.objectives.teacher import Distillation
from eetrain.objectives.token_statistics import TokenStatistics
from eetrain.objectives.weighted_sum import WeightedSum
from eetrain.objectives.weights import ExitWeights, ExitWeightSchedule


class EETuning(WeightedSum):
    """``L = sum_l w_l mean_t [u_lt CE_lt]`` over the exits of a backbone that does not change.

    EE-Tuning (arXiv 2402.00518), stage 2. The gradients of exits with parameters of their own are disjoint,
    so exits trained together equal exits trained one by one, and ``w_l`` only scales their learning rate
    under plain SGD. With ``confidence_weights``, ``u_lt = sg(max_v p_lt(v))``: tokens count by the exit's own
    confidence, without renormalisation, which concentrates learning where the exit would fire. The paper
    offers this as an option beside plain cross-entropy (``u = 1``), which is the default here as well.

    With ``distillation`` exits learn what the frozen full depth says, which runs without autograd: self-supervised
    exits (arXiv 2407.21082), and with ``exits.head=block`` EESD's extra block (arXiv 2406.03853).

    Example::

        EETuning(distillation=Distillation(share=1.0))

    Args:
        weights: of the exits: one number, a list with the shallowest exit first, or a dict by layer.
        confidence_weights: whether tokens count by the exit's confidence.
        kernel: ``"cce"`` uses the cut-cross-entropy GPU kernels for steps that ask for no statistics.
        distillation: how exits learn from the full depth; from labels alone if left out.

    Raises:
        ConfigError: the kernel cannot weight by confidence, or distil.
    """

    freezes_backbone: ClassVar[bool] = True

    def __init__(
        self,
        weights: ExitWeights = 1.0,
        confidence_weights: bool = False,
        kernel: Kernel = "torch",
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(_confidence if confidence_weights else None, kernel, distillation)
        if confidence_weights and kernel == "cce":
            raise ConfigError(
                "kernel='cce' computes no confidence, and confidence_weights is on.",
                hint="set kernel='torch'.",
            )
        self._weights = weights
        self._schedule = ExitWeightSchedule({}, {})

    def needs_full_depth(self) -> bool:
        """Whether exits learn from it; if not, the forward pass ends at the deepest exit."""
        return self.distillation is not None

    def bind(self, exit_layers: Sequence[int], num_blocks: int) -> None:
        """Check the weights against the exits, of which there must be one; see :meth:`Objective.bind`."""
        super().bind(exit_layers, num_blocks)
        self._schedule = ExitWeightSchedule.parse(self._weights, self.exit_layers)
        if not any(self._schedule.final.values()):
            raise ConfigError(
                f"EETuning trains nothing: exits are {list(self.exit_layers)}, weights {self._weights!r}.",
                hint="add an exit, or give one a weight.",
            )

    def depth_weights(self, step: int) -> dict[int, float]:
        """The exits' weights, constant; see :meth:`Objective.depth_weights`."""
        return self._schedule.at(step)


def _confidence(statistics: TokenStatistics, exit_index: int, rows_C: slice | Tensor) -> Tensor:
    return statistics.max_prob
