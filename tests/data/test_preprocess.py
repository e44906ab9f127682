"""preprocess: the same bytes for any number of workers, a line for every file left out, and clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from meloformer.config import PreprocessConfig
from meloformer.data import Corpus
from meloformer.data.encoder import CRASHED, Encoder
from meloformer.data.preprocess import preprocess
from meloformer.data.sources import Input, Source
from meloformer.errors import UserError
from meloformer.hid import Tokenizer, Vocabulary
from meloformer.midi import Score, Track, note_table, read_score, write_midi
from tests.conftest import ROOT
from tests.data.music import make_score, write_folder
from tests.data.mutate import mutate


def run(input, output, **settings) -> None:
    preprocess(PreprocessConfig(input=str(input), output=str(output), **settings))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rejected(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return [(line["path"], line["reason"]) for line in map(json.loads, lines)]


@pytest.fixture
def midi(tmp_path) -> Path:
    """Five good files in nested folders with odd names, and every kind of bad one."""
    folder = write_folder(tmp_path / "midi", range(3))
    (folder / "Ünder a b").mkdir()
    write_midi(make_score(3), folder / "Ünder a b" / "LOUD.MID")
    write_midi(make_score(4), folder / "Ünder a b" / "x.Midi")
    write_midi(make_score(1), folder / "zz copy of 1.mid")
    (folder / "damaged.mid").write_bytes((folder / "piece000.mid").read_bytes()[:-20])
    (folder / "page.mid").write_text("<html>404</html>")
    write_midi(Score(480, [Track(0)], note_table([(0, 0, 100, 60, 80)])), folder / "one note.mid")
    write_midi(make_score(9, num_bars=40), folder / "long.mid")
    (folder / "readme.txt").write_text("not listed at all")
    return folder


def test_what_is_kept_and_what_is_left_out(midi, tmp_path, capsys):
    run(midi, tmp_path / "out", max_bars=30)
    corpus = Corpus(tmp_path / "out")
    names = ["piece000.mid", "piece001.mid", "piece002.mid", "Ünder a b/LOUD.MID", "Ünder a b/x.Midi"]
    assert [corpus.name(i) for i in range(corpus.num_pieces)] == names
    assert rejected(tmp_path / "out") == [
        ("damaged.mid", "unreadable"),
        ("long.mid", "many_bars"),
        ("one note.mid", "few_notes"),
        ("page.mid", "unreadable"),
        ("zz copy of 1.mid", "duplicate"),
    ]
    assert str(tmp_path) not in (tmp_path / "out" / "rejected.jsonl").read_text()
    meta = corpus.meta
    assert meta["rejected"] == {"duplicate": 1, "few_notes": 1, "many_bars": 1, "unreadable": 2}
    assert meta["input"]["files"] == 10 and meta["totals"]["pieces"] == 5
    assert meta["totals"]["tokens"] == sum(len(corpus.piece(i)) for i in range(5))
    assert sum(meta["length_histogram"].values()) == 5
    assert meta["instruments"]["0"] == 10 and meta["instruments"]["drums"] == 5
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("5 pieces, ") and last.endswith(f"Next: python train.py --data_dir {tmp_path / 'out'}")


def test_the_index_says_what_the_streams_say(midi, tmp_path):
    run(midi, tmp_path / "out", shard_size=2)
    corpus = Corpus(tmp_path / "out")
    tokenizer = Tokenizer(corpus.vocabulary)
    index = corpus.index
    for i in range(corpus.num_pieces):
        tokens = corpus.piece(i)
        score = read_score(midi / corpus.name(i))
        np.testing.assert_array_equal(tokens, tokenizer.encode(score))
        decoded = tokenizer.decode(tokens)
        found = (len(tokens), decoded.num_bars, len(decoded.tracks), decoded.num_notes)
        assert found == tuple(int(index[f"num_{n}"][i]) for n in ("tokens", "bars", "tracks", "notes"))
        bars = int((tokens == corpus.vocabulary.BAR).sum()) - decoded.num_bars
        assert index["num_track_bars"][i] == bars and index["num_segments"][i] == len(corpus.segments(i).bar)
        assert (index["shard"][i], index["piece_in_shard"][i]) == divmod(i, 2)


def test_the_bytes_do_not_depend_on_the_number_of_workers(midi, tmp_path):
    for workers in (1, 3):
        run(midi, tmp_path / f"out{workers}", shard_size=2, workers=workers)
    assert content(tmp_path / "out1") == content(tmp_path / "out3")
    assert len(content(tmp_path / "out1")) == 3 + 3  # three shards; index, meta, rejected


def test_a_list_is_read_in_its_order_relative_to_the_current_folder(midi, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["midi/piece002.mid", "midi/gone.mid", "", "midi/Ünder a b/x.Midi", str(midi / "piece000.mid")]
    Path("files.txt").write_text("\r\n".join(lines) + "\n", encoding="utf-8")
    run("files.txt", "out")
    corpus = Corpus("out")
    assert [corpus.name(i) for i in range(3)] == [lines[0], lines[3], lines[4]]
    assert rejected(Path("out")) == [("midi/gone.mid", "unreadable")]


def test_a_list_that_begins_with_a_byte_order_mark_keeps_its_first_file(tmp_path):
    (tmp_path / "files.txt").write_text("in/a.mid\tfolk\nin/b.mid\n", encoding="utf-8-sig")
    assert [source.name for source in Input(str(tmp_path / "files.txt"))] == ["in/a.mid", "in/b.mid"]


def test_linked_folders_are_read_once_each_and_a_circle_ends(tmp_path):
    """They were left out and not counted: a farm of links held "no .mid or .midi file"."""
    farm, outside = tmp_path / "farm", tmp_path / "outside"
    for path in (outside / "x.mid", outside / "inner" / "y.mid", farm / "own" / "z.mid"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"MThd")
    for link, target in (
        (farm / "a", outside),
        (farm / "b", outside),  # the same once more
        (farm / "c", farm / "own"),  # which is read by its own name
        (farm / "d", farm / "d"),
        (farm / "e.mid", tmp_path / "gone.mid"),
        (farm / "up", tmp_path),  # goes round
        (outside / "back", farm),
        (outside / "inner" / "circle", outside),
    ):
        link.symlink_to(target)
    sources = list(Input(str(farm)))
    assert [source.name for source in sources] == ["a/inner/y.mid", "a/x.mid", "e.mid", "own/z.mid"]
    assert Path(sources[1].path).read_bytes() == b"MThd"
    assert [source.name for source in Input(str(outside))] == ["back/c/z.mid", "back/e.mid", "inner/y.mid", "x.mid"]


def test_names_that_are_no_text_are_still_names(tmp_path):
    folder = write_folder(tmp_path / "midi", [0])
    os.rename(os.fsencode(folder / "piece000.mid"), os.fsencode(folder) + b"/caf\xe9.mid")
    run(folder, tmp_path / "out")
    assert Corpus(tmp_path / "out").name(0) == "caf\\xe9.mid"


def test_copies_are_kept_on_request_and_share_a_cluster(midi, tmp_path):
    run(midi, tmp_path / "out", dedup=False)
    corpus = Corpus(tmp_path / "out")
    names = [corpus.name(i) for i in range(corpus.num_pieces)]
    clusters = corpus.index["cluster"]
    assert clusters[names.index("zz copy of 1.mid")] == clusters[names.index("piece001.mid")]
    assert len(set(clusters.tolist())) == len(names) - 1


def test_limit_and_resolution(midi, tmp_path):
    run(midi, tmp_path / "out", limit=6, resolution=12)
    corpus = Corpus(tmp_path / "out")
    assert corpus.meta["input"]["files"] == 6 and corpus.vocabulary == Vocabulary(12)


def test_a_second_run_does_no_finished_work_again(midi, tmp_path, capsys):
    run(midi, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    run(midi, tmp_path / "out", workers=2)
    assert "is complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_an_unfinished_folder_is_begun_again_and_ends_the_same(midi, tmp_path):
    run(midi, tmp_path / "whole", shard_size=2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-00007.safetensors").write_bytes(b"of an earlier run")
    (out / ".shard-00000.safetensors.tmp").write_bytes(b"half")
    (out / "notes.txt").write_text("not ours, so it stays")
    run(midi, out, shard_size=2)
    assert content(out).pop("notes.txt") == b"not ours, so it stays"
    (out / "notes.txt").unlink()
    assert content(out) == content(tmp_path / "whole")


def test_a_file_that_breaks_the_code_costs_one_line(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "midi", range(3))
    encode = Tokenizer.encode_fully

    def fails_once(self, score, order="canonical"):
        if score == broken:
            raise IndexError("index 7 is out of bounds")
        return encode(self, score, order)

    broken = read_score(folder / "piece001.mid")
    monkeypatch.setattr(Tokenizer, "encode_fully", fails_once)
    encoder = Encoder(PreprocessConfig(input="x", output="y"))
    results = [encoder(source) for source in Input(str(folder))]
    assert results[1] == ("piece001.mid", CRASHED, "IndexError: index 7 is out of bounds")
    assert results[0].piece.name == "piece000.mid" and results[2].piece.name == "piece002.mid"


# --- refusals -------------------------------------------------------------------------------------------------


def empty_folder(tmp_path: Path) -> str:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "song.mp3").write_bytes(b"ID3")
    return str(tmp_path / "in")


def no_midi_in_it(tmp_path: Path) -> str:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mid").write_text("this is no MIDI")
    return str(tmp_path / "in")


def empty_list(tmp_path: Path) -> str:
    (tmp_path / "list.txt").write_text("\n\n")
    return str(tmp_path / "list.txt")


def one_file(tmp_path: Path) -> str:
    write_midi(make_score(0), tmp_path / "a.mid")
    return str(tmp_path / "a.mid")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_folder, "in: no .mid or .midi file in this folder or below it"),
        (no_midi_in_it, r"none of 1 file can be used \(unreadable 1\); the first, a.mid: not a MIDI file"),
        (empty_list, "list.txt: the list is empty"),
        (one_file, "a.mid: is one MIDI file; --input takes a folder"),
        (lambda tmp_path: str(tmp_path / "nowhere"), "nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, make, message):
    given = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run(given, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_list_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def refused(path, *_):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "list.txt").write_text("a.mid\n")
    monkeypatch.setattr("meloformer.data.sources.open", refused, raising=False)
    with pytest.raises(UserError, match=r"list.txt: cannot be read \(Permission denied\); make it readable"):
        run(tmp_path / "list.txt", tmp_path / "out")


def test_an_existing_folder_stays_as_empty_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="none of 1 file "):
        run(no_midi_in_it(tmp_path), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_another_corpus_is_not_overwritten(midi, tmp_path):
    run(midi, tmp_path / "out")
    with pytest.raises(UserError, match=r"\(shard_size was 10000, now 3\); remove it or give another --output"):
        run(midi, tmp_path / "out", shard_size=3)
    (midi / "piece000.mid").unlink()
    with pytest.raises(UserError, match="other input files"):
        run(midi, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file; --output takes a folder"):
        run(midi, tmp_path / "file")


def test_an_output_that_cannot_be_written_is_named(midi, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("meloformer.data.arrays.atomic_file", full)
    with pytest.raises(UserError, match=r"shard-00000.safetensors: cannot be written \(No space left on device\)"):
        run(midi, tmp_path / "out")


def test_the_command_line_ends_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "preprocess_data.py"), "--input", empty_folder(tmp_path), "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_symlinked_names_and_sorting_are_stable(midi):
    names = [source.name for source in Input(str(midi))]
    assert names == sorted(names) and all("\\" not in name for name in names)


def test_real_files_that_go_wrong_are_encoded_or_named(real_midi, tmp_path):
    awkward = real_midi / "awkward"
    if not awkward.is_dir():
        pytest.skip("no folder of awkward files")
    files = sorted(path for path in awkward.iterdir() if path.stat().st_size < 200_000)[::3]
    (tmp_path / "list.txt").write_bytes(b"\n".join(os.fsencode(path) for path in files))
    run(tmp_path / "list.txt", tmp_path / "out")
    corpus = Corpus(tmp_path / "out")
    reasons = [reason for _, reason in rejected(tmp_path / "out")]
    assert corpus.num_pieces + len(reasons) == len(files) and CRASHED not in reasons
    for i in range(corpus.num_pieces):
        Tokenizer().validate(corpus.piece(i))


def test_an_encoder_never_raises_for_what_a_file_holds(tmp_path):
    encoder = Encoder(PreprocessConfig(input="x", output="y"))
    write_midi(make_score(0), tmp_path / "a.mid")
    data = (tmp_path / "a.mid").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(60):
        broken = bytearray(data)
        for position in rng.integers(14, len(data), size=5):
            broken[position] = rng.integers(256)
        (tmp_path / "b.mid").write_bytes(broken[: None if i % 2 else int(rng.integers(14, len(data)))])
        result = encoder(Source(str(tmp_path / "b.mid"), "b.mid"))
        assert getattr(result, "reason", "") != CRASHED, result


def test_mutated_real_files_are_encoded_or_named(real_midi, tmp_path):
    """The short version of benchmarks/fuzz_preprocess.py."""
    rng = np.random.default_rng(3)
    originals = sorted(path for path in real_midi.rglob("*.mid") if path.stat().st_size < 30_000)[::7]
    folder = tmp_path / "midi"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03d}.mid").write_bytes(mutate(originals[i % len(originals)].read_bytes(), rng))
    run(folder, tmp_path / "out", workers=2, dedup=False, min_notes=1, min_bars=1)
    corpus = Corpus(tmp_path / "out")
    reasons = [reason for _, reason in rejected(tmp_path / "out")]
    assert corpus.num_pieces + len(reasons) == 300 and corpus.num_pieces > 150 and len(reasons) > 50
    assert set(reasons) <= {"unreadable", "unencodable", "few_notes", "few_bars", "many_bars"}
    for i in range(corpus.num_pieces):
        Tokenizer().validate(corpus.piece(i))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a file that hangs whoever reads it")
def test_a_file_that_hangs_costs_that_file_only(tmp_path):
    folder = write_folder(tmp_path / "midi", range(4))
    os.mkfifo(folder / "piece001 hangs.mid")
    run(folder, tmp_path / "out", workers=2, file_timeout=1.5)
    assert rejected(tmp_path / "out") == [("piece001 hangs.mid", "timeout")]
    assert Corpus(tmp_path / "out").num_pieces == 4
