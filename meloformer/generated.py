"""generation.json: what was generated into a folder, run by run.

>>> runs = earlier_runs(Path("out"))                     # doctest: +SKIP
>>> write_report(Path("out"), [*runs, {"samples": [{"file": "seed0_000.mid"}]}])   # doctest: +SKIP

The surprise: it also protects them. What a finished run has written, as the report lists it, is never written over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from meloformer.errors import UserError
from meloformer.files import write_atomic

REPORT = "generation.json"


def earlier_runs(output: Path) -> list[dict]:
    """The runs that a folder's report lists; UserError where it is not this program's."""
    path = output / REPORT
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        names = [sample["file"] for run in runs for sample in run["samples"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); choose another --output") from None
    except (ValueError, KeyError, TypeError):
        runs, names = None, []
    if not isinstance(runs, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not this program's: choose another --output")
    return runs


def refuse_taken(output: Path, runs: list[dict], names: Iterable[str]) -> None:
    """UserError where a run has a sample of one of these names (without .mid)."""
    taken = {sample["file"] for run in runs for sample in run["samples"]} & {f"{name}.mid" for name in names}
    if taken:
        raise UserError(f"{output / min(taken)} is there already: choose another --seed or --output")


def write_report(output: Path, runs: list[dict]) -> None:
    write_atomic(output / REPORT, json.dumps({"runs": runs}, indent=1).encode())
