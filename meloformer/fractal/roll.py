"""MIDI <-> piano roll: one row a pitch, one column a sixteenth note, a cell is the velocity that sounds there.

In: a `Score` or a MIDI file. Out: (128, T) uint8, 0 where nothing sounds, 1..127 while a note does; and back.

    python -m meloformer.fractal.roll FILE_OR_FOLDER...     # what each file loses on the way into a roll

- Pitched tracks are merged, drums skipped. A note begins in the column that holds its onset and lasts its duration,
  rounded to whole columns, at least one. Of notes in one cell the loudest sounds.
- A maximal run of one velocity in a row is one note: so a change of velocity splits, and where a pitch is struck again
  at the velocity that already sounds, the column before is silenced, unless a note begins in that column too.
- Of two notes that begin in one cell one is lost, and so is one struck a column after another of its pitch and
  velocity: `RollLoss` counts them. A few stray notes beyond a gap of 64 bars are dropped.

>>> roll, loss = score_to_roll(Score(480, [Track(0)], note_table([(0, 0, 960, 60, 90), (0, 480, 480, 60, 90)])))
>>> roll[60].tolist(), loss.lost
([90, 90, 90, 0, 90, 90, 90, 90], 0)
>>> roll_to_score(roll).notes["duration"].tolist()
[360, 480]

The surprise: much of a real file is lost in a roll, nothing of a roll is lost in a file: `score_to_roll` undoes
`roll_to_score` on every roll, up to the last column that sounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from meloformer.command_line import Parser
from meloformer.errors import UserError, exit_cleanly
from meloformer.midi import MidiError, Score, Track, note_table, read_score, write_midi
from meloformer.midi.score import DEFAULT_METER, DEFAULT_QPM
from meloformer.wording import counted

NUM_PITCHES = 128
COLUMNS_PER_QUARTER = 4
COLUMNS_PER_BAR = 16  # of 4/4
TICKS_PER_QUARTER = 480  # of a score made from nothing
MAX_COLUMNS = 1 << 18  # 16,384 bars of 4/4, 32 MB: what is longer is no piece of music
STRAY_GAP = 64 * COLUMNS_PER_BAR
STRAY_SHARE = 0.01
FEW_TICKS = 96  # a quarter of fewer ticks is scaled up, so that a column is at least 24 ticks, or a whole number


class RollLoss(NamedTuple):
    """What became of a file's notes. `notes` of pitched tracks = kept + collided + merged + stray."""

    notes: int
    collided: int  # begin in one cell with another note: no rule for a grid of sixteenths could keep them
    merged: int  # struck again a column later, or heard only after a louder note: not a beginning in the roll
    stray: int
    drums: int  # not counted in `notes`
    runs: int  # notes that the roll holds: a note that goes on after a louder one has become two

    @property
    def lost(self) -> int:
        return self.collided + self.merged + self.stray

    @property
    def share(self) -> float:
        return self.lost / max(self.notes, 1)


def score_to_roll(score: Score) -> tuple[np.ndarray, RollLoss]:
    """The roll of a score, (128, T) uint8, T up to the end of its last note; MidiError beyond MAX_COLUMNS."""
    is_drum = np.array([track.is_drum for track in score.tracks], dtype=bool)
    notes = score.notes[~is_drum[score.notes["track"]]] if score.num_notes else score.notes
    num_notes, drums = len(notes), score.num_notes - len(notes)
    resolution = score.ticks_per_quarter
    start = notes["onset"] * COLUMNS_PER_QUARTER // resolution
    length = (2 * COLUMNS_PER_QUARTER * notes["duration"] + resolution) // (2 * resolution)  # halves round up
    end = start + np.maximum(length, 1)
    kept = _not_stray(start)
    pitch, velocity = notes["pitch"][kept].astype(np.int64), notes["velocity"][kept]
    start, end = start[kept], end[kept]
    width = int(end.max(initial=0))
    if width > MAX_COLUMNS:
        raise MidiError(f"a piece of {width:,} sixteenth notes, at most {MAX_COLUMNS:,} are read")

    roll = np.zeros((NUM_PITCHES, width), dtype=np.uint8)
    for row, first, last, loudness in sorted(zip(pitch, start, end, velocity), key=lambda note: note[3]):
        roll[row, first:last] = loudness  # quiet to loud: what is written last sounds
    struck = np.zeros((NUM_PITCHES, width), dtype=bool)
    struck[pitch, start] = True
    again = struck[:, 1:] & ~struck[:, :-1] & (roll[:, 1:] == roll[:, :-1])
    roll[:, :-1][again] = 0
    begins = onsets(roll)
    distinct = int(struck.sum())
    loss = RollLoss(
        notes=num_notes,
        collided=len(start) - distinct,
        merged=distinct - int((struck & begins).sum()),
        stray=num_notes - len(start),
        drums=drums,
        runs=int(begins.sum()),
    )
    return roll, loss


def onsets(roll: np.ndarray) -> np.ndarray:
    """(128, T) bool: where a note begins, the first cell of each run of one velocity."""
    before = np.zeros_like(roll)
    before[:, 1:] = roll[:, :-1]
    return (roll > 0) & (roll != before)


def notes_of(roll: np.ndarray) -> np.ndarray:
    """(notes, 4) int64: pitch, first column, columns, velocity of every run, by pitch, then column."""
    pitch, first = np.nonzero(onsets(roll))
    padded = np.pad(roll, ((0, 0), (0, 1)))
    ends = np.nonzero((padded[:, :-1] > 0) & (padded[:, :-1] != padded[:, 1:]))[1] + 1  # a run begins, a run ends
    return np.stack([pitch, first, ends - first, roll[pitch, first]], axis=1).astype(np.int64)


def roll_to_score(roll: np.ndarray, tempo: float | None = None, like: Score | None = None) -> Score:
    """The score of a roll: one track, 4/4, 120 quarters a minute or `tempo`.

    With `like`, its resolution, and its meters and tempos up to the roll's end, unless a tempo is given.
    """
    resolution, meters, tempos = TICKS_PER_QUARTER, [(0, *DEFAULT_METER)], [(0, tempo or DEFAULT_QPM)]
    if like is not None:
        scale = 1 if like.ticks_per_quarter >= FEW_TICKS else COLUMNS_PER_QUARTER
        resolution = scale * like.ticks_per_quarter
        end = -(-roll.shape[1] * like.ticks_per_quarter // COLUMNS_PER_QUARTER)
        meters, kept = (table[(table["tick"] < end) | (table["tick"] == 0)] for table in (like.meters, like.tempos))
        meters["tick"] *= scale
        kept["tick"] *= scale
        tempos = kept if tempo is None else tempos
    pitch, first, length, velocity = notes_of(roll).T
    begin, end = (-(-column * resolution // COLUMNS_PER_QUARTER) for column in (first, first + length))
    rows = zip(np.zeros_like(pitch), begin, end - begin, pitch, velocity)
    return Score(resolution, [Track(0, name="piano roll")], note_table(rows), meters, tempos)


def read_roll(path: str | Path) -> tuple[np.ndarray, RollLoss, Score]:
    """Roll, loss and score of a MIDI file; MidiError, one line, where it holds no music that a roll can show."""
    score = read_score(path)
    try:
        roll, loss = score_to_roll(score)
    except MidiError as error:
        raise MidiError(f"{path}: {error}") from None
    return roll, loss, score


def write_roll(roll: np.ndarray, path: str | Path, tempo: float | None = None, like: Score | None = None) -> None:
    """Write the score of a roll as a MIDI file, whole or absent."""
    write_midi(roll_to_score(roll, tempo, like), path)


def _not_stray(start: np.ndarray) -> np.ndarray:
    """(notes,) bool: False for notes beyond a long gap where they are at most a hundredth of the piece."""
    ordered = np.sort(start)
    after_gap = np.flatnonzero(np.diff(ordered) > STRAY_GAP) + 1
    few = after_gap[len(ordered) - after_gap <= STRAY_SHARE * len(ordered)]
    return start < ordered[few[0]] if len(few) else np.ones(len(start), dtype=bool)


# --- the command --------------------------------------------------------------------------------------------


def midi_paths(arguments: list[str]) -> list[Path]:
    """Files as given, folders as the MIDI files in them; UserError where there are none."""
    paths: list[Path] = []
    for path in map(Path, arguments):
        if path.is_dir():
            paths += sorted(file for file in path.rglob("*") if file.suffix.lower() in (".mid", ".midi"))
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not paths:
        raise UserError(f"{', '.join(map(str, arguments))}: no .mid or .midi file there")
    return paths


def main() -> None:
    parser = Parser(
        prog="python -m meloformer.fractal.roll", description="What MIDI files lose on the way into a piano roll."
    )
    parser.add_argument("paths", nargs="+", metavar="FILE_OR_FOLDER")
    arguments = parser.parse_args()
    total, lost, fewer, refused = np.zeros(6, dtype=np.int64), [], [], 0
    print("    notes    lost  share  collided  merged  stray    drums  in roll")
    for path in midi_paths(arguments.paths):
        try:
            _, loss, _ = read_roll(path)
        except MidiError as error:
            print(f"refused: {error}")
            refused += 1
            continue
        print(_line(loss, str(path)))
        total += loss
        if loss.notes:
            lost.append(loss.share)
            fewer.append(1 - loss.runs / loss.notes)
    print(
        _line(RollLoss(*total.tolist()), f"in all; {counted(len(lost), 'file')} with pitched notes, {refused} refused")
    )
    if lost:
        print(
            f"mean over files: {np.mean(lost):.1%} of the notes begin nowhere in the roll (median "
            f"{np.median(lost):.1%}); the roll holds {np.mean(fewer):.1%} fewer notes"
        )


def _line(loss: RollLoss, what: str) -> str:
    return (
        f"{loss.notes:9,} {loss.lost:7,} {loss.share:6.1%} {loss.collided:9,} {loss.merged:7,} {loss.stray:6,} "
        f"{loss.drums:8,} {loss.runs:8,}  {what}"
    )


if __name__ == "__main__":
    exit_cleanly(main)
