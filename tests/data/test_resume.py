"""A preprocessing run that is killed goes on, and nobody can tell from its bytes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from meloformer import files
from meloformer.data import Corpus
from meloformer.data.arrays import FORMAT_VERSION
from meloformer.data.journal import JOURNAL, Journal
from meloformer.data.pool import _Worker
from meloformer.data.shards import shard_name
from meloformer.data.sources import Input
from meloformer.data.writer import CorpusWriter
from meloformer.errors import UserError
from tests.conftest import ROOT
from tests.data.music import write_folder
from tests.data.test_preprocess import content, run

try:
    import resource
except ImportError:  # Windows
    resource = None


@pytest.fixture(scope="module")
def midi(tmp_path_factory) -> Path:
    """60 short pieces, with a copy and a wreck here and there, far from what they copy."""
    folder = write_folder(tmp_path_factory.mktemp("midi"), range(60), num_bars=4)
    for i in range(0, 50, 7):
        (folder / f"piece{i:03d} again.mid").write_bytes((folder / f"piece{i + 9:03d}.mid").read_bytes())
        (folder / f"piece{i:03d} wreck.mid").write_bytes((folder / f"piece{i:03d}.mid").read_bytes()[:-9])
    return folder


@pytest.fixture(scope="module")
def whole(midi, tmp_path_factory) -> Path:
    """What an unbroken run writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(midi, output, shard_size=4)
    meta = json.loads((output / "meta.json").read_text())
    assert meta["rejected"] == {"duplicate": 8, "unreadable": 8} and len(meta["shards"]) == 15
    return output


def test_killed_ten_times_at_random_moments(midi, whole, tmp_path):
    """The parent gets SIGKILL wherever it is: in the pool, between a shard and its entry, while it writes the index."""
    output = tmp_path / "out"
    flags = ["--input", str(midi), "--output", str(output), "--shard-size", "4", "--workers", "2"]
    command = [sys.executable, str(ROOT / "preprocess_data.py"), *flags]
    rng = random.Random(0)

    def entries() -> int:
        with suppress(FileNotFoundError):  # a run that ends clears its journal away while it is being counted
            return sum(re.fullmatch(r"entry-\d+\.safetensors", n) is not None for n in os.listdir(output / JOURNAL))
        return 0

    kills, begun_at = 0, []
    while kills < 10:
        begun_at.append(entries())
        some_more = begun_at[-1] + rng.randrange(4)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and entries() < some_more:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1 if some_more > begun_at[-1] else rng.random())
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # too late: that was a whole run
            assert content(output) == content(whole)
            shutil.rmtree(output)
        else:
            kills += 1
    assert max(begun_at) > 0
    run(midi, output, shard_size=4)
    assert content(output) == content(whole)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked for in /proc")
def test_an_interruption_is_one_word(midi, tmp_path):
    """Ctrl-C goes to all processes: the one that imports modules for the others said so in thirteen lines."""
    files = [str(path) for path in midi.glob("*.mid")] * 200  # work for longer than it takes to look
    (tmp_path / "list.txt").write_text("\n".join(files))
    flags = ["--input", str(tmp_path / "list.txt"), "--output", str(tmp_path / "out"), "--workers", "2"]
    command = [sys.executable, str(ROOT / "preprocess_data.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What a shell starts in its background is deaf to Ctrl-C, and so are these tests and their children there.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, start_new_session=True, preexec_fn=heed, **pipes) as process:

        def importing() -> bool:
            for path in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if os.getsid(int(path.name)) == process.pid and b"forkserver" in (path / "cmdline").read_bytes():
                        return "numpy" in (path / "maps").read_text()
            return False

        while not importing():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
    said = [line for line in error.splitlines() if line.strip() and "file/s" not in line]  # a bar may have begun
    assert (process.returncode, out, said) == (130, "", ["interrupted"])


@pytest.mark.parametrize("fails_at", ["entry-00002", "shard-00003", "index", "meta.json"])
def test_a_full_disk_is_one_line_and_what_is_finished_stays(midi, whole, tmp_path, monkeypatch, fails_at):
    replace = files.os.replace

    def full(source, target):
        if fails_at in str(target):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(UserError, match=rf"{fails_at}.*: cannot be written \(No space left on device\); make room"):
            run(midi, tmp_path / "out", shard_size=4)
    finished = sorted((tmp_path / "out").glob("shard-*"))
    assert len(finished) == {"entry-00002": 3, "shard-00003": 3}.get(fails_at, 15)
    for path in finished:
        assert path.read_bytes() == (whole / path.name).read_bytes()
    begun_at = []
    after = Input.after
    monkeypatch.setattr(Input, "after", lambda self, number: begun_at.append(number) or after(self, number))
    run(midi, tmp_path / "out", shard_size=4)
    assert content(tmp_path / "out") == content(whole)
    assert not begun_at or min(begun_at) >= 8  # it did not begin again


@pytest.mark.skipif(resource is None, reason="this system has no limit on the size of a file")
def test_a_write_that_fails_anywhere_is_one_line_and_the_next_run_goes_on(midi, whole, tmp_path):
    """A real refusal of the system, for each size in another place: a column, the shard, the index."""
    output = tmp_path / "out"
    flags = ["--input", str(midi), "--output", str(output), "--shard-size", "4", "--workers", "1"]
    largest = max(path.stat().st_size for path in whole.iterdir())
    for size in (0, 100, largest // 3, largest - 1):
        done = subprocess.run(
            [sys.executable, str(ROOT / "preprocess_data.py"), *flags],
            preexec_fn=lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
            capture_output=True,
            text=True,
        )
        last = done.stderr.strip().splitlines()[-1]
        assert re.match(r"error: .*: cannot be written \(File too large\); make room", last), done.stderr
        assert done.returncode == 2
        assert "Traceback" not in done.stderr and not (output / "meta.json").exists()
        for path in output.glob("shard-*"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
    run(midi, output, shard_size=4)
    assert content(output) == content(whole)


def test_workers_that_are_killed_cost_nothing(midi, whole, tmp_path, monkeypatch):
    """By somebody from outside, up to five in one run: every file is in the corpus all the same."""
    give = _Worker.give
    kills = []

    def give_and_kill(worker, batch):
        give(worker, batch)
        if len(batch) > 1 and len(kills) < 5:
            with suppress(ProcessLookupError):  # it was killed the last time, and is gone
                os.kill(worker.process.pid, signal.SIGKILL)
            kills.append(worker.process.pid)

    monkeypatch.setattr(_Worker, "give", give_and_kill)
    run(midi, tmp_path / "out", shard_size=4, workers=2)
    assert len(set(kills)) > 1 and content(tmp_path / "out") == content(whole)


def test_an_output_where_nothing_can_be_written_is_one_line(midi, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written \(Not a directory\)|file/out/journal: cannot"):
        run(midi, tmp_path / "file" / "out")


def test_an_unfinished_corpus_is_not_continued_as_another(midi, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CorpusWriter, "finish", interrupted)
        run(midi, tmp_path / "out", limit=12, shard_size=4)
    with pytest.raises(
        UserError, match=r"an unfinished corpus made otherwise \(limit was 12, now 9; other input files\)"
    ):
        run(midi, tmp_path / "out", limit=9, shard_size=4)
    run(midi, tmp_path / "out", limit=12, shard_size=4)
    assert Corpus(tmp_path / "out").meta["totals"]["files"] == 12


def test_two_runs_do_not_write_into_one_folder(midi, tmp_path):
    with (
        Journal(tmp_path, {"settings": {}, "input": {}}, 0),
        pytest.raises(UserError, match="another run is writing here"),
    ):
        run(midi, tmp_path)


def test_an_entry_holds_its_own_shard_alone(tmp_path):
    """Each held the list of all shards before it: 8 GB at ten thousand. A journal may still hold such."""
    with Journal(tmp_path, {"settings": {}, "input": {}}, 0) as journal:
        for number in range(40):
            journal.state.shards.append({"file": shard_name(number), "sha256": f"{number:064d}"})
            if number == 2:
                journal.new_entry().close({"format": FORMAT_VERSION, "state": vars(journal.state)})
                journal.num_entries += 1
            else:
                journal.finish_entry(journal.new_entry())
        shards = journal.state.shards
    sizes = [path.stat().st_size for path in sorted((tmp_path / JOURNAL).glob("entry-*"))]
    assert len(sizes) == 40 and max(sizes[3:]) <= sizes[0] + 16 < sizes[2]
    with Journal(tmp_path, {"settings": {}, "input": {}}, 0) as journal:
        assert journal.state.shards == shards
