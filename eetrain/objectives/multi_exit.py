"""Joint training of a backbone and its exits by a weighted sum of cross-entropies (EE-LLM)."""

from __future__ import annotations

from collections.abc import Sequence

from eetrain.errors import ConfigError
from eetrain.objectives.linear_ce import Kernel
from eetrain.objectives.objective import FULL
from eetrain.objectives.teacher import Distillation
from eetrain.objectives.weighted_sum import WeightedSum
from eetrain.objectives.weights import (
    ExitWeights,
    ExitWeightSchedule,
    ScheduleForm,
    check_schedule,
    check_weight,
)


class MultiExitCrossEntropy(WeightedSum):
    """``L = sum_i w_i(t) CE_i + w_full CE_full``: all parameters learn from every exit.

    EE-LLM (arXiv 2312.04916), the objective of its section on training, with its constant, linear and cosine
    weight schedules. The paper sets ``w_full = 1`` and, with exits at a quarter and half of the depth,
    ``w = [0.25, 0.5]`` (1.3B, tied matrices) or ``[0.1, 0.2]`` (7B and up, untied). A model without exits
    is trained as a plain language model.

    Example::

        MultiExitCrossEntropy(weights=[0.25, 0.5], schedule="linear", schedule_steps=1000)

    Args:
        weights: of the exits: one number, a list with the shallowest exit first, or a dict by layer.
        full_weight: of the full depth; at 0 blocks beyond the deepest exit neither run nor learn.
        schedule: how exit weights reach ``weights``.
        initial_weights: where they start, written like ``weights``; 0 (a warm-up) if left out.
        schedule_steps: optimizer steps until they are reached.
        kernel: ``"cce"`` uses the cut-cross-entropy GPU kernels for steps that ask for no statistics.
        distillation: how exits learn from the full depth, whose own loss stays plain; from labels alone if left out.

    Raises:
        ConfigError: ``full_weight`` is no weight, the schedule is contradictory, or exits are to learn from a full
            depth that nothing trains.
    """

    def __init__(
        self,
        weights: ExitWeights = 1.0,
        full_weight: float = 1.0,
        schedule: ScheduleForm = "constant",
        initial_weights: ExitWeights | None = None,
        schedule_steps: int = 0,
        kernel: Kernel = "torch",
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(kernel=kernel, distillation=distillation)
        self.full_weight = check_weight(full_weight, "full_weight")
        if distillation is not None and full_weight == 0:
            raise ConfigError(
                "full_weight is 0, and exits are distilled from the full depth: nothing would train it while the "
                "blocks beneath it change.",
                hint="give the full depth a weight, or use EETuning, which leaves the backbone as it is.",
            )
        self._settings = (weights, schedule, initial_weights, schedule_steps)
        check_schedule(schedule, initial_weights, schedule_steps)
        self._schedule = ExitWeightSchedule({}, {})

    def needs_full_depth(self) -> bool:
        """Whether the full depth has a weight."""
        return self.full_weight > 0

    def bind(self, exit_layers: Sequence[int], num_blocks: int) -> None:
        """Check the weights against the exits; see :meth:`Objective.bind`."""
        super().bind(exit_layers, num_blocks)
        weights, form, initial, steps = self._settings
        self._schedule = ExitWeightSchedule.parse(weights, self.exit_layers, form=form, initial=initial, steps=steps)
        if not self.needs_full_depth() and not any(self._schedule.final.values()):
            raise ConfigError(
                f"full_weight is 0 and so is the weight of every exit (exits at {list(self.exit_layers)}).",
                hint="give the full depth or at least one exit a weight.",
            )

    def depth_weights(self, step: int) -> dict[int, float]:
        """The exits' weights at this step, and the full depth's; see :meth:`Objective.depth_weights`."""
        weights = self._schedule.at(step)
        return {**weights, FULL: self.full_weight} if self.needs_full_depth() else weights
