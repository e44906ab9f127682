"""Stopping politely: the first SIGINT or SIGTERM asks, and is answered on stderr at once; the second ends the process.

`requested` is the signal's number, 0 while none has come, so that ranks can agree on it by its maximum.

>>> with StopSignals() as stop:                      # doctest: +SKIP
...     while not stop.requested:
...         train_one_step()
...     save()

What surprises: Python's own handlers wait until the main thread is back from what it computes, and a backward pass can
take minutes. So the answer is a thread's, woken by a byte that the system's handler writes, and so is the end if the
second signal finds the main thread still away; else that one needs no code to run, for after the first the old default
is in force. Not so under torchrun, which passes on a Ctrl-C that its processes have already had from the terminal:
there, signals within ECHO seconds of the first are the same one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 2.0
GRACE = 0.5  # seconds for a second signal's own way of ending the process
ANSWER = b"\nstopping after this step; once more to stop at once\n"  # on a line of its own, below the progress bar


class StopSignals:
    """Does nothing outside the main thread. `echoes`: whether each signal may come twice; `silent`: another rank
    answers."""

    def __init__(self, echoes: bool = False, silent: bool = False):
        self.requested = 0
        self.echoes, self.silent = echoes, silent
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._ear, self._bell = os.pipe()
            os.set_blocking(self._bell, False)
            self._bell_before = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._bell_before)
            os.close(self._bell)
            self._listener.join()
            os.close(self._ear)

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

    def _listen(self) -> None:
        """A thread: answers the first signal, and sees to it that the second ends the process."""
        first = None
        while heard := os.read(self._ear, 1):
            if heard[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                with suppress(OSError):  # nobody may be there to read it
                    os.write(2, b"" if self.silent else ANSWER)
            elif not self.echoes or time.monotonic() - first >= ECHO:
                time.sleep(GRACE)
                os._exit(128 + heard[0])


def name_of(number: int) -> str:
    return signal.Signals(number).name
