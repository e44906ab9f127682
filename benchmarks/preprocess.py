"""How fast preprocessing is beside MidiTok, how it scales to two workers, and what memory and disk it takes.

    python benchmarks/preprocess.py --midi midi/ [--only speed,conditions,workers,memory]

`speed`: one core, reading included, all files of the folder, without conditions, which MidiTok has not either, and with
them, which is the command's default; then MidiTok's REMI with programs, tempos and time signatures on every k-th of the
files that we encode, ours without conditions on the same files in the same run (pip install ".[bench]"). `conditions`:
the same files with and without deriving conditions, by turns. `workers`: the whole command with one and with two
workers, by turns, on the folder and on its files under several other names, for starting up takes half a second
whatever there is to do. `memory`: peak resident memory of the parent and of each worker for 1,000 and for 20,000 names
of the same files, with --no-dedup.

Processor time for `speed` and `conditions`, so that other people's work on the machine counts for little; wall-clock
time for `workers`, so run that on a quiet machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meloformer.data.pool import limit_blas_threads  # noqa: E402

limit_blas_threads()  # as a worker has it, and before numpy is imported

from meloformer.command_line import Parser  # noqa: E402
from meloformer.config import PreprocessConfig  # noqa: E402
from meloformer.data.corpus import read_meta  # noqa: E402
from meloformer.data.encoder import Encoded, Encoder  # noqa: E402
from meloformer.data.sources import Input, Source  # noqa: E402
from meloformer.errors import exit_cleanly  # noqa: E402

GOALS = {
    "notes/s on one core": 2_000_000,
    "the same, with conditions": 2_000_000,
    "files/s, times MidiTok's": 20,
    "conditions, times without": 1.5,
    "2 workers, times 1 worker": 1.7,
    "the same, every file {copies} times": 1.7,
    "bytes a token": 3,
    "peak memory, 20,000 files / 1,000": 1.1,
}


def report(name: str, value: float, detail: str = "", **values: int) -> None:
    goal, name = GOALS[name], name.format(**values)
    good = value <= goal if name.startswith(("bytes", "peak", "conditions")) else value >= goal
    print(f"{name:36} {value:14,.2f}   goal {goal:>11,}   {'met' if good else 'NOT MET'}   {detail}", flush=True)


def processor_seconds(call: Callable[[], object], repeats: int) -> float:
    """The least of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def speed(folder: str, repeats: int, every: int) -> None:
    encode, encode_with_conditions = both_encoders(folder)
    sources = list(Input(folder))
    results = [encode(source) for source in sources]
    good = [source for source, result in zip(sources, results) if isinstance(result, Encoded)]
    notes = sum(result.num_notes for result in results if isinstance(result, Encoded))
    for name, encoder in (("notes/s on one core", encode), ("the same, with conditions", encode_with_conditions)):
        seconds = processor_seconds(lambda encoder=encoder: [encoder(source) for source in sources], repeats)
        report(name, notes / seconds, f"{len(sources)} files, {notes:,} notes, {seconds:.2f} s")

    sample = good[::every]
    theirs = processor_seconds(lambda: miditok_remi(sample), max(repeats // 2, 1))
    ours = processor_seconds(lambda: [encode(source) for source in sample], repeats)
    rates = f"{len(sample)} files: {len(sample) / ours:,.0f} files/s, MidiTok {len(sample) / theirs:,.0f}"
    report("files/s, times MidiTok's", theirs / ours, rates)


def both_encoders(folder: str) -> list[Encoder]:
    """Without conditions and with them."""
    return [Encoder(PreprocessConfig(input=folder, output="-", conditions=given)) for given in (False, True)]


def conditions(folder: str, repeats: int) -> None:
    sources = list(Input(folder))
    encoders, times = both_encoders(folder), ([], [])
    for _ in range(repeats):
        for encode, seconds in zip(encoders, times):
            seconds.append(processor_seconds(lambda encode=encode: [encode(source) for source in sources], 1))
    without, with_them = map(min, times)
    report(
        "conditions, times without", with_them / without, f"{len(sources)} files, {without:.2f} and {with_them:.2f} s"
    )


def miditok_remi(sources: list[Source]) -> None:
    try:
        import miditok
        import symusic
    except ImportError:
        sys.exit("error: this compares with MidiTok; pip install '.[bench]'")
    config = miditok.TokenizerConfig(use_programs=True, use_tempos=True, use_time_signatures=True)
    tokenizer = miditok.REMI(config)
    for source in sources:
        with contextlib.suppress(RuntimeError, ValueError, KeyError, IndexError):  # what it cannot read it may skip
            tokenizer(symusic.Score(source.path))


def command(folder: str, output: Path, workers: int, *flags: str) -> list[str]:
    script = str(ROOT / "preprocess_data.py")
    return [sys.executable, script, "--input", folder, "--output", str(output), "--workers", str(workers), *flags]


def workers(folder: str, repeats: int, copies: int, scratch: Path) -> None:
    names = scratch / "names"
    link_copies([source.path for source in Input(folder)], names, copies)
    for name, files in (("2 workers, times 1 worker", folder), ("the same, every file {copies} times", str(names))):
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(repeats):
            for number in times:
                start = time.perf_counter()
                words = command(files, scratch / "out", number, "--no-dedup")
                subprocess.run(words, check=True, capture_output=True)
                times[number].append(time.perf_counter() - start)
                meta = read_meta(scratch / "out")
                shutil.rmtree(scratch / "out")
        one, two = min(times[1]), min(times[2])
        report(name, one / two, f"{one:.2f} s and {two:.2f} s; all: {_rounded(times)}", copies=copies)
    size = sum(shard["bytes"] for shard in meta["shards"])
    report("bytes a token", size / meta["totals"]["tokens"], f"{size:,} bytes in shards")


def link_copies(paths: list[str], folder: Path, copies: int) -> None:
    for copy in range(copies):
        (folder / str(copy)).mkdir(parents=True)
        for i, path in enumerate(paths):
            os.symlink(os.path.abspath(path), folder / str(copy) / f"{i:05d}.mid")


def _rounded(times: dict[int, list[float]]) -> dict[int, list[float]]:
    return {number: [round(t, 2) for t in seconds] for number, seconds in times.items()}


def memory(folder: str, scratch: Path) -> None:
    originals = [source.path for source in Input(folder)][::-1][:1000]
    peaks = {}
    for copies in (1, 20):
        names = scratch / f"midi{copies}"
        link_copies(originals, names, copies)
        peaks[copies] = peak_memory(command(str(names), scratch / f"out{copies}", 2, "--no-dedup"))
        print(
            f"{copies * 1000:6,} files: parent {peaks[copies][0]:.1f} MB, workers {peaks[copies][1]:.1f} MB", flush=True
        )
    for i, who in enumerate(("parent", "workers")):
        report("peak memory, 20,000 files / 1,000", peaks[20][i] / peaks[1][i], who)


def peak_memory(words: list[str]) -> tuple[float, float]:
    """Megabytes, the high-water marks of a command and of the largest of its descendants."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks: dict[int, float] = {}

    def watch() -> None:
        while process.poll() is None:
            parents = {
                int(status.parent.name): _field(status, "PPid") for status in Path("/proc").glob("[0-9]*/status")
            }
            family = {process.pid}
            for _ in range(3):  # parent, fork server, workers
                family |= {pid for pid, parent in parents.items() if parent in family}
            for pid in family:
                peaks[pid] = max(peaks.get(pid, 0), _field(Path(f"/proc/{pid}/status"), "VmHWM") / 1024)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        sys.exit(f"error: {' '.join(words)} ended with status {process.returncode}")
    watcher.join()
    return peaks.pop(process.pid), max(peaks.values())


def _field(status: Path, name: str) -> int:
    try:
        text = status.read_text()
    except OSError:
        return 0  # it has ended
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:")), 0)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    default = os.environ.get("MELOFORMER_MIDI") or str(ROOT.parent / "shared" / "midi")
    parser.add_argument("--midi", default=default, help="a folder of MIDI files")
    parser.add_argument("--only", default="speed,conditions,workers,memory", help="which of these")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the best counts")
    parser.add_argument("--copies", type=int, default=4, help="for workers: every file under so many names")
    parser.add_argument("--every", type=int, default=20, help="MidiTok gets every so-manieth file")
    given = parser.parse_args()
    asked = given.only.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        if "speed" in asked:
            speed(given.midi, given.repeats, given.every)
        if "conditions" in asked:
            conditions(given.midi, given.repeats)
        if "workers" in asked:
            workers(given.midi, given.repeats, given.copies, Path(scratch))
        if "memory" in asked:
            memory(given.midi, Path(scratch))


if __name__ == "__main__":
    exit_cleanly(main)
