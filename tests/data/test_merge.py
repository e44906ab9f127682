"""Parts made on several machines become the corpus that one machine would have made."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meloformer.data import Corpus
from meloformer.data.merge import merge
from meloformer.data.writer import CorpusWriter
from meloformer.errors import UserError
from tests.conftest import ROOT
from tests.data.music import write_folder
from tests.data.test_preprocess import content, run

SETTINGS = {"shard_size": 4, "min_notes": 12}


@pytest.fixture(scope="module")
def midi(tmp_path_factory) -> Path:
    """Copies and wrecks before, between and behind the pieces, so that every seam of the parts meets some."""
    folder = write_folder(tmp_path_factory.mktemp("midi"), range(20), num_bars=6)
    for i in (2, 3, 9, 16):
        shutil.copy(folder / f"piece{i:03d}.mid", folder / f"piece{i + 2:03d} a copy.mid")
        (folder / f"piece{i:03d} wreck.mid").write_bytes(b"MThd")
    (folder / "a.mid").write_bytes(b"")
    (folder / "z.mid").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def parts(midi, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    for i in range(1, 4):
        run(midi, folder / str(i), part=f"{i}/3", **SETTINGS)
    return [folder / str(i) for i in range(1, 4)]


@pytest.mark.parametrize("dedup", [True, False])
def test_merged_parts_are_the_whole_to_the_byte(midi, parts, tmp_path, dedup):
    if not dedup:
        parts = [tmp_path / str(i) for i in range(1, 4)]
        for i, part in enumerate(parts, 1):
            run(midi, part, part=f"{i}/3", dedup=False, **SETTINGS)
    run(midi, tmp_path / "whole", dedup=dedup, **SETTINGS)
    assert ("duplicate" in Corpus(tmp_path / "whole").meta["rejected"]) == dedup
    merge(parts[::-1], tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


def test_copies_in_one_part_name_the_piece_that_is_kept(tmp_path, monkeypatch):
    """The second of them went by its part's own line, which named the first: a file that the whole does not hold."""
    folder = write_folder(tmp_path / "midi", range(6), num_bars=6)
    for name in ("piece004 y.mid", "piece005 z.mid"):
        shutil.copy(folder / "piece000.mid", folder / name)
    for i in (1, 2):
        run(folder, tmp_path / str(i), part=f"{i}/2", shard_size=1)
    parts = [tmp_path / "1", tmp_path / "2"]
    assert "piece004 y.mid" in (parts[1] / "rejected.jsonl").read_text()
    run(folder, tmp_path / "whole", shard_size=1)
    merge(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")

    def stop_before_last(writer, number, result, add=CorpusWriter.add):
        if number == 7:
            raise KeyboardInterrupt
        add(writer, number, result)

    with monkeypatch.context() as patch:
        patch.setattr(CorpusWriter, "add", stop_before_last)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, tmp_path / "again")
    merge(parts, tmp_path / "again")  # begins behind the first copy
    assert content(tmp_path / "again") == content(tmp_path / "whole")


def test_a_part_is_a_corpus_and_one_that_holds_nothing_is_a_part(midi, parts, tmp_path):
    assert sum(Corpus(part).num_pieces for part in parts) == 20 + sum(
        Corpus(part).name(i).endswith("copy.mid") for part in parts for i in range(Corpus(part).num_pieces)
    )
    folder = write_folder(tmp_path / "midi", [0])
    (folder / "a.mid").write_bytes(b"")
    for i in (1, 2):
        run(folder, tmp_path / str(i), part=f"{i}/2")
    assert Corpus(tmp_path / "1").num_pieces == 0
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    assert Corpus(tmp_path / "merged").num_pieces == 1


KILLED_BEFORE = """
import os, signal, sys
from pathlib import Path
from meloformer import files
from meloformer.data.merge import merge
from meloformer.data.writer import CorpusWriter

def replace(source, target, replace=os.replace):
    if sys.argv[1] in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

files.os.replace = replace
merge([Path(part) for part in sys.argv[3:]], Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("file", "finished"), [("shard-00000", 0), ("entry-00002", 3), ("shard-00003", 3), ("index", 5), ("meta.json", 5)]
)
def test_a_killed_merge_goes_on_where_it_was(parts, tmp_path, monkeypatch, file, finished):
    """It was begun again once, which for a corpus of a million pieces is an hour."""
    merge(parts, tmp_path / "whole")
    output = tmp_path / "merged"
    command = [sys.executable, "-c", KILLED_BEFORE, file, str(output), *map(str, parts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    shards = sorted(output.glob("shard-*"))
    assert len(shards) == finished and not (output / "meta.json").exists()
    assert all(path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes() for path in shards)
    numbers = []
    add = CorpusWriter.add
    monkeypatch.setattr(CorpusWriter, "add", lambda *given: numbers.append(given[1]) or add(*given))
    merge(parts, output)
    assert content(output) == content(tmp_path / "whole")
    assert len(numbers) <= 30 - 4 * min(finished, 4)  # an entry that was not written costs its shard again


def test_what_an_earlier_merge_left_is_no_part_of_the_next(parts, tmp_path):
    merge(parts, tmp_path / "merged")
    good = content(tmp_path / "merged")
    (tmp_path / "merged" / "meta.json").unlink()
    (tmp_path / "merged" / "journal").mkdir()
    merge(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == good


def test_what_cannot_be_merged_is_said(midi, parts, tmp_path):
    run(midi, tmp_path / "other", part="2/3", shard_size=4, min_notes=13)
    run(midi, tmp_path / "whole", **SETTINGS)
    shutil.copytree(parts[1], tmp_path / "cut")
    lines = (parts[1] / "rejected.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "rejected.jsonl").write_text("".join(lines[:1]))
    for folders, message in (
        (parts[:2], "part 3 of 3 is missing; give all 3 folders"),
        ([*parts, parts[0]], "is part 1/3, and so is .*; give each part once"),
        (
            [parts[0], tmp_path / "other", parts[2]],
            "other: other settings than .*; run preprocess_data.py for this part",
        ),
        ([tmp_path / "whole"], "whole: is no part"),
        ([parts[0], tmp_path / "cut", parts[2]], "rejected.jsonl: cut short|the parts hold"),
        ([tmp_path / "nowhere"], "nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            merge(folders, tmp_path / "out")
        assert not (tmp_path / "out" / "meta.json").exists()


def test_the_command_line(parts, tmp_path):
    command = [sys.executable, "-m", "meloformer.data.merge"]
    done = subprocess.run(
        [*command, *map(str, parts), "--output", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("20 pieces, "), done.stderr
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["settings"]["part"] is None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
