"""What a user can put right: one line on stderr, exit status 2, no traceback.

>>> raise UserError("configs/demo.yaml: model.n_layers is not a key; the nearest is model.n_layer")
Traceback (most recent call last):
...
meloformer.errors.UserError: configs/demo.yaml: model.n_layers is not a key; the nearest is model.n_layer
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

PATIENCE = 30.0  # seconds, for a machine on which some processes start much later than others


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
            time.sleep(PATIENCE)  # whoever is still there then has met what the first one has not
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
