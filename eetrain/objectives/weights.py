"""How much each exit's loss counts, and how that changes over training: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eetrain.errors import ConfigError

ExitWeights = dict[int, float] | list[float] | float
ScheduleForm = Literal["constant", "linear", "cosine"]


def parse_exit_weights(value: ExitWeights, exit_layers: Sequence[int], *, name: str = "weights") -> dict[int, float]:
    """One weight per exit layer from what a user wrote, in ascending order of layers.

    Args:
        value: one number for every exit; a list, shallowest exit first; or a dict from layer to weight.
        exit_layers: the model's exits, in any order: a weight belongs to a layer, not to a place in a list.
        name: the setting's name, for messages.

    Raises:
        ConfigError: a list of the wrong length, a dict that names another set of layers, a weight that is
            negative, infinite or not a number.
    """
    layers = sorted(exit_layers)
    if isinstance(value, Mapping):
        weights = _from_mapping(value, layers, name)
    elif isinstance(value, list | tuple):
        if len(value) != len(layers):
            raise ConfigError(
                f"{name} has {len(value)} entries and the model has {len(layers)} exits, at layers {layers}.",
                hint="give one weight per exit, shallowest first, or a single number for all of them.",
            )
        weights = dict(zip(layers, value, strict=True))
    else:
        weights = dict.fromkeys(layers, value)
    return {layer: check_weight(weight, f"{name} of exit {layer}") for layer, weight in weights.items()}


def check_weight(weight: object, name: str) -> float:
    """``weight`` as a float.

    Raises:
        ConfigError: it is not a finite number of at least 0.
    """
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(float(weight)) or float(weight) < 0:  # type: ignore[arg-type]
        raise ConfigError(f"{name} is {weight!r}.", hint="a loss weight is a finite number, 0 or larger.")
    return float(weight)  # type: ignore[arg-type]


def _from_mapping(value: Mapping[int, float], layers: list[int], name: str) -> dict[int, float]:
    unknown = [layer for layer in value if layer not in layers]
    missing = [layer for layer in layers if layer not in value]
    if unknown:
        raise ConfigError(
            f"{name} names layer {', '.join(map(repr, unknown))}; the model's exits are at layers {layers}.",
            hint="use the exit layers as keys.",
        )
    if missing:
        raise ConfigError(
            f"{name} has no entry for the exit at layer {', '.join(map(str, missing))}.",
            hint="name every exit; 0 keeps one out of the loss.",
        )
    return {layer: value[layer] for layer in layers}


@dataclass(frozen=True)
class ExitWeightSchedule:
    """Exit weights as a pure function of the training step, so that a resumed run needs no state.

    With ``r = min(1, t / T_w)``::

        linear:  w(t) = w_0 + r (w - w_0)
        cosine:  w(t) = w_0 + (1 - cos(pi r)) / 2 (w - w_0)

    and ``w`` from step ``T_w`` on. ``w_0 = 0`` warms the exits up, ``w_0 > w`` cools them down (they act as
    deep supervision early). EE-LLM (arXiv 2312.04916), whose code writes the cosine form as
    ``(1 + cos(pi (r + 1))) / 2``; the two are equal. Build it with :meth:`parse`.

    Args:
        final: ``w`` per exit layer.
        initial: ``w_0`` per exit layer.
        form: ``"constant"`` is ``w`` at every step.
        steps: ``T_w``, optimizer steps until the weights stay; at least 1 unless constant.
    """

    final: Mapping[int, float]
    initial: Mapping[int, float]
    form: ScheduleForm = "constant"
    steps: int = 0

    @classmethod
    def parse(
        cls,
        weights: ExitWeights,
        exit_layers: Sequence[int],
        *,
        form: ScheduleForm = "constant",
        initial: ExitWeights | None = None,
        steps: int = 0,
    ) -> ExitWeightSchedule:
        """A schedule from user input; ``initial`` defaults to 0, a warm-up.

        Raises:
            ConfigError: wrong weights, an unknown form, a form without steps, or steps or initial weights
                that a constant schedule would ignore.
        """
        check_schedule(form, initial, steps)
        final = parse_exit_weights(weights, exit_layers)
        start: ExitWeights = 0.0 if initial is None else initial
        first = parse_exit_weights(start, exit_layers, name="initial_weights")
        return cls(final, final if form == "constant" else first, form, steps)

    def at(self, step: int) -> dict[int, float]:
        """Weight of every exit at optimizer step ``step``, counted from 0."""
        assert step >= 0, f"step {step} lies before the start of training"
        progress = self._progress(step)
        return {
            layer: final if progress == 1.0 else self.initial[layer] + progress * (final - self.initial[layer])
            for layer, final in self.final.items()
        }

    def _progress(self, step: int) -> float:
        if self.form == "constant" or step >= self.steps:
            return 1.0
        ratio = step / self.steps
        return ratio if self.form == "linear" else 0.5 * (1.0 - math.cos(math.pi * ratio))


def check_schedule(form: str, initial: ExitWeights | None, steps: int) -> None:
    """Check that a schedule's settings fit together; this needs no model.

    Raises:
        ConfigError: an unknown form, a form without steps, or settings a constant schedule would ignore.
    """
    if form not in ("constant", "linear", "cosine"):
        raise ConfigError(f"schedule is {form!r}.", hint="use 'constant', 'linear' or 'cosine'.")
    if form == "constant" and (initial is not None or steps != 0):
        raise ConfigError(
            f"schedule is 'constant', but initial_weights is {initial!r} and schedule_steps is {steps}.",
            hint="choose 'linear' or 'cosine', or leave both out.",
        )
    if form != "constant" and steps < 1:
        raise ConfigError(
            f"schedule is {form!r} and schedule_steps is {steps}.",
            hint="set schedule_steps to the number of steps until the weights stay, at least 1.",
        )
