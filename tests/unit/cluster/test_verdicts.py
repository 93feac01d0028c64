"""What is said of lost and failed processes, and when."""

import pytest

from eetrain.cluster.verdicts import ECHO, NOTICE, SETTLE, Decision, Failure, Known, Peer, loss_text, speaker
from eetrain.errors import DataError

PEERS = [Peer(0, "nid0011", 70), Peer(1, "nid0011", 71), Peer(2, "nid0012", 72), Peer(3, "nid0012", 73)]
OWN, OTHER = Failure("KeyError: 'a'"), Failure("OutOfMemoryError: 2 GiB", hint="Take less.", trace="Traceback ...\n")
ECHOED = Failure("RuntimeError: Connection closed by peer", echo=True)

LOST_2 = (
    "error: process 2 of 4 (host nid0012, pid 72) was killed or lost; the job ends.\n"
    "HINT: The kernel's log (dmesg) or the scheduler says why; out of memory is the usual cause. "
    "A fit goes on with the same command and --resume auto.\n"
)


def known(*events):
    """After ``(what, rank, ...)``, all at second 100."""
    state = Known(PEERS)
    for what, rank, *failure in events:
        if what == "fail":
            state.fail(rank, failure[0], 100.0)
        else:
            getattr(state, what)(rank)
    return state


def test_nothing_is_decided_while_nothing_is_wrong():
    state = known(("leave", 1), ("gone", 1), ("leave", 0))
    assert state.due is None
    assert state.decide(1e9) is None
    assert known(*(("leave", rank) for rank in range(4))).decide(1e9) is None


def test_a_process_that_ends_without_a_word_is_lost_and_the_first_one_is_named():
    assert loss_text(PEERS, 2) == LOST_2
    assert known(("gone", 2), ("gone", 1)).decide(0.0) == Decision(LOST_2)


def test_a_loss_comes_before_the_failures_that_follow_from_it():
    state = known(("fail", 0, ECHOED), ("fail", 3, OWN))
    assert state.decide(100.1) is None
    state.gone(2)
    assert state.decide(100.2) == Decision(LOST_2)


def test_a_process_that_failed_is_not_lost_when_it_ends():
    state = known(("fail", 1, OWN), ("gone", 1))
    assert state.decide(100.0) is None
    assert state.decide(100.0 + SETTLE).text.startswith("error: process 1 of 4 (host nid0011, pid 71) failed: KeyError")


@pytest.mark.parametrize(
    ("events", "due", "text"),
    [
        ([("fail", 1, OWN)], SETTLE, "error: process 1 of 4 (host nid0011, pid 71) failed: KeyError: 'a'\n"),
        (
            [("fail", 3, OTHER), ("fail", 1, OWN)],
            SETTLE,
            "Traceback ...\nerror: process 3 of 4 (host nid0012, pid 73) failed: OutOfMemoryError: 2 GiB\n"
            "HINT: Take less.\n",
        ),
        (
            [("fail", 0, ECHOED)],
            ECHO,
            "error: process 0 of 4 (host nid0011, pid 70) failed: RuntimeError: Connection closed by peer\n",
        ),
        (
            [("fail", 0, ECHOED), ("fail", 1, OWN)],
            SETTLE,
            "error: process 1 of 4 (host nid0011, pid 71) failed: KeyError: 'a'\n",
        ),
    ],
)
def test_failures_of_some_wait_for_the_others_and_the_first_cause_is_named(events, due, text):
    state = known(*events)
    assert state.due == 100.0 + due
    assert state.decide(100.0 + due - 0.1) is None
    assert state.decide(100.0 + due) == Decision(text)


def test_an_echo_waits_longer_than_a_machine_stays_unnoticed():
    assert ECHO > NOTICE
    assert ECHO + SETTLE < 60


def test_processes_that_all_fail_alike_are_left_alone():
    alike = known(*(("fail", rank, OWN) for rank in range(4)))
    assert alike.decide(100.0) == Decision(None)
    with_one_gone = known(("leave", 2), *(("fail", rank, OWN) for rank in (0, 1, 3)))
    assert with_one_gone.decide(100.0) == Decision(None)


def test_processes_that_fail_in_different_ways_are_not():
    different = known(*(("fail", rank, OTHER if rank == 2 else OWN) for rank in (2, 0, 1, 3)))
    assert "process 2 of 4 (host nid0012, pid 72) failed: OutOfMemoryError: 2 GiB" in different.decide(100.0).text


@pytest.mark.parametrize(
    ("left", "machine_gone", "speaks"),
    [((), False, 1), ((1,), False, 2), ((), True, 2), ((2,), True, 3), ((2, 3), True, 1)],
)
def test_who_speaks_when_rank_0_is_lost(left, machine_gone, speaks):
    assert speaker(PEERS, left, machine_gone=machine_gone) == speaks


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


def test_an_exception_in_one_line():
    failure = Failure.of(raised(ValueError("one  thing\nand more")))
    assert failure.line == "ValueError: one thing"
    assert failure.hint == ""
    assert failure.trace.startswith("Traceback (most recent call last):\n")
    assert failure.trace.endswith("ValueError: one  thing\nand more\n")
    assert Failure.of(raised(KeyboardInterrupt()), traced=False) == Failure("KeyboardInterrupt")
    assert Failure.of(DataError("row 7 is empty.", hint="Fill it."), traced=False) == Failure(
        "DataError: row 7 is empty.", hint="Fill it."
    )
    long = Failure.of(ValueError("x" * 400)).line
    assert len(long) == 300
    assert long.endswith("xxx...")


def test_an_exception_of_a_worker_of_the_data_loader_says_what_it_was():
    text = (
        "Caught KeyError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nKeyError: 'id'\n"
    )
    assert Failure.of(RuntimeError(text)).line == "RuntimeError: KeyError: 'id'"
