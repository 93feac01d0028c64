"""The contract of exit policies, and where they let tokens stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from eetrain.decoding.confidence import Evidence
from eetrain.errors import ConfigError
from eetrain.exits.config import ExitConfig

Repair = Literal["recompute", "propagate"]


class Decodable(Protocol):
    """What a policy must know of a model to fit it."""

    @property
    def config(self) -> ExitConfig:
        """Its exits and gates."""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Blocks after which exits stand."""

    @property
    def num_blocks(self) -> int:
        """Blocks that are loaded."""

    full_depth_loaded: bool


class Policy(ABC):
    """Decides the depth of each token.

    Attributes:
        lossless: whether tokens are those of the full depth.
    """

    lossless: ClassVar[bool] = False

    @abstractmethod
    def check(self, model: Decodable) -> None:
        """Find out whether the policy fits a model.

        Raises:
            ConfigError: it does not.
        """


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


class ExitPolicy(Policy):
    """Runs blocks from the lowest on and stops at an exit.

    Attributes:
        repair: what becomes of keys and values of blocks a token did not run. ``recompute``: the token waits and
            is taken along when a later one goes deeper (EE-LLM, arXiv 2312.04916); ``propagate``: they are
            projected from the state it left with (CALM, arXiv 2207.07061), when a later token goes that deep.
        cap: under ``recompute``, how many tokens of a row may wait before one must run all blocks.
        ends_at_exit: a route that ends at the last block uses an exit there, if the model has one.
        asks_gates: whether :meth:`leave` looks at gates.
    """

    repair: Repair = "recompute"
    cap: int = 8
    ends_at_exit: ClassVar[bool] = False
    asks_gates: ClassVar[bool] = False

    def check(self, model: Decodable) -> None:
        """See :meth:`Policy.check`."""
        route = self.route(model.exit_layers, model.num_blocks)
        full = route.end == model.num_blocks and not (self.ends_at_exit and route.end in model.exit_layers)
        if full:
            check_full_depth(self, model)

    @abstractmethod
    def route(self, exit_layers: Sequence[int], num_blocks: int) -> Route:
        """Where tokens may stop in a model with these exits.

        Raises:
            ConfigError: the policy does not fit them.
        """

    def leave(self, evidence: Evidence) -> Tensor:
        """Which rows stop at this exit, ``[R]`` bool."""
        raise AssertionError(f"{self} tests no exit, but was asked about exit {evidence.exit}")


def check_full_depth(policy: Policy, model: Decodable) -> None:
    """Refuse a policy that needs blocks which were not loaded."""
    if not model.full_depth_loaded:
        raise ConfigError(
            f"Exit policy {policy} runs the full depth, but only blocks 1..{model.num_blocks} were loaded.",
            hint="Load the whole backbone (depth=None), or use an always:l policy.",
        )


def listed(layers: Sequence[int]) -> str:
    """Blocks in a message."""
    return ", ".join(map(str, layers)) or "none"
