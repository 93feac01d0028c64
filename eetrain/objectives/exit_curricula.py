"""Which exits learn at a step: pure arithmetic, a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from eetrain.errors import ConfigError

CurriculumForm = Literal["none", "rotational", "gradual"]


@dataclass(frozen=True)
class ExitCurriculum:
    """LayerSkip's curricula (arXiv 2404.16710, section on the early-exit loss); the full depth is always on.

    ``rotational``: the exit with place ``k``, counted from 0 among the exits ascending, is on at step ``t`` iff
    ``(k - t) mod R = 0``, once in ``R`` steps. With exits after every block ``k`` is the paper's ``l``.

    ``gradual``: the exit after block ``l + 1`` is on iff ``t / T >= (L - l) / (2 L)``: deepest first, all of them from
    ``T / 2`` on.

    Args:
        form: ``none`` has all exits on.
        period: ``R``, for ``rotational``.
        steps: ``T``, for ``gradual``; the length of the run if left out.

    Raises:
        ConfigError: an unknown form, a period or steps below 1, or that the form lacks or would ignore.
    """

    form: CurriculumForm = "none"
    period: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.form not in get_args(CurriculumForm):
            raise ConfigError(f"curriculum={self.form!r} is not known.", hint="One of: none, rotational, gradual.")
        if (self.form == "rotational") != (self.period is not None) or (self.period is not None and self.period < 1):
            raise ConfigError(
                f"curriculum={self.form} and period={self.period}.",
                hint="curriculum=rotational takes a period of 1 or more steps, the others take none.",
            )
        if (self.form != "gradual" and self.steps is not None) or (self.steps is not None and self.steps < 1):
            raise ConfigError(
                f"curriculum={self.form} and curriculum_steps={self.steps}.",
                hint="curriculum=gradual takes curriculum_steps of 1 or more, or the run's length if left out.",
            )

    @property
    def needs_length(self) -> bool:
        """Whether the length of the run decides."""
        return self.form == "gradual" and self.steps is None

    def on(self, step: int, exit_layers: Sequence[int], num_blocks: int, run_steps: int | None = None) -> list[int]:
        """The exits that are on.

        Args:
            step: ``t``, optimizer steps from 0.
            exit_layers: blocks with an exit, ascending.
            num_blocks: ``L``.
            run_steps: length of the run, where it is needed.
        """
        if self.form == "rotational":
            assert self.period is not None
            return [layer for place, layer in enumerate(exit_layers) if (place - step) % self.period == 0]
        if self.form == "gradual":
            steps = self.steps or run_steps
            assert steps is not None, "the run was not prepared"
            # Whole numbers: with l = layer - 1, t / T >= (L - l) / (2 L).
            return [layer for layer in exit_layers if 2 * num_blocks * step >= (num_blocks - layer + 1) * steps]
        return list(exit_layers)
