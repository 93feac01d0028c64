import os
import signal
import subprocess
import sys
import textwrap

import pytest

from eetrain.cluster.signals import REQUEUE, Requests, Stopped, signal_of


@pytest.fixture
def requests():
    requests = Requests()
    yield requests
    requests.release()


def raise_signal(number):
    os.kill(os.getpid(), number)


def test_signals_are_noted_and_given_back(requests):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    requests.listen(keyboard=True)
    assert requests.code == 0
    raise_signal(signal.SIGUSR1)
    assert signal_of(requests.code) == signal.SIGUSR1
    requests.forget()
    assert requests.code == 0
    requests.release()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(
    ("came", "counts"),
    [
        ((signal.SIGUSR1, signal.SIGTERM), signal.SIGTERM),
        ((signal.SIGTERM, signal.SIGUSR1), signal.SIGTERM),
        ((signal.SIGUSR1, signal.SIGINT), signal.SIGINT),
        ((signal.SIGINT, signal.SIGTERM), signal.SIGTERM),
    ],
)
def test_what_asks_for_an_end_without_requeue_counts_more(requests, came, counts):
    requests.listen(keyboard=True)
    for number in came:
        raise_signal(number)
    assert signal_of(requests.code) == counts


def test_without_the_keyboard_ctrl_c_interrupts(requests):
    requests.listen(keyboard=False)
    with pytest.raises(KeyboardInterrupt):
        raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_interrupts(requests):
    requests.listen(keyboard=True)
    raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        raise_signal(signal.SIGINT)


def test_listening_again_takes_back_what_another_one_took(requests):
    before = signal.getsignal(signal.SIGTERM)
    requests.listen(keyboard=False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    requests.listen(keyboard=False)
    raise_signal(signal.SIGTERM)
    assert signal_of(requests.code) == signal.SIGTERM
    requests.release()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, REQUEUE), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_statuses(number, status):
    assert Stopped(number).status == status
    assert str(Stopped(number)) == number.name


def test_handlers_are_there_before_anything_heavy_is_imported():
    code = """
        import os, signal, sys
        import eetrain.cli as cli
        def stop(*args, **kwargs):
            print(signal.getsignal(signal.SIGTERM) == cli.REQUESTS._note, 'torch' in sys.modules)
            return 0
        cli._run = stop
        cli.main(['fit'])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
