"""Exit policies: small objects that say which blocks a token runs; one table parses their strings.

| string | meaning |
|---|---|
| ``never`` | every token runs all blocks: the plain model |
| ``always:6`` | every token, the prompt's too, runs blocks 1..6 and the head of exit 6: the backbone cut at 6 |
| ``threshold:0.9`` | leave at the first exit whose confidence is above 0.9 |
| ``gate:0.5`` | leave at the first exit whose trained gate says 0.5 or more |
| ``speculative:exit=3,draft=4`` | draft with exit 3, verify with the other blocks: the plain model's tokens, sooner |
| ``skipdecode:max=9,min=4`` | depth by position, see :mod:`eetrain.schedules.specs` for this and its relatives |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from eetrain import shorthand
from eetrain.decoding.confidence import MEASURES, Evidence
from eetrain.decoding.policy import Decodable, ExitPolicy, Policy, Repair, Route, check_full_depth, listed
from eetrain.decoding.speculation.policy import Speculative, parse_exits
from eetrain.decoding.speculation.stopping import parse_stop
from eetrain.errors import ConfigError
from eetrain.exits.gating import conditional
from eetrain.schedules import SCHEDULES, ScheduleSpec
from eetrain.shorthand import Form, integers, numbers, spell, truth


@dataclass(frozen=True)
class Never(ExitPolicy):
    """The plain model."""

    lossless = True

    def route(self, exit_layers: Sequence[int], num_blocks: int) -> Route:
        """One range over all blocks."""
        return Route((), num_blocks)

    def __str__(self) -> str:
        return "never"


@dataclass(frozen=True)
class Always(ExitPolicy):
    """The backbone cut at one exit.

    Args:
        layer: the exit.
    """

    layer: int
    ends_at_exit = True

    def route(self, exit_layers: Sequence[int], num_blocks: int) -> Route:
        """One range that ends at the exit; deeper blocks never run, so nothing needs repair."""
        if self.layer not in exit_layers:
            raise ConfigError(
                f"Exit policy {self}: the model has no exit after block {self.layer}.",
                hint=f"Exits stand after blocks {listed(exit_layers)}.",
            )
        return Route((), self.layer)

    def __str__(self) -> str:
        return spell("always", self, "layer")


@dataclass(frozen=True)
class Threshold(ExitPolicy):
    """Leave at the first exit whose confidence is above a value.

    Args:
        value: strictly more confident than this leaves; above 1 is never reached by a probability.
        measure: ``max``, ``margin``, ``entropy`` or ``saturation``; see :mod:`eetrain.decoding.confidence`.
        repair: see :class:`ExitPolicy`.
        cap: see :class:`ExitPolicy`.
        exits: test only these exits; all by default.
    """

    value: float
    measure: str = "max"
    repair: Repair = "recompute"
    cap: int = 8
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _one_of("measure", self.measure, tuple(MEASURES))
        _check_repair(self)
        if math.isnan(self.value):
            raise ConfigError("threshold:nan lets no token leave: nan is not a number.", hint="For example 0.9.")

    def route(self, exit_layers: Sequence[int], num_blocks: int) -> Route:
        """Tested at every exit below the full depth."""
        wanted = tuple(exit_layers) if self.exits is None else tuple(sorted(set(self.exits)))
        return _inner_route(self, wanted, exit_layers, num_blocks)

    def leave(self, evidence: Evidence) -> Tensor:
        """Rows whose confidence is above the value."""
        return MEASURES[self.measure](evidence) > self.value

    def __str__(self) -> str:
        return spell("threshold", self, "value")


@dataclass(frozen=True)
class Gated(ExitPolicy):
    """Leave at the first exit whose gate, trained with joint gating, is at least a value (JEI-DNN, arXiv 2310.09163).

    Args:
        value: for all exits, or one for each exit, shallowest first (``0.4+0.5+0.6``).
        cost_weight: which gates of a checkpoint with several; may be left out where there is one.
        conditional: compare the probability of leaving here *given* that the token came this far, as the paper's code
            does, instead of the gate's own output. It leaves at the same exit or a shallower one; where gates step
            from 0 to 1, as their targets do, the two agree.
        repair: see :class:`ExitPolicy`.
        cap: see :class:`ExitPolicy`.
    """

    value: tuple[float, ...]
    cost_weight: float | None = None
    conditional: bool = False
    repair: Repair = "recompute"
    cap: int = 8
    asks_gates = True

    def __post_init__(self) -> None:
        _check_repair(self)
        outside = [value for value in self.value if not value >= 0]
        if outside:
            raise ConfigError(f"gate:{outside[0]:g} is not a probability.", hint="For example gate:0.5.")

    def check(self, model: Decodable) -> None:
        """See :meth:`Policy.check`."""
        gates = model.config.gates
        if gates is None:
            raise ConfigError(
                f"Exit policy {self}: the model has no gates.",
                hint="Train them with eetrain.objectives.JointGating, or use threshold:0.9.",
            )
        super().check(model)
        known = ", ".join(f"{weight:g}" for weight in gates.cost_weights)
        if self.cost_weight is None and len(gates.cost_weights) > 1:
            raise ConfigError(
                f"Exit policy {self}: the model has gates for {len(gates.cost_weights)} cost weights.",
                hint=f"Choose one of {known}: gate:0.5,cost_weight={gates.cost_weights[0]:g}.",
            )
        if self.cost_weight is not None and self.cost_weight not in gates.cost_weights:
            raise ConfigError(
                f"Exit policy {self}: no gates were trained for cost_weight={self.cost_weight:g}.",
                hint=f"There are gates for {known}.",
            )

    def route(self, exit_layers: Sequence[int], num_blocks: int) -> Route:
        """Tested at every exit below the full depth."""
        route = _inner_route(self, tuple(exit_layers), exit_layers, num_blocks)
        if len(self.value) not in (1, len(route.exits)):
            raise ConfigError(
                f"Exit policy {self} has {len(self.value)} values for {len(route.exits)} exits.",
                hint=f"Give one for all, or one for each of the exits after blocks {listed(route.exits)}.",
            )
        return route

    def leave(self, evidence: Evidence) -> Tensor:
        """Rows whose gate opens."""
        gates_RG = evidence.gates_RG(self.cost_weight)
        chance_R = conditional(gates_RG)[:, -1] if self.conditional else gates_RG[:, -1]
        return chance_R >= self.value[min(gates_RG.shape[1], len(self.value)) - 1]

    def __str__(self) -> str:
        return spell("gate", self, "value")


@dataclass(frozen=True)
class Scheduled(Policy):
    """Depth by position, fixed in advance.

    Args:
        spec: the schedule, before it knows the model.
    """

    spec: ScheduleSpec

    def check(self, model: Decodable) -> None:
        """See :meth:`Policy.check`."""
        self.spec.build(model.num_blocks)
        check_full_depth(self, model)

    def __str__(self) -> str:
        return str(self.spec)


def _inner_route(policy: ExitPolicy, wanted: tuple[int, ...], exit_layers: Sequence[int], num_blocks: int) -> Route:
    missing = [layer for layer in wanted if layer not in exit_layers]
    inner = tuple(layer for layer in wanted if layer < num_blocks)
    if missing or not inner:
        found = f"no exit after block {missing[0]}" if missing else "no exit below its last block"
        raise ConfigError(
            f"Exit policy {policy}: the model has {found}.", hint=f"Exits stand after blocks {listed(exit_layers)}."
        )
    return Route(inner, num_blocks)


def _check_repair(policy: ExitPolicy) -> None:
    _one_of("repair", policy.repair, get_args(Repair))
    if policy.cap < 1:
        raise ConfigError(f"cap={policy.cap}, must be at least 1.", hint="Use never to turn exits off.")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known.", hint=f"One of: {', '.join(known)}.")


_POLICIES: dict[str, Form] = {
    "never": Form(Never, None, {}),
    "always": Form(Always, "layer", {"layer": int}),
    "threshold": Form(
        Threshold, "value", {"value": float, "measure": str, "repair": str, "cap": int, "exits": integers}
    ),
    "gate": Form(
        Gated,
        "value",
        {"value": numbers, "cost_weight": float, "conditional": truth, "repair": str, "cap": int},
    ),
    "speculative": Form(Speculative, None, {"exit": parse_exits, "draft": integers, "stop": parse_stop}),
    **SCHEDULES,
}
_EXAMPLES = (
    "never, always:6, threshold:0.9, threshold:0.9,measure=margin,repair=propagate,cap=8,exits=3+6, "
    "gate:0.5,cost_weight=1, speculative:exit=3,draft=4,stop=0.4, skipdecode:max=9,min=4, static:6, unified:2, "
    "d3:0.98, hsd:6"
)


def parse_policy(text: str | Policy) -> Policy:
    """The policy a string stands for; a policy object is returned as it is.

    Raises:
        ConfigError: the string is none of the known forms.
    """
    if isinstance(text, Policy):
        return text
    found = shorthand.parse(text, _POLICIES, "Exit policy", _EXAMPLES)
    policy: Policy = Scheduled(found) if isinstance(found, ScheduleSpec) else found
    return policy
