"""Dropping whole blocks in training: probabilities as pure arithmetic, and the draw.

Shape suffixes: ``L`` blocks, ``B`` rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from eetrain.errors import ConfigError

DropoutDepth = Literal["exponential", "linear", "uniform"]
DropoutTime = Literal["constant", "exponential", "progressive"]
DropoutUnit = Literal["sample", "batch"]


@dataclass(frozen=True)
class LayerDropout:
    """Block ``l`` is left out at step ``t`` with probability ``p_{l,t} = S(t) D(l) rate``: its input passes by.

    With ``l`` from 0 and ``t`` from 0::

        depth:  exponential  D = exp(l ln2 / (L - 1)) - 1     linear  D = (l + 1) / L     uniform  D = 1
        time:   exponential  S = exp(t ln2 / (T - 1)) - 1     constant  S = 1     progressive  S = 1 - exp(-gamma t)

    What a kept block adds is not scaled up, and evaluation drops nothing. The defaults are those of LayerSkip
    (arXiv 2404.16710) for models that were trained before; from scratch it takes ``time: exponential``.

    ``depth: uniform, unit: batch`` is LayerDrop (Fan et al. 2019, arXiv 1909.11556), which then decodes with every
    other block, say. ``depth: linear, time: progressive, unit: batch`` with ``rate = 1 - theta_bar`` is progressive
    layer dropping (PLD, arXiv 2010.13369): block ``i``, from 1, is kept with ``1 - i / L (1 - theta(t))`` and
    ``theta(t) = (1 - theta_bar) exp(-gamma t) + theta_bar``. Where we differ from PLD: it divides what a kept block
    adds by the probability to keep it, which is left out here.

    A sample is a row of the batch: all documents packed into it share a draw. Draws come from torch's global generator.

    Args:
        rate: the largest probability, in [0, 1].
        depth: ``D``.
        time: ``S``; after ``T`` steps it stays.
        blocks: those that may be dropped, from 1; all if left out.
        unit: what shares a draw: a ``sample``, or the ``batch`` of a process.
        steps: ``T``; the length of the run if left out.
        gamma: of ``progressive``, per step; ``100 / T`` if left out.

    Raises:
        ConfigError: a value out of range, or one that the other settings would ignore.
    """

    rate: float
    depth: DropoutDepth = "exponential"
    time: DropoutTime = "constant"
    blocks: list[int] | None = None
    unit: DropoutUnit = "sample"
    steps: int | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        # Above 1 so would be the probability of the last block.
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"dropout.rate={self.rate}.", hint="A probability is a number from 0 to 1.")
        choices = {"depth": DropoutDepth, "time": DropoutTime, "unit": DropoutUnit}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(
                    f"dropout.{name}={getattr(self, name)!r} is not known.",
                    hint=f"One of: {', '.join(get_args(allowed))}.",
                )
        if self.gamma is not None and (self.time != "progressive" or not 0 < self.gamma < math.inf):
            raise ConfigError(
                f"dropout.gamma={self.gamma} and dropout.time={self.time}.",
                hint="gamma is a number above 0 and goes with time=progressive only.",
            )
        if self.steps is not None and (self.steps < 1 or self.time == "constant" or self.gamma is not None):
            raise ConfigError(
                f"dropout.steps={self.steps}, dropout.time={self.time} and dropout.gamma={self.gamma}.",
                hint="steps is 1 or more and goes with time=exponential, or time=progressive without gamma.",
            )

    @property
    def needs_length(self) -> bool:
        """Whether the length of the run decides."""
        return self.time != "constant" and self.steps is None and self.gamma is None

    def check(self, num_blocks: int) -> None:
        """Check ``blocks`` against a model.

        Raises:
            ConfigError: blocks that the model does not have, or named twice, or none.
        """
        blocks = self.blocks
        if blocks is None:
            return
        if not blocks or len(set(blocks)) != len(blocks) or not all(1 <= block <= num_blocks for block in blocks):
            raise ConfigError(
                f"dropout.blocks={blocks} of a model with {num_blocks} blocks.",
                hint=f"Name each block once, from 1 to {num_blocks}, or leave it out for all of them.",
            )

    def probabilities(self, step: int, num_blocks: int, run_steps: int | None = None) -> list[float]:
        """``p`` of every block at a step.

        Args:
            step: ``t``.
            num_blocks: ``L``.
            run_steps: length of the run, where it is needed.
        """
        now = self.rate * self._time_scale(step, run_steps)
        among: Sequence[int] = range(1, num_blocks + 1) if self.blocks is None else self.blocks
        return [now * self._depth_scale(place, num_blocks) * (place + 1 in among) for place in range(num_blocks)]

    def draw(self, step: int, num_blocks: int, rows: int, run_steps: int | None = None) -> Tensor | None:
        """Which blocks run, bool ``[L, B]`` on the CPU, or ``None`` without a draw if none can be dropped.

        Args:
            step: see :meth:`probabilities`.
            num_blocks: see there.
            rows: ``B``.
            run_steps: see :meth:`probabilities`.
        """
        dropped_L = torch.tensor(self.probabilities(step, num_blocks, run_steps), dtype=torch.float64)
        if not dropped_L.any():
            return None
        drawn = torch.rand(num_blocks, rows if self.unit == "sample" else 1, dtype=torch.float64)
        return (drawn >= dropped_L[:, None]).expand(-1, rows)

    def _depth_scale(self, place: int, num_blocks: int) -> float:
        if self.depth == "exponential":
            return math.exp(place * math.log(2) / max(num_blocks - 1, 1)) - 1
        return (place + 1) / num_blocks if self.depth == "linear" else 1.0

    def _time_scale(self, step: int, run_steps: int | None) -> float:
        if self.time == "constant":
            return 1.0
        if self.gamma is not None:
            return 1 - math.exp(-self.gamma * step)
        steps = self.steps or run_steps
        assert steps is not None, "the run was not prepared"
        if self.time == "progressive":
            return 1 - math.exp(-100 * step / steps)
        return math.exp(min(step / max(steps - 1, 1), 1) * math.log(2)) - 1
