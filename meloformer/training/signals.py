"""Stopping politely: the first SIGINT or SIGTERM asks, the second ends the process at once.

>>> with StopSignals() as stop:                      # doctest: +SKIP
...     while not stop.requested:
...         train_one_step()
...     save()

What surprises: after the first signal the old default is back in force, so the second one needs no code to run and
works while a kernel or a slow disk holds the process.
"""

from __future__ import annotations

import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """`requested` is the name of the signal that came, or None. Does nothing outside the main thread."""

    def __init__(self):
        self.requested: str | None = None
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
        self.requested = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
