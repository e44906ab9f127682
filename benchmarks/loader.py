"""How fast annotated rows come out of the loader, beside a loop that only reads the same shards' bytes.

    python -m benchmarks.loader --data_dir processed --num_workers 2

One line a setting: tokens a second (padding not counted) by the wall clock, and per second that the process was busy,
which other programs on the machine do not change much; then the time as a multiple of what reading every byte of the
shards takes. A pass reads each piece once, augmented as in training; the block tables of the attention are made
by the model and not here. The best of `--repeats` passes counts.

What surprises: workers are threads, so what they gain is the part of numpy that runs without the interpreter's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from meloformer.command_line import Parser
from meloformer.config import DataConfig
from meloformer.data import Corpus, RowPlan, batches
from meloformer.errors import exit_cleanly

CHUNK = 1 << 20


def read_bytes(corpus: Corpus) -> int:
    """Read every shard once, as plainly as can be; returns the number of tokens they hold."""
    for entry in corpus.meta["shards"]:
        with open(corpus.path / entry["file"], "rb", buffering=0) as file:
            while file.read(CHUNK):
                pass
    return int(corpus.index["num_tokens"].sum())


def load_rows(corpus: Corpus, data: DataConfig, rows: int, num_workers: int, augment: bool) -> int:
    """One epoch of batches of `rows` rows; returns the tokens that were fed."""
    plan = RowPlan(corpus, data, split="train", augment=augment)
    tokens = 0
    for step in batches(plan, 0, rows, micro_batch=rows, num_workers=num_workers):
        tokens += sum(int((batch["document"] >= 0).sum()) for batch in step.micro_batches)
    return tokens


def per_second(work: Callable[[], int], repeats: int) -> tuple[float, float]:
    """Tokens a second, by the wall clock and by the time that this process spent on a core; the best of several."""
    wall = busy = 0.0
    for _ in range(repeats):
        started, begun = time.perf_counter(), time.process_time()
        tokens = work()
        wall = max(wall, tokens / (time.perf_counter() - started))
        busy = max(busy, tokens / max(time.process_time() - begun, 1e-9))
    return wall, busy


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--max_seq_len", type=int, default=24576)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    corpus = Corpus(arguments.data_dir)
    data = DataConfig(data_dir=arguments.data_dir, max_seq_len=arguments.max_seq_len, validation_fraction=0.0)
    data.validate()
    bytes_only, _ = per_second(lambda: read_bytes(corpus), arguments.repeats)
    print(f"{'':28}{'tokens/s':>16}{'per busy second':>18}{'x the time of bytes':>22}")
    print(f"{'bytes of the shards':28}{bytes_only:16,.0f}")
    for augment in (False, True):
        for workers in sorted({0, arguments.num_workers}):
            wall, busy = per_second(
                lambda workers=workers, augment=augment: load_rows(corpus, data, arguments.rows, workers, augment),
                arguments.repeats,
            )
            name = f"{'augmented' if augment else 'plain'} rows, {workers} workers"
            print(f"{name:28}{wall:16,.0f}{busy:18,.0f}{bytes_only / wall:22,.0f}")


if __name__ == "__main__":
    exit_cleanly(main)
