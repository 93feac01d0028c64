"""Signals that ask a run to end: noted when they come, heard when a batch is done.

Nothing is saved inside a handler: one process would begin while another one waits for it in a step. Only the standard
library is imported here, so that the command line can install the handlers before anything else is loaded, which takes
seconds in which a signal would end the process.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

REQUEUE = 75  # the system's "temporary failure": what was asked for is saved, run the same command again
_STATUS = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}
# Where several came, on one process or on several, the first of these counts.
_ORDER = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):
    """A run ended because a signal asked for it, with everything saved.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status of the process: 75 for SIGUSR1 (run me again), else 128 + the signal's number."""
        return _STATUS[signal.Signals(self.number)]


class Requests:
    """What this process was asked by signals."""

    def __init__(self) -> None:
        self._asked: set[signal.Signals] = set()
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self, *, keyboard: bool) -> None:
        """Take over the signals; again, if something else has taken them over since.

        Args:
            keyboard: Ctrl-C as well. A second one interrupts at once.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _STATUS:
            if number is signal.SIGINT and not keyboard:
                continue
            present = signal.getsignal(number)
            if present != self._note:
                self._previous.setdefault(number, present)
                signal.signal(number, self._note)

    def release(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._previous.clear()

    def ignore(self) -> None:
        """Hear no more until this process has ended: it is as good as done, and its status is to count.

        A process that ends first makes ``srun`` send SIGTERM to the others; a job put back into the queue is sent one.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    def release_keyboard(self) -> None:
        """Give Ctrl-C back."""
        if signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))

    @property
    def code(self) -> int:
        """What counts of what was asked, as a number of which processes can agree on the largest; 0 for nothing."""
        return max((len(_ORDER) - place for place, number in enumerate(_ORDER) if number in self._asked), default=0)

    def forget(self) -> None:
        """Nothing was asked."""
        self._asked.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in self._asked:
            self.release_keyboard()
            raise KeyboardInterrupt
        self._asked.add(signal.Signals(number))


def signal_of(code: int) -> int:
    """The signal of :attr:`Requests.code`."""
    return _ORDER[len(_ORDER) - code]


REQUESTS = Requests()
