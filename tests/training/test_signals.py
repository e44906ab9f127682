"""The first signal is answered at once, and the second ends the process, whatever the main thread is at."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# One call into C that looks at no signals, as a backward pass is; minutes long, were it left to end. The main thread is
# inside it, and no longer on its way there, once its own clock has gone on for longer than the way takes.
AWAY = """
import hashlib, threading, time
from meloformer.training.signals import StopSignals
def tell(clock, begun):
    while time.clock_gettime(clock) < begun + 0.1:
        time.sleep(0.01)
    print("away", flush=True)
clock = time.pthread_getcpuclockid(threading.get_ident())
with StopSignals():
    threading.Thread(target=tell, args=(clock, time.clock_gettime(clock)), daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000_000)
    print("back", flush=True)
"""


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="tells by a clock of threads, which Linux has")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_step_that_takes_minutes_is_answered_and_ended_at_once(number):
    """Ctrl-C was silent until the step ended, nine minutes, and so was the second one."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", AWAY], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "away\n"
        process.send_signal(number)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "stopping after this step; once more to stop at once\n"
        assert process.poll() is None
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    assert (out, error, process.returncode) == ("", "", 128 + number)
