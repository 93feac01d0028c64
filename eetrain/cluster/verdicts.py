"""Which process of a run was lost or failed first: what is known of each, and what follows from it.

Nothing here talks to anybody: it is told what happened and when. :mod:`eetrain.cluster.peers` listens and acts.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eetrain.errors import EETrainError

# Seconds after the first failure of a process in which the others may come to the same one.
SETTLE = 10.0
# Seconds in which a machine that is gone is noticed, see `peers.keep_alive`; and how long a failure that only says that
# somebody else is gone waits for the news of who it was.
NOTICE = 30.0
ECHO = NOTICE + 10.0

ADVICE = (
    "The kernel's log (dmesg) or the scheduler says why; out of memory is the usual cause. "
    "A fit goes on with the same command and --resume auto."
)
_LONGEST_LINE = 300
_LONGEST_TRACE = 20_000


@dataclass(frozen=True)
class Peer:
    """A process of the run.

    Args:
        rank: its number, from 0.
        host: name of its machine.
        pid: number of the process there.
    """

    rank: int
    host: str
    pid: int


@dataclass(frozen=True)
class Failure:
    """An exception, as other processes hear of it.

    Args:
        line: type and first line of the message.
        hint: what to do about it, if it says so.
        trace: its traceback, for errors that are not the user's.
        echo: whether it only says that another process is gone.
    """

    line: str
    hint: str = ""
    trace: str = ""
    echo: bool = False

    @classmethod
    def of(cls, error: Exception, *, echo: bool = False, traced: bool = True) -> Failure:
        """Put an exception into words.

        Args:
            error: the exception.
            echo: whether it only says that another process is gone.
            traced: with its traceback.
        """
        message, hint = (error.message, error.hint) if isinstance(error, EETrainError) else (str(error), "")
        lines = message.strip().splitlines() or [""]
        # A worker of torch's DataLoader puts its whole traceback into the message, and what happened at its end.
        said = lines[-1] if lines[0].startswith("Caught ") and "DataLoader" in lines[0] else lines[0]
        line = f"{type(error).__name__}: {said}" if said else type(error).__name__
        trace = "".join(traceback.format_exception(error)) if traced else ""
        return cls(shortened(line), hint, trace[-_LONGEST_TRACE:], echo)


@dataclass(frozen=True)
class Decision:
    """What a run comes to.

    Args:
        text: what one process says before all end; ``None`` if all failed alike, and each goes on with its exception.
    """

    text: str | None


class Known:
    """What is known of the processes, and the decision that follows.

    A process that is lost comes before one that failed, since failures of others follow from it. Of failures the first
    one counts, those that only say that somebody is gone after all others.

    Args:
        peers: all processes, by rank.
    """

    def __init__(self, peers: Sequence[Peer]) -> None:
        self.peers = peers
        self._left: set[int] = set()
        self._failed: dict[int, Failure] = {}
        self._lost: int | None = None
        self._due: float | None = None

    @property
    def due(self) -> float | None:
        """When there is a decision at the latest; ``None`` while nothing is wrong."""
        return self._due

    def leave(self, rank: int) -> None:
        """A process ends well, or as it was asked to."""
        self._left.add(rank)

    def fail(self, rank: int, failure: Failure, now: float) -> None:
        """A process has raised an exception.

        Args:
            rank: of the process.
            failure: the exception.
            now: seconds on any clock.
        """
        self._failed[rank] = failure
        due = now + (ECHO if failure.echo else SETTLE)
        self._due = due if self._due is None else min(self._due, due)

    def gone(self, rank: int) -> None:
        """A process cannot be heard any more; without a word before, it is lost."""
        if rank not in self._left and rank not in self._failed and self._lost is None:
            self._lost = rank

    def decide(self, now: float) -> Decision | None:
        """The decision, if it can be made at ``now``."""
        if self._lost is not None:
            return Decision(loss_text(self.peers, self._lost))
        if self._due is None:
            return None
        if len(self._left | self._failed.keys()) == len(self.peers):
            alike = len({failure.line for failure in self._failed.values()}) == 1
            return Decision(None if alike else self._failure_text())
        return Decision(self._failure_text()) if now >= self._due else None

    def _failure_text(self) -> str:
        rank, failure = min(self._failed.items(), key=lambda item: item[1].echo)  # the first one of equals
        hint = f"HINT: {failure.hint}\n" if failure.hint else ""
        return f"{failure.trace}error: {_named(self.peers, rank)} failed: {failure.line}\n{hint}"


def loss_text(peers: Sequence[Peer], rank: int) -> str:
    """What is said of a process that ended without a word.

    Args:
        peers: all processes, by rank.
        rank: of the lost one.
    """
    return f"error: {_named(peers, rank)} was killed or lost; the job ends.\nHINT: {ADVICE}\n"


def speaker(peers: Sequence[Peer], left: Collection[int], *, machine_gone: bool) -> int:
    """Who speaks when rank 0 is lost: the lowest of the others that is still there, as far as they can know.

    Args:
        peers: all processes, by rank.
        left: ranks that ended well before.
        machine_gone: whether the machine of rank 0 does not answer, and its other processes are lost with it.
    """
    others = [peer for peer in peers[1:] if peer.rank not in left]
    elsewhere = [peer for peer in others if peer.host != peers[0].host]
    return min(peer.rank for peer in (elsewhere if machine_gone and elsewhere else others))


def shortened(text: str) -> str:
    """``text`` in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def _named(peers: Sequence[Peer], rank: int) -> str:
    peer = peers[rank]
    return f"process {rank} of {len(peers)} (host {peer.host}, pid {peer.pid})"
