"""Real multi-instrument music from a package index: the demo corpus, read out of a wheel that is never installed.

    python -m meloformer.data.demo_corpus --output data/demo

The default is Freedoom's soundtrack, 75 General MIDI pieces with drums (BSD-3), which the wheel of vizdoom carries in
its two WAD files. `--corpus bach` writes the chorales that music21 carries, an instrument for each voice.
In: an index that pip knows, or `--wheel FILE`. Out: a folder of .mid files and NOTICE, which appears whole or not at
all; a folder that is already complete is left alone.

The surprise: vizdoom is never imported. A wheel is a zip, a WAD is a table of lumps, and a lump is a file; so a wheel
for any platform serves.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from meloformer.command_line import Parser
from meloformer.errors import UserError, exit_cleanly
from meloformer.files import sync_directory
from meloformer.midi import Score, Track, note_table, read_score, write_midi

VIZDOOM = "vizdoom==1.3.2"
WADS = ("vizdoom/freedoom1.wad", "vizdoom/freedoom2.wad")
# Tried after this interpreter's own platform, because the wheel is only read: any of them holds the same WADs.
OTHER_WHEEL = ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64")
NOTICE = "NOTICE"

# The first word of a part's name -> General MIDI program. The voices become a wind quartet; some chorales have
# instruments besides.
PART_PROGRAMS = {
    "soprano": 68,  # oboe
    "alto": 69,  # English horn
    "tenor": 71,  # clarinet
    "bass": 70,  # bassoon
    "horn": 60,
    "trumpet": 56,
    "cornet": 56,
    "timpani": 47,
    "violin": 40,
    "viola": 41,
    "oboe": 68,
    "recorder": 74,
    "continuo": 19,  # church organ
}
OTHER_PART = 48  # strings
VOICES = ("soprano", "alto", "tenor", "bass")
CHORALE_TICKS_PER_QUARTER = 480
CHORALE_QPM = 72.0
CHORALE_VELOCITY = 80

FREEDOOM_NOTICE = """\
The .mid files in this folder are the music of Freedoom (https://freedoom.github.io), taken unchanged from
freedoom1.wad and freedoom2.wad as the Python package {source} carries them.

Copyright (c) 2001-2024
Contributors to the Freedoom project.  All rights reserved.

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are
met:

  * Redistributions of source code must retain the above copyright
    notice, this list of conditions and the following disclaimer.
  * Redistributions in binary form must reproduce the above copyright
    notice, this list of conditions and the following disclaimer in the
    documentation and/or other materials provided with the distribution.
  * Neither the name of the Freedoom project nor the names of its
    contributors may be used to endorse or promote products derived from
    this software without specific prior written permission.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS
IS" AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED
TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A
PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT OWNER
OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL,
EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO,
PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR
PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF
LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING
NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF THIS
SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""

BACH_NOTICE = """\
Four-part chorales by Johann Sebastian Bach (public domain), converted from the encodings in the corpus of the Python
package music21 {version}, which gives the sources and terms of its encodings in its own licence files. The programs of
the voices, the tempo and the velocity were added here.
"""


# --- Freedoom -----------------------------------------------------------------------------------------------


def wad_lumps(data: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every lump of a WAD file, in its order. UserError where the table does not fit the file.

    A WAD is 4 bytes IWAD or PWAD, the number of lumps and where their table begins; a row of the table is a lump's
    place, its size and eight bytes of name. Integers are 32 bits, little-endian.
    """
    if len(data) < 12 or data[:4] not in (b"IWAD", b"PWAD"):
        raise UserError(f"{where}: not a WAD file (it must begin with IWAD or PWAD)")
    count, table = struct.unpack_from("<ii", data, 4)
    if count < 0 or not 12 <= table <= len(data) - 16 * count:
        raise UserError(f"{where}: damaged WAD: {count} lumps listed at byte {table} of {len(data)}")
    for row in range(count):
        start, size, name = struct.unpack_from("<ii8s", data, table + 16 * row)
        if start < 0 or size < 0 or start + size > len(data):
            raise UserError(f"{where}: damaged WAD: lump {row} lies outside the file")
        yield name.split(b"\0")[0].decode("ascii", "replace"), data[start : start + size]


def freedoom_pieces(wheel: Path) -> dict[str, bytes]:
    """{file name: MIDI file} of every distinct piece in the wheel's WADs: lumps D_* that begin with MThd."""
    pieces: dict[str, bytes] = {}
    seen = set()
    try:
        with zipfile.ZipFile(wheel) as archive:
            wads = [(name, archive.read(name)) for name in WADS if name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: cannot be read as a wheel ({error}); fetch it again") from None
    if not wads:
        raise UserError(f"{wheel}: holds neither {WADS[0]} nor {WADS[1]}; {VIZDOOM} is expected")
    for wad, data in wads:
        for lump, content in wad_lumps(data, f"{wheel}: {wad}"):
            digest = hashlib.sha256(content).digest()
            if not lump.startswith("D_") or content[:4] != b"MThd" or digest in seen:
                continue
            seen.add(digest)
            name = f"{lump.lower()}.mid"
            while name in pieces:  # two WADs may give one name to different music
                name = f"{name.removesuffix('.mid')}_2.mid"
            pieces[name] = content
    if not pieces:
        raise UserError(f"{wheel}: its WAD files hold no MIDI music; {VIZDOOM} is expected")
    return pieces


def download_wheel(requirement: str, folder: Path) -> Path:
    """Fetch a wheel with pip, without its dependencies and without installing it."""
    attempts = []
    for options in ((), OTHER_WHEEL):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        result = subprocess.run(
            [*command, "--dest", str(folder), *options, requirement], capture_output=True, text=True, check=False
        )
        wheels = sorted(folder.glob("*.whl"))
        if result.returncode == 0 and wheels:
            return wheels[0]
        attempts.append(next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "no message"))
    raise UserError(
        f"{requirement}: pip could not fetch its wheel ({attempts[-1].removeprefix('ERROR: ')}); check the network, or "
        "fetch it elsewhere with pip download --no-deps and pass it with --wheel"
    )


def write_freedoom(folder: Path, wheel: Path | None) -> int:
    """Fill `folder` with Freedoom's pieces and their notice; returns how many."""
    with tempfile.TemporaryDirectory() as downloads:
        if wheel is None:
            print(f"fetching the wheel of {VIZDOOM} (39 MB, read and thrown away) ...", flush=True)
            wheel = download_wheel(VIZDOOM, Path(downloads))
        elif not wheel.is_file():
            raise UserError(f"--wheel {wheel}: no such file; leave it out to fetch {VIZDOOM} with pip")
        pieces = freedoom_pieces(wheel)
    for name, content in tqdm(sorted(pieces.items()), desc="writing", unit="piece"):
        (folder / name).write_bytes(content)
        read_score(folder / name)  # a piece that does not open must not end up in a demo
    (folder / NOTICE).write_text(FREEDOOM_NOTICE.format(source=VIZDOOM), encoding="utf-8")
    return len(pieces)


# --- Bach ---------------------------------------------------------------------------------------------------


def write_bach(folder: Path, wheel: Path | None) -> int:
    """Fill `folder` with the chorales of an installed music21; returns how many."""
    if wheel is not None:
        raise UserError("--wheel: not used by --corpus bach, whose scores only an installed music21 can read")
    if importlib.util.find_spec("music21") is None:
        raise UserError("--corpus bach: music21 is not installed; pip install music21")
    import music21

    sources: dict[str, Path] = {}
    for source in sorted(map(Path, music21.corpus.getComposer("bach"))):
        if source.suffix != ".rntxt":  # an analysis, not a score
            sources.setdefault(source.stem, source)  # a few are there in two formats
    written, refused = 0, []
    for name, source in tqdm(sources.items(), desc="converting", unit="chorale"):
        try:
            score = chorale_score(music21.corpus.parse(source))
        except (music21.exceptions21.Music21Exception, ValueError, KeyError, IndexError, AttributeError) as error:
            refused.append(f"{source.name}: {error}")
            continue
        if score is not None:
            write_midi(score, folder / f"{name}.mid")
            written += 1
    for line in refused:
        print(f"left out {line}", file=sys.stderr)
    (folder / NOTICE).write_text(BACH_NOTICE.format(version=music21.VERSION_STR), encoding="utf-8")
    return written


def chorale_score(stream) -> Score | None:
    """A music21 score as our own: a track and a program for each part, ties joined, its meters, one tempo.

    None where one of the four voices is missing, for then it is no chorale.
    """
    resolution = CHORALE_TICKS_PER_QUARTER
    tracks, rows, meters, parts = [], [], {0: (4, 4)}, set()
    for part in stream.parts:
        name = " ".join((part.partName or "").split())
        word = name.lower().split(" ")[0] if name else ""
        word = word if word in PART_PROGRAMS else word.removesuffix("s")  # Recorders
        parts.add(word)
        index = len(tracks)
        tracks.append(Track(PART_PROGRAMS.get(word, OTHER_PART), name=name))
        flat = part.stripTies().flatten()
        for note in flat.notes:
            onset, duration = round(note.offset * resolution), round(note.duration.quarterLength * resolution)
            if duration:  # a grace note has none
                rows.extend((index, onset, duration, pitch.midi, CHORALE_VELOCITY) for pitch in note.pitches)
        for signature in flat.getElementsByClass("TimeSignature"):
            meters[round(signature.offset * resolution)] = (signature.numerator, signature.denominator)
    if not parts.issuperset(VOICES) or not rows:
        return None
    return Score(
        resolution,
        tracks,
        note_table(rows),
        [(tick, *meters[tick]) for tick in sorted(meters)],
        [(0, CHORALE_QPM)],
    )


# --- the command --------------------------------------------------------------------------------------------

CORPORA: dict[str, Callable[[Path, Path | None], int]] = {"freedoom": write_freedoom, "bach": write_bach}


def build(output: Path, corpus: str = "freedoom", wheel: Path | None = None) -> str:
    """Write a corpus to `output`, whole or not at all; returns what there is to say about it."""
    if (output / NOTICE).is_file():  # written last, into a folder that is renamed into place
        pieces = sum(1 for _ in output.glob("*.mid"))
        return f"{output}: complete already, {pieces} pieces; nothing to do"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not a demo corpus; name another folder or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror}); check the folder") from None
    try:
        pieces = CORPORA[corpus](aside, wheel)
        aside.chmod(0o755)  # mkdtemp makes folders that only their owner may enter
        if output.is_dir():
            output.rmdir()
        os.replace(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_directory(output.parent)
    return f"{output}: {pieces} pieces and their {NOTICE}"


def main() -> None:
    parser = Parser(prog="python -m meloformer.data.demo_corpus", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("data/demo"), help="folder to make (default: data/demo)")
    parser.add_argument("--corpus", choices=sorted(CORPORA), default="freedoom", help="which music (default: freedoom)")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {VIZDOOM}, fetched before (default: pip fetches it)")
    arguments = parser.parse_args()
    print(build(arguments.output, arguments.corpus, arguments.wheel))
    print(f"next: python preprocess_data.py --input {arguments.output} --output processed/")


if __name__ == "__main__":
    exit_cleanly(main)
