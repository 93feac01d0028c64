"""Exit policies: small objects that say which blocks a token runs; one table parses their strings.

| string | meaning |
|---|---|
| ``never`` | every token runs all blocks: the plain model |
| ``always:6`` | every token, the prompt's too, runs blocks 1..6 and the head of exit 6: the backbone cut at 6 |
| ``threshold:0.9`` | leave at the first exit whose confidence is above 0.9 |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor

from eetrain.decoding.confidence import MEASURES, Evidence
from eetrain.errors import ConfigError

Repair = Literal["recompute", "propagate"]


@dataclass(frozen=True)
class Route:
    """Where a token may stop: it is tested at ``exits`` and stops after block ``end`` at the latest.

    Attributes:
        exits: blocks below ``end``, ascending.
        end: the deepest block any token runs.
    """

    exits: tuple[int, ...]
    end: int

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Ends of the block ranges a token runs through."""
        return (*self.exits, self.end)


class Policy(ABC):
    """Decides the depth of each token.

    Attributes:
        repair: what becomes of keys and values of blocks a token did not run. ``recompute``: the token waits and
            is taken along when a later one goes deeper (EE-LLM, arXiv 2312.04916); ``propagate``: they are
            projected from the state it left with (CALM, arXiv 2207.07061), when a later token goes that deep.
        cap: under ``recompute``, how many tokens of a row may wait before one must run all blocks.
        ends_at_exit: a route that ends at the last block uses an exit there, if the model has one.
    """

    repair: Repair = "recompute"
    cap: int = 8
    ends_at_exit: bool = False

    @abstractmethod
    def route(self, exit_layers: Sequence[int], num_blocks: int) -> Route:
        """Where tokens may stop in a model with these exits.

        Raises:
            ConfigError: the policy does not fit the model.
        """

    def leave(self, evidence: Evidence) -> Tensor:
        """Which rows stop at this exit, ``[R]`` bool."""
        raise AssertionError(f"{self} tests no exit, but was asked about exit {evidence.exit}")


@dataclass(frozen=True)
class Never(Policy):
    """The plain model."""

    def route(self, exit_layers: Sequence[int], num_blocks: int) -> Route:
        """One range over all blocks."""
        return Route((), num_blocks)

    def __str__(self) -> str:
        return "never"


@dataclass(frozen=True)
class Always(Policy):
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
                hint=f"Exits stand after blocks {_listed(exit_layers)}.",
            )
        return Route((), self.layer)

    def __str__(self) -> str:
        return f"always:{self.layer}"


@dataclass(frozen=True)
class Threshold(Policy):
    """Leave at the first exit whose confidence is above a value.

    Args:
        value: strictly more confident than this leaves; above 1 is never reached by a probability.
        measure: ``max``, ``margin``, ``entropy`` or ``saturation``; see :mod:`eetrain.decoding.confidence`.
        repair: see :class:`Policy`.
        cap: see :class:`Policy`.
        exits: test only these exits; all by default.
    """

    value: float
    measure: str = "max"
    repair: Repair = "recompute"
    cap: int = 8
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _one_of("measure", self.measure, tuple(MEASURES))
        _one_of("repair", self.repair, get_args(Repair))
        if math.isnan(self.value):
            raise ConfigError("threshold:nan lets no token leave: nan is not a number.", hint="For example 0.9.")
        if self.cap < 1:
            raise ConfigError(f"cap={self.cap}, must be at least 1.", hint="Use never to turn exits off.")

    def route(self, exit_layers: Sequence[int], num_blocks: int) -> Route:
        """Tested at every exit below the full depth."""
        wanted = tuple(exit_layers) if self.exits is None else tuple(sorted(set(self.exits)))
        missing = [layer for layer in wanted if layer not in exit_layers]
        inner = tuple(layer for layer in wanted if layer < num_blocks)
        if missing or not inner:
            found = f"no exit after block {missing[0]}" if missing else "no exit below its last block"
            raise ConfigError(
                f"Exit policy {self}: the model has {found}.",
                hint=f"Exits stand after blocks {_listed(exit_layers)}.",
            )
        return Route(inner, num_blocks)

    def leave(self, evidence: Evidence) -> Tensor:
        """Rows whose confidence is above the value."""
        return MEASURES[self.measure](evidence) > self.value

    def __str__(self) -> str:
        short = f"{self.value:g}"
        text = f"threshold:{short if float(short) == self.value else repr(self.value)}"
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                shown = "+".join(map(str, value)) if isinstance(value, tuple) else value
                text += f",{field.name}={shown}"
        return text


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known.", hint=f"One of: {', '.join(known)}.")


def _exits(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+"))


_OPTIONS: dict[str, Callable[[str], Any]] = {"measure": str, "repair": str, "cap": int, "exits": _exits}
_POLICIES: dict[str, tuple[type[Policy], Callable[[str], Any] | None, tuple[str, ...]]] = {
    "never": (Never, None, ()),
    "always": (Always, int, ()),
    "threshold": (Threshold, float, tuple(_OPTIONS)),
}
_FORMS = "never, always:6, threshold:0.9, threshold:0.9,measure=margin,repair=propagate,cap=8,exits=3+6"


def parse_policy(text: str | Policy) -> Policy:
    """The policy a string stands for; a policy object is returned as it is.

    Raises:
        ConfigError: the string is none of the known forms.
    """
    if isinstance(text, Policy):
        return text
    head, *options = (part.strip() for part in text.split(","))
    name, _, argument = head.partition(":")
    if name not in _POLICIES:
        raise _not_parsed(text, f"{name!r} is not a policy")
    kind, read, allowed = _POLICIES[name]
    if (read is None) != (argument == ""):
        raise _not_parsed(text, f"{name!r} takes {'no' if read is None else 'one'} argument")
    values: list[Any] = [] if read is None else [_read(text, read, argument)]
    named: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in allowed or key in named:
            raise _not_parsed(text, f"{key!r} is not an option of {name!r}, or stands there twice")
        named[key] = _read(text, _OPTIONS[key], value)
    return kind(*values, **named)


def _read(text: str, read: Callable[[str], Any], value: str) -> Any:
    try:
        return read(value)
    except ValueError:
        raise _not_parsed(text, f"{value!r} is not a number") from None


def _not_parsed(text: str, why: str) -> ConfigError:
    return ConfigError(f"Exit policy {text!r} does not parse: {why}.", hint=f"For example {_FORMS}.")
