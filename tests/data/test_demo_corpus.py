"""The demo corpus out of a wheel: a WAD of a few lumps inside a zip, made here."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import mido
import pytest

from meloformer.data import demo_corpus
from meloformer.data.demo_corpus import VIZDOOM, build, chorale_score, download_wheel, freedoom_pieces, wad_lumps
from meloformer.errors import UserError
from meloformer.midi import read_score


def piece(pitch: int) -> bytes:
    """A MIDI file of one note."""
    track = mido.MidiTrack([mido.Message("note_on", note=pitch), mido.Message("note_off", note=pitch, time=96)])
    buffer = io.BytesIO()
    mido.MidiFile(tracks=[track]).save(file=buffer)
    return buffer.getvalue()


def wad(lumps: list[tuple[str, bytes]], kind: bytes = b"IWAD") -> bytes:
    """A WAD file: header, the lumps, their table."""
    body, rows = b"", b""
    for name, content in lumps:
        rows += struct.pack("<ii8s", 12 + len(body), len(content), name.encode())
        body += content
    return kind + struct.pack("<ii", len(lumps), 12 + len(body)) + body + rows


@pytest.fixture
def wheel(tmp_path) -> Path:
    """Two WADs that share a piece, use one name for two pieces, and hold what is no MIDI."""
    first = [("MAP01", b""), ("D_E1M1", piece(60)), ("D_INTRO", piece(61)), ("D_INTROA", piece(61))]
    second = [("D_RUNNIN", piece(60)), ("D_E1M1", piece(62)), ("D_OLD", b"MUS\x1aold music"), ("PLAYPAL", piece(63))]
    return save_wheel(tmp_path, {demo_corpus.WADS[0]: wad(first), demo_corpus.WADS[1]: wad(second, b"PWAD")})


def save_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "vizdoom-1.3.2-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_every_distinct_piece_once(wheel):
    assert freedoom_pieces(wheel) == {
        "d_e1m1.mid": piece(60),
        "d_intro.mid": piece(61),
        "d_e1m1_2.mid": piece(62),
    }


def test_a_folder_with_its_notice_and_nothing_beside_it(wheel, tmp_path):
    output = tmp_path / "new" / "demo"
    assert "3 pieces" in build(output, wheel=wheel)
    assert sorted(path.name for path in output.iterdir()) == ["NOTICE", "d_e1m1.mid", "d_e1m1_2.mid", "d_intro.mid"]
    assert [path.name for path in output.parent.iterdir()] == ["demo"]
    notice = (output / "NOTICE").read_text()
    assert "Contributors to the Freedoom project" in notice and VIZDOOM in notice and "WITHOUT" not in notice[:200]
    assert read_score(output / "d_e1m1_2.mid").notes["pitch"].tolist() == [62]


def test_a_second_run_does_nothing(wheel, tmp_path):
    output = tmp_path / "demo"
    build(output, wheel=wheel)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    wheel.unlink()
    assert "complete already, 3 pieces" in build(output, wheel=wheel)
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}


def test_an_interruption_leaves_nothing(wheel, tmp_path, monkeypatch):
    """A half-filled folder would be taken for a corpus of its own by the next command."""

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_corpus, "read_score", stop)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "new" / "demo", wheel=wheel)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_of_the_users_own_is_not_touched(wheel, tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "song.mid").write_bytes(piece(60))
    with pytest.raises(UserError, match="not a demo corpus"):
        build(output, wheel=wheel)
    assert [path.name for path in output.iterdir()] == ["song.mid"]
    (tmp_path / "empty").mkdir()
    assert "3 pieces" in build(tmp_path / "empty", wheel=wheel)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a WAD"),
        (b"ZWAD" + bytes(20), "not a WAD"),
        (wad([("D_A", piece(60))])[:-4], "damaged"),
        (b"IWAD" + struct.pack("<ii", -1, 12), "damaged"),
        (b"IWAD" + struct.pack("<ii", 1, 12) + struct.pack("<ii8s", 0, 9999, b"D_A"), "lump 0"),
    ],
)
def test_a_damaged_wad(data, reason):
    with pytest.raises(UserError, match=reason):
        list(wad_lumps(data, "some.wad"))


def test_a_wheel_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        build(tmp_path / "demo", wheel=tmp_path / "none.whl")
    (tmp_path / "bad.whl").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="cannot be read as a wheel"):
        build(tmp_path / "demo", wheel=tmp_path / "bad.whl")
    with pytest.raises(UserError, match="holds neither"):
        build(tmp_path / "demo", wheel=save_wheel(tmp_path, {"other/file": b""}))
    with pytest.raises(UserError, match="hold no MIDI music"):
        build(tmp_path / "demo", wheel=save_wheel(tmp_path, {demo_corpus.WADS[0]: wad([])}))
    assert not (tmp_path / "demo").exists()


def test_another_platform_is_asked_for_where_this_one_has_no_wheel(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        if "--platform" not in command:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")
        (tmp_path / "vizdoom.whl").write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_corpus.subprocess, "run", run)
    assert download_wheel(VIZDOOM, tmp_path).name == "vizdoom.whl"
    assert len(commands) == 2 and all(command[:4] == [sys.executable, "-m", "pip", "download"] for command in commands)
    assert all("--no-deps" in command for command in commands)


def test_no_network_is_one_line(tmp_path, monkeypatch):
    failure = subprocess.CompletedProcess(
        [], 1, "", "WARNING: Retrying\nERROR: No matching distribution found for it\n"
    )
    monkeypatch.setattr(demo_corpus.subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(UserError, match=r"No matching distribution.*--wheel") as caught:
        build(tmp_path / "new" / "demo")
    assert "\n" not in str(caught.value) and list((tmp_path / "new").iterdir()) == []


def test_the_command_line(wheel, tmp_path):
    command = [sys.executable, "-m", "meloformer.data.demo_corpus", "--output", str(tmp_path / "demo")]
    done = subprocess.run([*command, "--wheel", str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("next: python preprocess_data.py --input")
    failed = subprocess.run(
        [*command[:-1], str(tmp_path / "other"), "--wheel", "none.whl"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: --wheel none.whl") and len(failed.stderr.splitlines()) == 1


def test_bach_without_music21_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "music21", None)
    monkeypatch.setattr(demo_corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install music21"):
        build(tmp_path / "bach", "bach")
    with pytest.raises(UserError, match="--wheel"):
        build(tmp_path / "bach", "bach", tmp_path / "some.whl")
    assert list(tmp_path.iterdir()) == []


class Part:
    """As much of a music21 part as a chorale needs."""

    def __init__(self, name: str, pitches: list[int], meter: tuple[int, int]):
        length = SimpleNamespace(quarterLength=0.5)
        self.partName = name
        self.notes = [
            SimpleNamespace(offset=i * 0.5, duration=length, pitches=[SimpleNamespace(midi=pitch)])
            for i, pitch in enumerate(pitches)
        ]
        self.signature = SimpleNamespace(offset=0.0, numerator=meter[0], denominator=meter[1])

    def stripTies(self):
        return self

    flatten = stripTies

    def getElementsByClass(self, name):
        return [self.signature]


def test_each_voice_has_its_instrument():
    """In the corpus every part is program 0, so that the four voices cannot be told apart."""
    names = ["Horn 2", "Soprano\rOboe 1,2", "Alto", "Tenor", "Bass", "Recorders", "Lute"]
    score = chorale_score(SimpleNamespace(parts=[Part(name, [60, 62], (3, 4)) for name in names]))
    assert score.instruments.tolist() == [60, 68, 69, 71, 70, 74, demo_corpus.OTHER_PART]
    assert score.meters.tolist() == [(0, 3, 4)] and score.notes["onset"][:2].tolist() == [0, 240]
    assert score.notes["duration"].tolist() == [240] * 14
    assert chorale_score(SimpleNamespace(parts=[Part("Piano", [60], (4, 4))])) is None
