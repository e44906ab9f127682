"""From a folder of MIDI files to a corpus: read, encode, find duplicates, write shards.

In: a `PreprocessConfig`; its input is a folder (searched through, .mid and .midi in any letter case) or a text file
with one path a line. Out, in the output folder: shard-*.safetensors, index.safetensors, rejected.jsonl (one line for
every file that is not in the corpus: path, reason, detail) and, last, meta.json. A folder without meta.json is
unfinished; the same command goes on from its last finished shard.

>>> preprocess(PreprocessConfig(input="midi", output="processed", workers=2))       # doctest: +SKIP
75 pieces, 263,114 notes, 1,124,870 tokens in 1 shard: processed; ...

The surprise: the bytes depend on the files, their order and the settings, and on nothing else: results come back in
input order for any number of workers, a run that was killed ends as an unbroken one, and no clock, host name or worker
count is written.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from meloformer.config import PreprocessConfig
from meloformer.data.corpus import META, REJECTED, Corpus, read_meta
from meloformer.data.encoder import Encoded, Encoder, Rejected
from meloformer.data.journal import JOURNAL, refuse_another
from meloformer.data.pool import Failure, Pool
from meloformer.data.sources import Input, Source
from meloformer.data.writer import CorpusWriter, settings_of
from meloformer.errors import UserError
from meloformer.report import counted

POSTFIX_SECONDS = 0.2  # between two looks of the progress bar at the totals


def preprocess(config: PreprocessConfig) -> None:
    """Do what the module's docstring says; UserError if there is nothing to read or the output cannot be written."""
    config.validate()
    source = Input(config.input, config.limit, config.share)
    output = Path(config.output)
    if is_complete(output, settings_of(config), source.describe()):
        print(f"{output} is complete already. {summary(read_meta(output), output)}")
        return
    existed = output.exists()
    with writing(output), CorpusWriter(output, settings_of(config), source.describe(), source.first) as writer:
        _run(config, source, writer)
        if not writer.state.totals["pieces"] and config.part is None:
            _refuse_nothing(config, source, writer, existed)
        meta = writer.finish()
    print(summary(meta, output))


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """What the system refuses becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or output}: cannot be written ({error.strerror}); make room or give another --output, "
            "finished shards are kept"
        ) from None


def is_complete(output: Path, settings: dict, source: dict) -> bool:
    """True if the folder already holds what this run would write; UserError if it holds another corpus."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; --output takes a folder")
    if not (output / META).exists():
        return False
    refuse_another(output, {"settings": settings, "input": source}, read_meta(output), "a corpus")
    Corpus(output)  # DataError if a file of it is missing or cut short
    if settings["part"] is None:
        shutil.rmtree(output / JOURNAL, ignore_errors=True)  # of a run that was killed at its very end
    return True


def _run(config: PreprocessConfig, source: Input, writer: CorpusWriter) -> None:
    first = writer.state.next_source
    looked = 0.0
    notes_before = writer.state.totals["notes"]
    with tqdm(
        total=source.last - source.first, initial=first - source.first, unit="file", smoothing=0, file=sys.stderr
    ) as bar:
        for number, result in enumerate(_results(config, source, first), first):
            writer.add(number, result)
            if time.monotonic() - looked > POSTFIX_SECONDS:
                looked = time.monotonic()
                notes = (writer.state.totals["notes"] - notes_before) / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix({"notes/s": f"{notes:,.0f}", "rejected": writer.num_rejected}, refresh=False)
            bar.update()
    if writer.state.next_source != source.last:
        raise UserError(
            f"{config.input}: files have gone while they were read; run the command again with another --output"
        )


def _results(config: PreprocessConfig, source: Input, first: int) -> Iterator[Encoded | Rejected]:
    """What became of each file from number `first` on."""
    workers = min(config.workers or _num_cores(), source.last - first)
    if not workers:
        return
    names: deque[str] = deque()  # of the files that are being read

    def tasks() -> Iterator[Source]:
        for task in source.after(first):
            names.append(task.name)
            yield task

    with Pool(Encoder, config, workers, config.file_timeout, config.file_memory) as pool:
        for result in pool.map(tasks()):
            name = names.popleft()
            yield Rejected(name, *result) if isinstance(result, Failure) else result


def _num_cores() -> int:
    """Those that this process may use: a job of a cluster has its share of a machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_nothing(config: PreprocessConfig, source: Input, writer: CorpusWriter, existed: bool) -> None:
    output = writer.output
    reasons = _reasons(writer.state.reasons)
    name, detail = writer.first_rejected()
    writer.remove()
    if not existed:
        output.rmdir()
    raise UserError(
        f"{config.input}: none of {source.files} files can be used ({reasons}); the first, {name}: {detail}"
    )


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))


def summary(meta: dict, output: Path) -> str:
    """One line: what is there, and what to run next."""
    totals, rejected, shards = meta["totals"], meta["rejected"], len(meta["shards"])
    text = f"{counted(totals['pieces'], 'piece')}, {totals['notes']:,} notes, {totals['tokens']:,} tokens"
    text += f" in {shards} shard{'s' if shards != 1 else ''}: {output}"
    if rejected:
        left_out = f"{sum(rejected.values())} of {totals['files']} files left out ({_reasons(rejected)})"
        text += f"; {left_out}, listed in {REJECTED}"
    part = meta["settings"]["part"]
    if part is not None:
        every = part.partition("/")[2]
        return f"{text}. Next: python -m meloformer.data.merge of all {every} parts"
    return f"{text}. Next: python train.py --data_dir {output}"
