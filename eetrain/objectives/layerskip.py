"""Joint training for early exits and self-speculation: exit loss, curriculum and layer dropout (LayerSkip).

Shape suffixes: ``L`` blocks, ``B`` rows, ``T`` positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from eetrain.errors import ConfigError
from eetrain.objectives.depth_scales import Weighting, normalized_weights
from eetrain.objectives.exit_curricula import CurriculumForm, ExitCurriculum
from eetrain.objectives.layer_dropout import LayerDropout
from eetrain.objectives.linear_ce import Kernel
from eetrain.objectives.objective import Unreached
from eetrain.objectives.teacher import Distillation
from eetrain.objectives.weighted_sum import WeightedSum
from eetrain.objectives.weights import check_weight


class LayerSkip(WeightedSum):
    """``L = sum_l e~(t, l) CE_l`` with ``e~ = C(t, l) e(l) / sum_i C(t, i) e(i)``, while blocks drop out at random.

    LayerSkip (arXiv 2404.16710), its sections on layer dropout and on the early-exit loss. ``C`` is the curriculum,
    1 for exits that are on and always for the full depth; ``e`` the weighting. The paper's exits share the backbone's
    norm and output matrix (``head: tied``) and stand after every block. Exits that are off, or have no weight, are not
    computed at all. What a step does not reach has a gradient of zero, for the loss is a mean over rows and depths.

    ``weighting: uniform`` without curriculum and dropout is the loss of LITE (arXiv 2310.18581); with ``rotational``
    and as many steps as exits, so that one is on at a time, it is the ``(s CE_l + CE_L) / (1 + s)`` of TRL.

    Example::

        LayerSkip(curriculum="rotational", period=4, dropout=LayerDropout(0.1))

    Args:
        weighting: ``sum``: the paper's, under which the exit after block 1 has no weight; ``torchtune``: that of its
            port; ``uniform``: every exit counts ``exit_scale``, the full depth 1. See
            :func:`eetrain.objectives.depth_scales.exit_scale_of`.
        exit_scale: how much exits count; 0 is plain training.
        curriculum: ``none``, ``rotational`` or ``gradual``; see
            :class:`eetrain.objectives.exit_curricula.ExitCurriculum`.
        period: ``R`` of ``rotational``, in optimizer steps.
        curriculum_steps: ``T`` of ``gradual``; the length of the run if left out.
        dropout: of blocks; none if left out.
        kernel: ``"cce"`` uses the cut-cross-entropy GPU kernels for steps that ask for no statistics.
        distillation: exits learn from what the full depth says in the same pass, blocks dropped; labels alone if left
            out.

    Raises:
        ConfigError: an unknown weighting, a scale that is no weight, or a contradictory curriculum.
    """

    unreached: Unreached = "zero"

    def __init__(
        self,
        weighting: Weighting = "sum",
        exit_scale: float = 1.0,
        curriculum: CurriculumForm = "none",
        period: int | None = None,
        curriculum_steps: int | None = None,
        dropout: LayerDropout | None = None,
        kernel: Kernel = "torch",
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(kernel=kernel, distillation=distillation)
        if weighting not in get_args(Weighting):
            raise ConfigError(f"weighting={weighting!r} is not known.", hint="One of: sum, torchtune, uniform.")
        self.weighting: Weighting = weighting
        self.exit_scale = check_weight(exit_scale, "exit_scale")
        self.curriculum = ExitCurriculum(curriculum, period, curriculum_steps)
        self.dropout = dropout
        self.drops_blocks = dropout is not None
        self._run_steps: int | None = None

    def needs_full_depth(self) -> bool:
        """Always: it is on at every step."""
        return True

    def bind(self, exit_layers: Sequence[int], num_blocks: int) -> None:
        """Check exits and blocks against a model; see :meth:`Objective.bind`."""
        super().bind(exit_layers, num_blocks)
        if num_blocks in self.exit_layers:
            raise ConfigError(
                f"LayerSkip weights the last block's output as the full depth, but there is an exit after block "
                f"{num_blocks} of {num_blocks}.",
                hint="Set model.exits.layers to blocks below the last.",
            )
        if self.dropout is not None:
            self.dropout.check(num_blocks)

    def prepare_run(self, total_steps: float, *, trial: bool = False) -> None:
        """Take over the length of the run where it decides; see :meth:`Objective.prepare_run`."""
        if math.isfinite(total_steps):
            self._run_steps = int(total_steps)
            return
        for setting, needed in (
            ("curriculum_steps", self.curriculum.needs_length),
            ("dropout.steps", self.dropout is not None and self.dropout.needs_length),
        ):
            if needed:
                raise ConfigError(
                    f"LayerSkip goes by the length of the run, and this run has no end ({setting} is not set).",
                    hint=f"Set model.objective.init_args.{setting}, or trainer.max_steps.",
                )

    def depth_weights(self, step: int) -> dict[int, float]:
        """Weights of the exits that are on, and of the full depth; see :meth:`Objective.depth_weights`."""
        exits = self.curriculum.on(step, self.exit_layers, self.num_blocks, self._run_steps)
        return normalized_weights(exits, self.num_blocks, self.exit_scale, self.weighting)

    def active_blocks(
        self, labels_BT: Tensor, position_ids: Tensor | None = None, *, step: int, training: bool = True
    ) -> Tensor | None:
        """Blocks that were not dropped, on whole rows; see :meth:`Objective.active_blocks`."""
        if self.dropout is None or not training:
            return None
        rows, length = labels_BT.shape
        runs_LB = self.dropout.draw(step, self.num_blocks, rows, self._run_steps)
        return None if runs_LB is None else runs_LB.to(labels_BT.device)[..., None].expand(-1, -1, length)
