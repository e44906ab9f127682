"""Stopping politely: the first SIGINT or SIGTERM asks, the second ends the process at once.

`requested` is the signal's number, 0 while none has come, so that ranks can agree on it by its maximum.

>>> with StopSignals() as stop:                      # doctest: +SKIP
...     while not stop.requested:
...         train_one_step()
...     save()

What surprises: after the first signal the old default is back in force, so the second one needs no code to run and
works while a kernel or a slow disk holds the process. Not so under torchrun, which passes on a Ctrl-C that its
processes have already had from the terminal: there, signals within ECHO seconds of the first are the same one.
"""

from __future__ import annotations

import os
import signal
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 2.0


class StopSignals:
    """Does nothing outside the main thread. `echoes`: whether each signal may come twice."""

    def __init__(self, echoes: bool = False):
        self.requested = 0
        self.echoes = echoes
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        again = self.requested != 0
        if again and time.monotonic() - self._first < ECHO:
            return
        if again or not self.echoes:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if again:
            os.kill(os.getpid(), number)
        else:
            self.requested, self._first = number, time.monotonic()


def name_of(number: int) -> str:
    return signal.Signals(number).name
