"""Feed preprocessing thousands of mutated real files: none may crash it, hang it, or vanish.

    python benchmarks/fuzz_preprocess.py --midi midi/ --count 10000

Every file has to come out as a valid stream or as a line of rejected.jsonl, and none with a reason that means a bug
of ours (internal_error) or a dead worker (crashed, timeout, memory). Prints what became of them; exit status 1 if a
file is unaccounted for or such a reason is there. docs/log.md holds the results.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meloformer.command_line import Parser  # noqa: E402
from meloformer.config import PreprocessConfig  # noqa: E402
from meloformer.data import Corpus  # noqa: E402
from meloformer.data.preprocess import preprocess  # noqa: E402
from meloformer.data.sources import Input  # noqa: E402
from meloformer.errors import exit_cleanly  # noqa: E402
from meloformer.hid import Tokenizer  # noqa: E402
from tests.data.mutate import mutate  # noqa: E402

BUGS = {"internal_error", "crashed", "timeout", "memory"}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    default = os.environ.get("MELOFORMER_MIDI") or str(ROOT.parent / "shared" / "midi")
    parser.add_argument("--midi", default=default, help="a folder of MIDI files")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=100_000, help="bytes of a file to mutate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--file_timeout", type=float, default=60.0)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    originals = [Path(source.path) for source in Input(given.midi)]
    originals = [path for path in originals if path.stat().st_size <= given.largest]
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / "midi", Path(scratch) / "out"
        folder.mkdir()
        for i in range(given.count):
            path = originals[rng.integers(len(originals))]
            (folder / f"{i:06d} {path.stem[:40]}.mid").write_bytes(mutate(path.read_bytes(), rng))
        start = time.monotonic()
        preprocess(
            PreprocessConfig(
                input=str(folder),
                output=str(output),
                workers=given.workers,
                file_timeout=given.file_timeout,
                dedup=False,
                min_notes=1,
                min_bars=1,
            )
        )
        seconds = time.monotonic() - start
        corpus = Corpus(output)
        tokenizer = Tokenizer(corpus.vocabulary)
        for i in range(corpus.num_pieces):
            tokenizer.validate(corpus.piece(i))
        lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
        bad = [line for line in lines if line["reason"] in BUGS]
        missing = given.count - corpus.num_pieces - len(lines)
    print(f"seed {given.seed}: {given.count} files in {seconds:.0f} s; encoded and valid {corpus.num_pieces}")
    print(f"rejected {corpus.meta['rejected']}; unaccounted for {missing}; our fault {len(bad)}")
    for line in bad[:20]:
        print(f"  {line}")
    sys.exit(bool(bad or missing))


if __name__ == "__main__":
    exit_cleanly(main)
