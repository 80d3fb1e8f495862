"""SIGTERM, SIGINT and SIGUSR1 end a run in good order, and a second SIGINT ends it at once.

What a process exits with, everywhere in `python -m train`:

    0     finished (or stopped where run.stop_after says)
    1     failed; the error was printed
    2     the recipe or the command line is wrong; one sentence was printed
    75    stopped by a signal: the same command started again goes on (EX_TEMPFAIL of sysexits.h, "try again later")
    130   a second SIGINT: ended without a checkpoint

Until the first step nothing is lost by stopping, so a signal ends the process there and then, by an exception. From then on a signal is only
remembered, and the loop stops between two steps, all ranks together and with a checkpoint.

This file imports nothing heavy, so that signals are in order before the imports that take seconds.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPED = 75
INTERRUPTED = 130
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(BaseException):
    """A signal arrived before the first step; the argument is its name. No Exception, so that nothing takes it for an error of its own."""


_entered: list["StopSignals"] = []


class StopSignals:
    """While entered, notes the first of the signals in `received` (its number; 0: none); outside the main thread it does nothing.

    Entered within another, it begins with what that one has received: an exception raised in somebody else's code (an import, a destructor)
    may have been swallowed there.
    """

    def __init__(self) -> None:
        self.received = 0
        self._raises = True
        self._interrupts = 0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in HANDLED}
            missed = _entered[-1].received if _entered else 0
            _entered.append(self)
            if missed:
                try:
                    self._receive(missed, None)
                except StopRequested:
                    self.__exit__()
                    raise
        return self

    def __exit__(self, *error: object) -> None:
        self._raises = False
        if self in _entered:
            _entered.remove(self)
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._receive:  # unless something was set meanwhile
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def only_remember(self) -> None:
        """From now on a signal raises nothing."""
        self._raises = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os.write(2, b"Interrupted again: ended at once, without a checkpoint.\n")
            os._exit(INTERRUPTED)
        if not self.received:
            self.received = number
            if self._raises:
                raise StopRequested(name_of(number))


def name_of(number: int) -> str:
    """`SIGTERM`, for a person."""
    return signal.Signals(number).name


def ignore_from_now_on() -> None:
    """For the last moments of a process that has stopped: a launcher that ends the other ranks may not disturb its exit status."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)
