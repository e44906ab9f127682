"""What a user can put right: one line on stderr, exit status 2, no traceback.

>>> raise UserError("configs/demo.yaml: model.n_layers is not a key; the nearest is model.n_layer")
Traceback (most recent call last):
...
meloformer.errors.UserError: configs/demo.yaml: model.n_layers is not a key; the nearest is model.n_layer
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SPEAKING = 30.0  # seconds that processes give the one that speaks for them; some machines start them far apart


class UserError(ValueError):
    """Bad input. The message is one line: what was received, where, what is accepted or what to do."""


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run a command; a `UserError` becomes one line on stderr and exit status 2, and so does what the system refuses,
    such as a file that cannot be read or written; Ctrl-C exit status 130.

    Of the processes that torchrun starts on a machine the first one speaks: they were given the same command line. The
    others wait to be ended with it. torchrun ends all when one has ended, and the first may not have spoken by then.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SPEAKING)  # whoever is still there then has met what the first one has not
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"error: {' '.join(what.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.freeze()  # what is left was imported: with a look for garbage in all of torch Python takes a second to end


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Ctrl-C ends the process here and now, with the word and the status of `exit_cleanly`: for what is imported.

    As an exception it may come up inside an import of numpy or torch, where it was lost, became another error with a
    traceback, or ended the interpreter with a segmentation fault, once in a hundred times.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell may have made us deaf to it
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
