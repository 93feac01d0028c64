"""The processes of a run watch each other: when one is lost, one error names it, and all end at once.

Rank 0 holds a connection to every process. The kernel closes those of a killed process at once, and answers for a busy
one, so that nobody is taken for dead while a step, a compilation or a lock keeps its threads from running. A machine
that is gone stops answering, which TCP notices within :data:`eetrain.cluster.verdicts.NOTICE` seconds. A process that
ends well says goodbye first, one with an exception says which. Rank 0 decides what happened first, one process says it,
and all end.
"""

from __future__ import annotations

import os
import platform
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eetrain.cluster.connections import JOIN_SECONDS, Connection, Door, Message, enter
from eetrain.cluster.verdicts import ECHO, SETTLE, Failure, Known, Peer, loss_text, speaker

Gather = Callable[[Any], list[Any]]

_LAST_WORDS = 5.0  # seconds in which rank 0 tells the others that it leaves


@dataclass(frozen=True)
class Ending:
    """How a run ends when one of its processes is lost.

    Args:
        speak: show a text to the user; called in one process.
        end: end the process; called in all of them, after the text is shown.
    """

    speak: Callable[[str], None]
    end: Callable[[], None]


class Hub(threading.Thread):
    """Rank 0's ear for all processes, its own included.

    Args:
        peers: all processes, by rank.
        connections: to each of them, by rank.
        ending: what to do about a lost one.
    """

    def __init__(self, peers: Sequence[Peer], connections: Sequence[Connection], ending: Ending) -> None:
        super().__init__(name="eetrain-hub", daemon=True)
        self._known = Known(peers)
        self._open = dict(enumerate(connections))
        self._ending = ending

    def run(self) -> None:
        """Listen until rank 0 leaves, or until there is a decision."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._open.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while 0 in self._open:
                due = self._known.due
                wait = None if due is None else max(0.0, due - time.monotonic())
                for rank in sorted(key.data for key, _ in selector.select(wait)):
                    self._hear(rank, selector)
                decision = self._known.decide(time.monotonic())
                if 0 in self._open and decision is not None:
                    if decision.text is None:
                        self._tell("alike")
                    else:
                        self._ending.speak(decision.text)
                        self._tell("end")
                    return  # connections stay open for as long as this process is there
        for connection in self._open.values():
            connection.close()

    def _hear(self, rank: int, selector: selectors.BaseSelector) -> None:
        connection = self._open[rank]
        messages = connection.read()
        for message in messages or ():
            if message["kind"] == "goodbye":
                self._known.leave(rank)
                self._tell("left", rank=rank)
                messages = None
                break
            self._known.fail(rank, Failure(**message["failure"]), time.monotonic())
        if messages is None:
            self._known.gone(rank)
            selector.unregister(connection)
            self._open.pop(rank).close()

    def _tell(self, kind: str, **content: Any) -> None:
        """Send to all, to this process last: it may end with it."""
        for rank in sorted(self._open, reverse=True):
            self._open[rank].send(kind, **content)


class Member(threading.Thread):
    """The part of every process: says how it ends, and hears how the others do.

    Args:
        rank: of this process.
        peers: all processes, by rank.
        connection: to rank 0.
        ending: what to do about a lost process.
    """

    def __init__(self, rank: int, peers: Sequence[Peer], connection: Connection, ending: Ending) -> None:
        super().__init__(name="eetrain-member", daemon=True)
        self.rank, self._peers, self._connection, self._ending = rank, peers, connection, ending
        self._left: set[int] = set()
        self._decided = threading.Event()
        self.alike = False

    def run(self) -> None:
        """Listen until the connection ends."""
        while (messages := self._connection.read()) is not None:
            for message in messages:
                self._hear(message)
        if not self._left & {0, self.rank} and not self.alike and not self._decided.is_set():
            if self.rank == speaker(self._peers, self._left, machine_gone=self._connection.machine_gone):
                self._ending.speak(loss_text(self._peers, 0))
            self._ending.end()
        self._decided.set()
        self._connection.close()

    def leave(self) -> None:
        """Say goodbye: whatever happens now is no loss."""
        self._left.add(self.rank)
        self._connection.send("goodbye")

    def fail(self, failure: Failure, timeout: float) -> bool:
        """Say that this process has failed, and wait for the decision; most often the process ends meanwhile.

        Args:
            failure: what happened.
            timeout: seconds.

        Returns:
            Whether all processes failed alike.
        """
        self._connection.send("failed", failure=asdict(failure))
        self._decided.wait(timeout)
        return self.alike

    def _hear(self, message: Message) -> None:
        if message["kind"] == "left":
            self._left.add(message["rank"])
        elif message["kind"] == "alike":
            self.alike = True
            self._decided.set()
        else:
            self._ending.end()
            self._decided.set()


_alike: Member | None = None  # of the watch whose processes all failed alike


class Watch:
    """This process among those that watch each other.

    Args:
        member: its part.
        hub: on rank 0.
    """

    def __init__(self, member: Member, hub: Hub | None = None) -> None:
        self._member, self._hub = member, hub
        for thread in filter(None, (hub, member)):
            thread.start()

    @classmethod
    def begin(
        cls, rank: int, size: int, host: str, gather: Gather, ending: Ending, *, timeout: float = JOIN_SECONDS
    ) -> Watch:
        """Connect the processes; all of them call this, and all go on with a watch or with the same error.

        Args:
            rank: of this process.
            size: number of processes.
            host: address of rank 0's machine, loopback if there is one machine.
            gather: gives every process the values of all, by rank.
            ending: what to do about a lost process.
            timeout: seconds in which all must have connected.

        Raises:
            ConnectionError: a process cannot reach rank 0; says which one, and where.
        """
        me = Peer(rank, platform.node(), os.getpid())
        door, problem = None, ""
        if rank == 0:
            try:
                door = Door(host, size)
            except OSError as error:
                problem = f"process 0 cannot listen on {host} ({error})"
        opened = gather((door.port, door.token) if door else None)[0]
        peers: Sequence[Peer] = ()
        connections: list[Connection] = []
        if opened is not None:
            try:
                port, token = opened
                peers, connections = _assemble(door, me, timeout) if door else enter(host, port, token, me, timeout)
            except OSError as error:
                problem = str(error)
        problems = [told for told in gather(problem) if told]
        if problems:
            for connection in connections:
                connection.close()
            raise ConnectionError(problems[0])
        member = Member(rank, peers, connections[-1], ending)
        return cls(member, Hub(peers, connections[:-1], ending) if door else None)

    def leave(self) -> None:
        """End well, or as asked: from now on nothing is watched, and whatever happens to this process is no loss."""
        self._member.leave()
        if self._hub is not None:
            self._hub.join(_LAST_WORDS)  # or the others would not hear of it

    def fail(self, failure: Failure) -> None:
        """Tell the others of an exception; returns if it may go on, most often the process ends here.

        It may go on if all processes come to the same one, and if nobody listens any more.
        """
        global _alike
        if self._member.fail(failure, ECHO + SETTLE):
            _alike = self._member


def told_by_first(timeout: float = 10.0) -> bool:
    """Whether the exception this process ends with is that of all, so that rank 0 alone has to show it.

    Waits until rank 0 has ended, since the end of another process may make a launcher kill it before it could speak.

    Args:
        timeout: seconds to wait.

    Returns:
        False on rank 0, for an exception of this process alone, and where nothing was watched.
    """
    if _alike is None or _alike.rank == 0:
        return False
    _alike.join(timeout)
    return True


def _assemble(door: Door, me: Peer, timeout: float) -> tuple[Sequence[Peer], list[Connection]]:
    """All processes, connections to each of them by rank, and rank 0's own end of the first one."""
    admitted = door.admit(timeout)
    ends = [Connection(end) for end in socket.socketpair()]
    admitted[me] = ends[0]
    peers = sorted(admitted, key=lambda peer: peer.rank)
    connections = [admitted[peer] for peer in peers]
    for connection in connections[1:]:
        connection.send("all", peers=[asdict(peer) for peer in peers])
    return peers, [*connections, ends[1]]
