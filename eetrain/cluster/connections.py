"""Connections between the processes of a run: who may make them, how they tell that the other side is gone."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import os
import platform
import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from eetrain.cluster.verdicts import NOTICE, Peer

JOIN_SECONDS = 20.0
_LONGEST_MESSAGE = 1 << 20
_MACHINE_GONE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)

Message = dict[str, Any]

# Sockets of this process. A forked child, such as a worker of a DataLoader, gets copies of them, which would keep a
# connection open after its process was killed.
_sockets: set[socket.socket] = set()


def _close_in_child() -> None:
    for each in list(_sockets):
        each.close()
    _sockets.clear()


os.register_at_fork(after_in_child=_close_in_child)


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out that the other machine is gone, where the platform can: after 10 s + 4 x 5 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    values = {
        "TCP_KEEPIDLE": 10,
        "TCP_KEEPALIVE": 10,  # the same one on macOS
        "TCP_KEEPINTVL": 5,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": int(NOTICE * 1000),
    }
    for name, value in values.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Connection:
    """Messages over a socket, each a line of JSON.

    Args:
        connected: the socket, from now on of this object.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._buffer = b""
        self.machine_gone = False
        _sockets.add(connected)
        if connected.family != socket.AF_UNIX:
            keep_alive(connected)

    def fileno(self) -> int:
        """Number of the socket, for a selector."""
        return self._socket.fileno()

    def send(self, kind: str, **content: Any) -> None:
        """Send a message; that the other side is gone shows when it is read from."""
        with suppress(OSError):
            self._socket.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")

    def read(self, timeout: float | None = None) -> list[Message] | None:
        """The messages that come next, as soon as there is something to read.

        Args:
            timeout: seconds to wait, forever if ``None``.

        Returns:
            ``None`` at the end of the connection, and if what comes is no message.

        Raises:
            TimeoutError: nothing came in time.
        """
        try:
            self._socket.settimeout(timeout)
            received = self._socket.recv(1 << 16)
        except OSError as error:
            self.machine_gone = error.errno in _MACHINE_GONE
            if isinstance(error, TimeoutError) and not self.machine_gone:
                raise
            return None
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        if not received or len(self._buffer) > _LONGEST_MESSAGE:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Close the socket."""
        _sockets.discard(self._socket)
        self._socket.close()


class Door:
    """Where rank 0 lets the others in, until all are there.

    Args:
        host: address under which the others know this machine.
        size: processes of the run.

    Raises:
        OSError: nothing can be listened to here.
    """

    def __init__(self, host: str, size: int) -> None:
        self.token = secrets.token_hex(16)
        self._missing = set(range(1, size))
        self._admitted: dict[Peer, Connection] = {}
        self._listener = _listener(host)
        self.port: int = self._listener.getsockname()[1]
        _sockets.add(self._listener)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def admit(self, timeout: float) -> dict[Peer, Connection]:
        """Wait for all the others; who does not know the token is sent away.

        Args:
            timeout: seconds for all of them together.

        Raises:
            TimeoutError: names the ranks that did not come.
        """
        until = time.monotonic() + timeout
        while self._missing and time.monotonic() < until:
            for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                self._hear(key.data)
        self._close()
        if self._missing:
            for connection in self._admitted.values():
                connection.close()
            raise TimeoutError(
                f"processes {sorted(self._missing)} did not connect to port {self.port} of {platform.node()} within "
                f"{timeout:g} s"
            )
        return self._admitted

    def _hear(self, stranger: Connection | None) -> None:
        """Somebody knocks, or who knocked before says something."""
        if stranger is None:
            connection = Connection(self._listener.accept()[0])
            self._selector.register(connection, selectors.EVENT_READ, connection)
            return
        messages = stranger.read()
        if messages == []:  # the rest of the line is on its way
            return
        self._selector.unregister(stranger)
        peer = self._peer(messages[0]) if messages else None
        if peer is None or peer.rank not in self._missing:
            stranger.close()
        else:
            self._admitted[peer] = stranger
            self._missing.discard(peer.rank)

    def _peer(self, message: Message) -> Peer | None:
        if not hmac.compare_digest(str(message.get("token")).encode(), self.token.encode()):
            return None
        try:
            return Peer(int(message["rank"]), str(message["host"]), int(message["pid"]))
        except (KeyError, TypeError, ValueError):
            return None

    def _close(self) -> None:
        """Let nobody in any more."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data.close()
        self._selector.close()
        _sockets.discard(self._listener)
        self._listener.close()


def _listener(host: str) -> socket.socket:
    """A listening socket on the interface of ``host``; on all of them, if its address is not one of this machine.

    A name that stands for the loopback address on its own machine, as Debian's ``/etc/hosts`` has it, is known by
    another address elsewhere.
    """
    for family, _, _, _, (found, *_) in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        address = str(found)
        if ipaddress.ip_address(address.partition("%")[0]).is_loopback and host not in (address, "localhost"):
            continue
        with suppress(OSError):
            return socket.create_server((address, 0), family=family, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def enter(host: str, port: int, token: str, me: Peer, timeout: float) -> tuple[Sequence[Peer], list[Connection]]:
    """Connect to rank 0, and wait until all others have.

    Args:
        host: address of rank 0.
        port: where it listens.
        token: that it wants to hear.
        me: this process.
        timeout: seconds.

    Returns:
        All processes by rank, and the connection.

    Raises:
        OSError: names the address.
    """
    try:
        connected = socket.create_connection((host, port), timeout=timeout)
    except OSError as error:
        raise ConnectionError(f"process {me.rank} on {me.host} cannot connect to {host}:{port} ({error})") from error
    connection = Connection(connected)
    connection.send("hello", token=token, **asdict(me))
    messages: list[Message] | None = []
    try:
        while messages == []:
            messages = connection.read(timeout)
    except TimeoutError:
        messages = None
    if not messages or messages[0].get("kind") != "all":
        connection.close()
        raise ConnectionError(f"process {me.rank} on {me.host} was not let in at {host}:{port}")
    return [Peer(**peer) for peer in messages[0]["peers"]], [connection]
