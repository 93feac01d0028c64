"""How the processes of a run agree: each says something, and each hears what all said."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Processes(Protocol):
    """The processes that do something together."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; nobody goes on before all have come here."""


class Alone:
    """One process."""

    rank = 0

    def gather(self, value: T) -> list[T]:
        """Its own value."""
        return [value]


class TorchProcesses:
    """The default group of `torch.distributed`; values are pickled between its processes."""

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        values: list[T | None] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]


ALONE = Alone()


def present_processes() -> Processes:
    """All processes of this run."""
    return TorchProcesses() if dist.is_available() and dist.is_initialized() else ALONE
