"""Processes that watch each other: real ones, really killed."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from eetrain.cluster import connections, peers, verdicts
from eetrain.cluster.connections import Connection, Door, enter
from eetrain.cluster.peers import Ending, Watch, told_by_first
from eetrain.cluster.verdicts import Failure, Peer

SOON = 8.0  # seconds in which a loss must be over and done with; most of it is a busy test machine
LOOPBACK = "127.0.0.1"


def gather_in(folder, rank, size):
    """Hand values round through files of a folder."""
    calls = iter(range(100))

    def gather(value):
        call, until = next(calls), time.monotonic() + 30
        paths = [folder / f"{call}.{other}" for other in range(size)]
        part = folder / f"part.{rank}"
        part.write_text(json.dumps(value))
        part.rename(paths[rank])
        while not all(path.exists() for path in paths):
            assert time.monotonic() < until
            time.sleep(0.01)
        return [json.loads(path.read_text()) for path in paths]

    return gather


def process(folder, rank, size, acts):
    """A process of the run that watches the others, and goes through ``acts``."""
    verdicts.SETTLE, verdicts.ECHO = 0.5, 20.0
    ending = Ending((folder / f"said.{rank}").write_text, lambda: os._exit(1))
    watch = Watch.begin(rank, size, LOOPBACK, gather_in(folder, rank, size), ending)
    for act in acts:
        if act == "fork":  # as a worker of a DataLoader, which outlives its parent for a while
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
            (folder / "child").write_text(str(child))
        elif act == "leave":
            watch.leave()
        elif act in ("KeyError", "ValueError", "echo"):
            watch.fail(Failure(f"{act}: 7", echo=act == "echo"))
            (folder / f"went_on.{rank}").write_text("")
        elif act == "told":
            (folder / f"told.{rank}").write_text(str(told_by_first(0.1)))
        elif act.startswith("wait_for"):
            while not (folder / act.split()[1]).exists():
                time.sleep(0.01)
        (folder / f"{act}.done.{rank}").write_text("")
    (folder / f"ready.{rank}").write_text("")
    if "exit" not in acts:
        time.sleep(60)


class Run:
    """Processes of a run.

    Args:
        folder: for what they write.
        acts: of each process, by rank.
    """

    def __init__(self, folder, *acts):
        context = multiprocessing.get_context("spawn")
        self.folder, self.size = folder, len(acts)
        self.processes = [
            context.Process(target=process, args=(folder, rank, len(acts), act)) for rank, act in enumerate(acts)
        ]
        for each in self.processes:
            each.start()

    def wait_for(self, *names):
        until = time.monotonic() + 30
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < until, names
            time.sleep(0.01)

    def kill(self, rank):
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def ended(self, timeout=SOON):
        """Exit status of all, and what was said by whom."""
        until = time.monotonic() + timeout
        while any(each.exitcode is None for each in self.processes) and time.monotonic() < until:
            time.sleep(0.01)  # a join would wait for children, too
        said = {int(path.suffix[1:]): path.read_text() for path in self.folder.glob("said.*")}
        return [each.exitcode for each in self.processes], said

    def lost(self, rank):
        peer = Peer(rank, socket.gethostname(), self.processes[rank].pid)
        everyone = [Peer(other, "", 0) for other in range(self.size)]
        everyone[rank] = peer
        return verdicts.loss_text(everyone, rank)

    def close(self):
        if (child := self.folder / "child").exists():
            os.kill(int(child.read_text()), signal.SIGKILL)
        for each in self.processes:
            each.kill()
            each.join()


@pytest.fixture
def start(tmp_path):
    runs = []

    def make(*acts):
        runs.append(Run(tmp_path, *acts))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


@pytest.mark.parametrize("lost", range(3))
def test_a_killed_process_ends_all_and_one_of_the_others_names_it(start, lost):
    run = start([], [], ["fork"])  # the last one has a child that goes on
    run.wait_for("ready.0", "ready.1", "ready.2")
    run.kill(lost)
    statuses, said = run.ended()
    assert statuses == [-9 if rank == lost else 1 for rank in range(3)]
    assert said == {1 if lost == 0 else 0: run.lost(lost)}


def test_processes_that_leave_are_not_lost(start):
    run = start(["wait_for leave.done.2", "leave", "exit"], ["leave", "exit"], ["leave", "exit"])
    assert run.ended() == ([0, 0, 0], {})


def test_the_others_go_on_in_silence_when_rank_0_has_left(start):
    run = start(["leave", "exit"], ["wait_for ready.0", "KeyError", "exit"])
    assert run.ended() == ([0, 0], {})
    assert (run.folder / "went_on.1").exists()  # nobody listens: its exception is its own


@pytest.mark.parametrize(("lost", "speaks"), [(2, 0), (0, 2)])
def test_who_has_left_is_not_counted_on(start, lost, speaks):
    run = start(["wait_for ready.1"], ["leave", "exit"], ["wait_for ready.1"])
    run.wait_for("ready.0", "ready.2")
    time.sleep(0.3)  # for the news of the goodbye
    run.kill(lost)
    statuses, said = run.ended()
    assert statuses == [-9 if rank == lost else 0 if rank == 1 else 1 for rank in range(3)]
    assert said == {speaks: run.lost(lost)}


def test_a_process_that_stands_still_is_not_lost(start):
    run = start(["wait_for go", "leave", "exit"], ["wait_for go", "leave", "exit"])
    run.wait_for("1.0", "1.1")
    os.kill(run.processes[1].pid, signal.SIGSTOP)
    time.sleep(2.0)
    os.kill(run.processes[1].pid, signal.SIGCONT)
    (run.folder / "go").write_text("")
    assert run.ended() == ([0, 0], {})


def test_a_failure_of_one_process_ends_all(start):
    run = start([], [], ["KeyError"])
    statuses, said = run.ended()
    assert statuses == [1, 1, 1]
    pid = run.processes[2].pid
    assert said == {0: f"error: process 2 of 3 (host {socket.gethostname()}, pid {pid}) failed: KeyError: 7\n"}
    assert not list(run.folder.glob("went_on.*"))


def test_a_failure_of_all_is_shown_by_rank_0(start):
    run = start(["KeyError", "told", "exit"], ["KeyError", "told", "exit"])
    assert run.ended() == ([0, 0], {})
    assert (run.folder / "told.0").read_text() == "False"
    assert (run.folder / "told.1").read_text() == "True"


def test_the_first_of_different_failures_counts(start):
    run = start(["wait_for hello", "KeyError"], ["ValueError"])
    run.wait_for("1.0", "1.1")
    time.sleep(1.0)  # for what rank 1 says to arrive
    (run.folder / "hello").write_text("")
    statuses, said = run.ended()
    assert statuses == [1, 1]
    assert list(said) == [0]
    assert "process 1 of 2" in said[0]
    assert "failed: ValueError: 7" in said[0]


def test_a_failure_that_speaks_of_a_loss_waits_for_the_name(start):
    run = start(["echo"], ["echo"], ["wait_for never"])
    run.wait_for("1.0", "1.1", "1.2")
    time.sleep(1.5)  # longer than a failure of one process alone would take
    assert run.ended(0.0) == ([None] * 3, {})
    run.kill(2)
    assert run.ended() == ([1, 1, -9], {0: run.lost(2)})


def test_nobody_watches_if_one_process_cannot_connect(tmp_path):
    """The first one listens on an address the second does not try, as behind a firewall that answers."""
    problems, ending = {}, Ending(print, lambda: None)

    def begin(rank, host):
        try:
            Watch.begin(rank, 2, host, gather_in(tmp_path, rank, 2), ending, timeout=0.5)
        except ConnectionError as error:
            problems[rank] = str(error)

    threads = [threading.Thread(target=begin, args=each) for each in ((0, LOOPBACK), (1, "127.0.0.2"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    port = json.loads((tmp_path / "0.0").read_text())[0]
    node = socket.gethostname()
    of_0 = f"processes [1] did not connect to port {port} of {node} within 0.5 s"
    of_1 = f"process 1 on {node} cannot connect to 127.0.0.2:{port} ([Errno 111] Connection refused)"
    assert json.loads((tmp_path / "1.1").read_text()) == of_1
    assert problems == {0: of_0, 1: of_0}


@pytest.fixture
def door():
    made = Door(LOOPBACK, 2)
    yield made
    made._listener.close()
    connections._sockets.discard(made._listener)


def beside(door, timeout=5.0):
    """Let others in beside this thread; a list that the outcome is put into, and the thread."""
    found = []

    def admit():
        try:
            found.append(door.admit(timeout))
        except TimeoutError as error:
            found.append(error)

    thread = threading.Thread(target=admit)
    thread.start()
    return found, thread


def test_strangers_are_sent_away_and_hold_nobody_up(door):
    found, thread = beside(door)
    silent, garbage, wrong, half = (socket.create_connection((LOOPBACK, door.port)) for _ in range(4))
    garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
    wrong.sendall(json.dumps({"kind": "hello", "token": "0" * 32, "rank": 1, "host": "h", "pid": 1}).encode() + b"\n")
    half.sendall(b'{"kind": "hel')
    assert garbage.recv(1) == b""
    assert wrong.recv(1) == b""
    me = Peer(1, "h", 5)
    with socket.create_connection((LOOPBACK, door.port)) as good:
        hello = json.dumps({"kind": "hello", "token": door.token, "rank": 1, "host": "h", "pid": 5}).encode()
        good.sendall(hello[:20])
        time.sleep(0.1)
        good.sendall(hello[20:] + b"\n")
        thread.join(5)
    assert list(found[0]) == [me]
    assert silent.recv(1) == b""  # the door is closed
    for each in (silent, garbage, wrong, half, found[0][me]):
        each.close()


@pytest.mark.parametrize(("rank", "token"), [(1, "wrong"), (0, None), (2, None)])
def test_who_is_not_let_in_hears_of_it(door, rank, token):
    found, thread = beside(door, 0.5)
    with pytest.raises(ConnectionError, match=f"^process {rank} on h was not let in at 127.0.0.1:{door.port}$"):
        enter(LOOPBACK, door.port, token or door.token, Peer(rank, "h", 5), 5.0)
    thread.join(5)
    assert isinstance(found[0], TimeoutError)


def test_a_rank_comes_in_once(door):
    found, thread = beside(door)
    hello = json.dumps({"token": door.token, "rank": 1, "host": "h", "pid": 5}).encode() + b"\n"
    with socket.create_connection((LOOPBACK, door.port)) as first:
        first.sendall(hello)
        thread.join(5)
    assert list(found[0]) == [Peer(1, "h", 5)]
    with pytest.raises(ConnectionError):
        enter(LOOPBACK, door.port, door.token, Peer(1, "h", 6), 1.0)


def test_kernels_on_both_sides_look_after_the_connection(door):
    found, thread = beside(door)
    dialled = socket.create_connection((LOOPBACK, door.port))
    mine = Connection(dialled)
    mine.send("hello", token=door.token, rank=1, host="h", pid=5)
    thread.join(5)
    accepted = found[0][Peer(1, "h", 5)]
    for end in (dialled, accepted._socket):
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT]
        assert [end.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [10, 5, 4, 30_000]
    assert verdicts.NOTICE == 10 + 5 * 4
    mine.close()
    accepted.close()


@pytest.mark.parametrize(
    ("name", "address", "bound"),
    [
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("node1", "127.0.1.1", "0.0.0.0"),  # as Debian names a machine to itself
        ("service", "192.0.2.7", "0.0.0.0"),  # not an address of this machine
    ],
)
def test_where_rank_0_listens(monkeypatch, name, address, bound):
    info = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: info)
    with connections._listener(name) as listener:
        assert listener.getsockname()[0] == bound


def test_a_forked_child_keeps_no_socket(door):
    one, other = socket.socketpair()
    mine = Connection(one)
    assert one in connections._sockets
    child = os.fork()
    if child == 0:
        kept = [one.fileno(), door._listener.fileno(), len(connections._sockets)]
        os._exit(0 if kept == [-1, -1, 0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert one.fileno() > 0
    mine.close()
    assert one not in connections._sockets
    assert other.recv(1) == b""
    other.close()


def test_nothing_is_told_by_others_where_nothing_is_watched():
    assert peers._alike is None
    assert told_by_first() is False


def test_a_message_without_end_is_the_end():
    one, other = socket.socketpair()
    other.settimeout(5)
    mine, ended = Connection(one), []

    def read():
        while mine.read() is not None:
            pass
        ended.append(True)
        mine.close()

    thread = threading.Thread(target=read)
    thread.start()
    with pytest.raises(OSError):  # noqa: PT012
        for _ in range(100):
            other.sendall(b"x" * (1 << 16))
    thread.join(5)
    assert ended
    other.close()
