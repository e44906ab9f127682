"""What one sees of a file, of a corpus and of a piece is what is there."""

import subprocess
import sys

import mido
import pytest

from meloformer.data import Corpus, DataError
from meloformer.data.inspect import IN_WORDS, describe_corpus, describe_file, describe_piece
from meloformer.data.shards import shard_name
from meloformer.files import checksum
from meloformer.hid import Tokenizer
from meloformer.midi import Score, Track, note_table, read_score, write_midi
from tests.conftest import ROOT
from tests.data.music import make_corpus, make_score


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("inspect"), seeds=range(6), shard_size=4)


def words(text: str, start: str) -> list[str]:
    """The one line that begins so, its words."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(start))
    return line.split()


def test_a_file_shows_its_tracks_and_what_the_grid_would_lose(tmp_path):
    notes = [
        (0, 0, 480, 60, 80),
        (0, 480, 480, 62, 80),
        (0, 4800, 40000, 64, 80),
        (1, 7, 333, 36, 80),
        (1, 100, 99, 36, 80),
    ]
    write_midi(Score(480, [Track(40, name="Fiddle\x07"), Track(0, True)], note_table(notes)), tmp_path / "a.mid")
    text = describe_file(tmp_path / "a.mid", 24)
    assert words(text, str(tmp_path))[1:7] == ["5", "notes,", "3", "bars,", "34", "tokens,"]
    assert words(text, "1      Fiddle?") == ["1", "Fiddle?", "40", "Violin", "2", "3", "60-64", "melody", "1", "1"]
    assert words(text, "2    ") == ["2", "drums", "1", "2", "36-36", "drums", "1"]
    assert words(text, "1  durations cut")[0] == "1"
    assert words(text, "key")[-4:] == ["density", "1", "of", "10"]
    assert words(text, "chords")[:5] == ["chords,", "by", "bar", "|", "1:"]


def test_a_file_shows_what_no_reader_reports(tmp_path):
    """A note that is never ended is dropped, and nothing said so."""
    track = mido.MidiTrack([mido.Message("note_on", note=60), mido.Message("note_off", note=60, time=96)])
    track += [mido.Message("note_on", note=61), mido.Message("program_change", program=40), *track]
    mido.MidiFile(tracks=[track], ticks_per_beat=96).save(tmp_path / "a.mid")
    text = describe_file(tmp_path / "a.mid", 24)
    assert words(text, "1  tracks begun by a program change")[0] == "1"
    assert text.endswith("1  notes that are never ended, dropped")


def test_a_corpus_in_numbers(corpus):
    text = describe_corpus(corpus, max_seq_len=int(sorted(corpus.index["num_tokens"])[2]), max_bars=12)
    assert words(text, str(corpus.path))[1:8] == ["6", "pieces", "in", "6", "clusters", "from", "6"]
    assert words(text, "--max-seq-len")[2] == "50.0%" and words(text, "--max-bars")[2] == "100.0%"
    assert words(text, "Acoustic Grand Piano")[3:5] == ["0", "12"]
    assert words(text, "tracks")[1:] == ["5"] * 8
    assert "2 shards" in text and "checksums right" in text
    assert words(text, "conditions")[1:] == ["derived;", "tags:", "none"]


def test_a_piece_as_the_model_sees_it(corpus, tmp_path):
    text, score = describe_piece(corpus, 5)
    assert text.startswith(f"piece 5, piece005.mid: {score.num_notes:,} notes, 12 bars")
    assert score == Tokenizer().decode(corpus.piece(5))
    command = [sys.executable, "-m", "meloformer.data.inspect", str(corpus.path), "--piece", "5"]
    done = subprocess.run([*command, "--midi", str(tmp_path / "p.mid")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == text, done.stderr
    assert Tokenizer().encode(read_score(tmp_path / "p.mid"), "given").tolist() == corpus.piece(5).tolist()


def test_a_damaged_shard_is_named_with_its_checksum(tmp_path):
    corpus = make_corpus(tmp_path, seeds=range(3), shard_size=2)
    path = corpus.path / shard_name(1)
    expected = checksum(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"shard-00001.*sha256 is {checksum(path)}, meta.json says {expected}"):
        describe_corpus(Corpus(corpus.path), 100, 100)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--piece", "6"], "--piece 6: .* has pieces 0 to 5"),
        (["--midi", "a.mid"], "--midi without --piece: means nothing for a corpus"),
        (["--resolution", "12"], "--resolution: means nothing for a corpus"),
        (["--piece", "x"], "argument --piece: invalid int value"),
    ],
)
def test_refusals_are_one_line(corpus, flags, message, monkeypatch):
    from meloformer.data import inspect

    monkeypatch.setattr(sys, "argv", ["inspect", str(corpus.path), *flags])
    with pytest.raises(ValueError, match=message):
        inspect.main()


def test_a_flag_of_nought_is_not_one_that_is_left_out(tmp_path, monkeypatch, capsys):
    """--resolution 0 showed the file on the usual grid; and flags that preprocessing spells with an underscore were
    unknown here."""
    from meloformer.data import inspect

    write_midi(make_score(1), tmp_path / "b.mid")
    monkeypatch.setattr(sys, "argv", ["inspect", str(tmp_path / "b.mid"), "--resolution", "0"])
    with pytest.raises(ValueError, match="resolution is 0"):
        inspect.main()
    for flag in ("--sustain_pedal=extend", "--sustain-pedal=extend"):
        monkeypatch.setattr(sys, "argv", ["inspect", str(tmp_path / "b.mid"), flag])
        inspect.main()
        assert "Flute" in capsys.readouterr().out


def test_every_rule_that_counts_something_has_words(real_midi):
    seen = set()
    for path in sorted(real_midi.rglob("*.mid"))[::25]:
        try:
            _, counts = Tokenizer().encode_counted(read_score(path))
        except ValueError:
            continue
        seen |= set(counts)
    assert len(seen) > 8 and not seen - set(IN_WORDS)


def test_a_raw_score_of_the_tests_is_described_too(tmp_path):
    write_midi(make_score(1), tmp_path / "b.mid")
    assert "Flute" in describe_file(tmp_path / "b.mid", 12, "extend")
