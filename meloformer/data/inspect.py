"""Look into a MIDI file, a corpus, or one piece of a corpus: python -m meloformer.data.inspect song.mid

A file: its tracks with number, name, program, bars, notes and conditions, its key and chords, and what the token grid
would change or lose, and what else is in it that is not read. A corpus:
every shard's checksum, totals, what was left out and why, the instruments, quantiles of the pieces' sizes, and the
share of the pieces that `--max-seq-len` and `--max-bars` would leave whole. `--piece N` is one piece as the model sees
it, with `--midi` and `--plot` to write it down.

>>> print(describe_file("song.mid", 24))                                 # doctest: +SKIP
>>> print(describe_corpus(Corpus("processed"), 24576, 2048))             # doctest: +SKIP

The surprise: the tracks are those of the tokens, so one track of a file that changes its program is several here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from meloformer.command_line import Parser
from meloformer.config import DataConfig
from meloformer.data.corpus import Corpus
from meloformer.errors import UserError, exit_cleanly
from meloformer.hid import Family, Tokenizer, Vocabulary
from meloformer.hid.conditions import CONDITIONS, chord_name, derive, key_name
from meloformer.hid.controls import BAR, ONSET, TOKEN, TRACK
from meloformer.hid.vocabulary import DEFAULT_RESOLUTION, ROLES
from meloformer.midi import Score, read_score, write_midi
from meloformer.midi.general_midi import instrument_name
from meloformer.midi.score import DRUMS
from meloformer.midi.unheard import count_unheard
from meloformer.wording import counted

MOST_CHORDS = 24  # that are shown of a piece
QUANTILES = (0, 25, 50, 75, 90, 95, 99, 100)
SIZES = ("tokens", "bars", "tracks", "notes")
# What a rule of midi.read or hid.quantize did, in words; one that is not here shows its bare name.
IN_WORDS = {
    "onsets_moved": "notes moved by more than 1/48 of a quarter note",
    "duplicate_notes": "notes struck twice at once, of which one is kept",
    "overlaps": "notes that end where their pitch is struck again",
    "durations_rounded": "durations rounded to one that has a token",
    "durations_cut": "durations cut to eight whole notes",
    "stray_notes": "stray notes beyond a long gap, dropped",
    "sustained": "notes held by the pedal",
    "meter_quarter_throughout": "1/4 throughout, taken for 4/4",
    "meters_rewritten": "meters written over another denominator",
    "meters_split": "meters split into equal bars",
    "meters_replaced": "meters replaced by 4/4",
    "meters_dropped": "meters that last for no bar, dropped",
    "bars_cut": "bars cut short by a meter change inside them",
    "tempos_merged": "tempo events merged into one a bar or left out as too small",
    "tempos_clipped": "tempos outside 20 to 320",
    "tracks_split": "tracks begun by a program change inside another",
    "drum_kits": "drum tracks with a kit of their own, played on the standard one",
    "empty_tracks": "tracks without notes, left out",
    "no_meter": "no meter stated, taken for 4/4",
    "pitch_bends": "pitch bends, not represented",
    "control_changes": "controller events, not represented",
    "pedal_lost": "file whose pedal cannot be told apart by channel, so its notes are not held",
    "pedals": "presses of the sustain pedal",
    "zero_duration": "notes without a duration, given one tick",
}
UNHEARD_IN_WORDS = {
    "unended_notes": "notes that are never ended, dropped",
    "lone_note_offs": "ends of notes that do not sound",
    "aftertouch": "aftertouch events",
    "lyrics": "lyrics",
    "key_signatures": "key signatures",
    "system_exclusive": "system-exclusive events",
}


def describe_file(path: str | Path, resolution: int, sustain_pedal: str = "ignore") -> str:
    score = read_score(path, sustain_pedal)
    vocabulary = Vocabulary(resolution)
    encoding = Tokenizer(vocabulary).encode_fully(score, order="given")
    grid = encoding.score
    rows = derive(grid).rows(vocabulary)
    facts = f"{grid.num_notes:,} notes, {grid.num_bars:,} bars, {len(encoding.tokens):,} tokens"
    lines = [
        f"{path}: {facts}, {_clock(float(score.seconds_at(score.end_tick)))}",
        _tracks(grid, encoding.segment_track, rows, vocabulary),
        *_conditions(rows, vocabulary),
    ]
    lines += _changes(grid.counts, f"on a grid of {resolution} ticks a quarter note")
    return "\n".join(
        lines + _changes(count_unheard(path), "also not represented, in no corpus counted", UNHEARD_IN_WORDS)
    )


def describe_piece(corpus: Corpus, piece: int) -> tuple[str, Score]:
    """What the model sees of a piece, in words and as a score; UserError if the corpus has fewer."""
    if not 0 <= piece < corpus.num_pieces:
        raise UserError(f"--piece {piece}: {corpus.path} has pieces 0 to {corpus.num_pieces - 1}")
    score = Tokenizer(corpus.vocabulary).decode(corpus.piece(piece))
    row = {name: column[piece].item() for name, column in corpus.index.items()}
    facts = f"{row['num_notes']:,} notes, {row['num_bars']:,} bars, {row['num_tokens']:,} tokens"
    lines = [f"piece {piece}, {corpus.name(piece)}: {facts}, cluster {row['cluster']:016x}"]
    same = np.flatnonzero(corpus.index["cluster"] == corpus.index["cluster"][piece])
    others = [corpus.name(int(i)) for i in same if i != piece]
    if others:
        lines.append(f"shares its cluster with {', '.join(others[:5])}{' and others' if len(others) > 5 else ''}")
    rows = corpus.conditions(piece)
    lines.append(_tracks(score, np.asarray(corpus.segments(piece).track), rows, corpus.vocabulary))
    lines += _conditions(rows, corpus.vocabulary, corpus.tags)
    return "\n".join(lines + _changes(corpus.changes(piece), "when it was encoded")), score


def describe_corpus(corpus: Corpus, max_seq_len: int, max_bars: int) -> str:
    """UserError naming the shard, what its checksum is and what it should be, if one is damaged."""
    corpus.verify()
    meta, index = corpus.meta, corpus.index
    totals = meta["totals"]
    size = sum(shard["bytes"] for shard in meta["shards"])
    lines = [
        f"{corpus.path}: {counted(totals['pieces'], 'piece')} in {counted(totals['clusters'], 'cluster')} from "
        f"{counted(totals['files'], 'file')}",
        f"{totals['notes']:,} notes, {totals['tokens']:,} tokens, {totals['bars']:,} bars, {totals['hours']:,} hours",
        f"{counted(len(meta['shards']), 'shard')}, {size:,} bytes, {size / max(totals['tokens'], 1):.2f} a token, "
        "checksums right",
    ]
    lines.append(
        f"conditions: {'derived' if corpus.has_conditions else 'none'}; tags: {', '.join(corpus.tags) or 'none'}"
    )
    lines += _changes(meta["rejected"], "files left out", {})
    if corpus.num_pieces:
        rows = [
            (name, *(f"{value:,.0f}" for value in np.percentile(index[f"num_{name}"], QUANTILES))) for name in SIZES
        ]
        lines += ["", table(("a piece has", "least", *(f"{q} %" for q in QUANTILES[1:-1]), "most"), rows), ""]
        for flag, name, limit in (("max-seq-len", "tokens", max_seq_len), ("max-bars", "bars", max_bars)):
            share = float((index[f"num_{name}"] <= limit).mean())
            lines.append(f"--{flag} {limit}: {share:.1%} of the pieces fit")
        tracks = max(sum(meta["instruments"].values()), 1)
        most = sorted(meta["instruments"].items(), key=lambda item: -item[1])
        rows = [(instrument_name(DRUMS if i == "drums" else int(i)), i, f"{n:,}", f"{n / tracks:.1%}") for i, n in most]
        lines += ["", table(("instrument", "program", "tracks", "share"), rows)]
    return "\n".join(lines + _changes(meta["changed"], "when the pieces were encoded"))


def _tracks(score: Score, segment_track: np.ndarray, conditions: np.ndarray, vocabulary: Vocabulary) -> str:
    """One line a track: number (from 1, as generate.py counts), name, program, bars that have notes, notes, lowest and
    highest pitch, conditions."""
    num_tracks = len(score.tracks)
    bars, notes = (
        np.bincount(segment_track, minlength=num_tracks),
        np.bincount(score.notes["track"], minlength=num_tracks),
    )
    rows = []
    for i, track in enumerate(score.tracks):
        program = "drums" if track.instrument == DRUMS else f"{track.program} {instrument_name(track.program)}"
        pitches = score.notes["pitch"][score.notes["track"] == i]
        name = "".join(letter if letter.isprintable() else "?" for letter in track.name)
        said = _said(conditions[conditions[:, TRACK] == i], vocabulary)
        what = (said.get(name, "") for name in ("role", "density", "polyphony"))
        rows.append(
            (str(i + 1), name[:40], program, f"{bars[i]:,}", f"{notes[i]:,}", f"{pitches.min()}-{pitches.max()}", *what)
        )
    return table(("track", "name", "program", "bars", "notes", "pitches", "role", "density", "polyphony"), rows)


def _said(rows: np.ndarray, vocabulary: Vocabulary) -> dict[str, str]:
    """Conditions by name in words; what stands for a bar of many is left out."""
    families = {family: name for name, family in CONDITIONS.items()}
    found = {}
    for token in rows[rows[:, BAR] < 0, TOKEN].tolist():
        name, value = families[Family(vocabulary.family_of[token])], int(vocabulary.value_of[token])
        words = {"key": key_name, "role": ROLES.__getitem__, "tag": str}
        found[name] = words[name](value) if name in words else str(value + 1)
    return found


def _conditions(rows: np.ndarray, vocabulary: Vocabulary, tags: Sequence[str] = ()) -> list[str]:
    """Key, density and tag of a piece, and its first chords, a bar line where they change in a later bar."""
    if not len(rows):
        return []
    said = _said(rows[rows[:, TRACK] < 0], vocabulary)
    facts = [f"key {said['key']}"] if "key" in said else []
    facts += [f"density {said['density']} of 10"] if "density" in said else []
    facts += [f"tag {tags[int(said['tag'])]}"] if "tag" in said else []
    chords = rows[rows[:, ONSET] >= 0]
    shown, bar = [], -1
    for row in chords[:MOST_CHORDS].tolist():
        shown += [f"| {row[BAR] + 1}:"] if row[BAR] != bar else []
        shown.append(chord_name(int(vocabulary.value_of[row[TOKEN]])))
        bar = row[BAR]
    more = f" and {len(chords) - MOST_CHORDS:,} more" if len(chords) > MOST_CHORDS else ""
    return ["", *([", ".join(facts)] if facts else []), f"chords, by bar {' '.join(shown)}{more}"]


def _changes(counts: Mapping[str, int], when: str, words: Mapping[str, str] = IN_WORDS) -> list[str]:
    lines = [f"{count:>10,}  {words.get(rule, rule)}" for rule, count in sorted(counts.items()) if count]
    return ["", f"{when}:", *lines] if lines else []


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Columns of text; numbers to the right.

    >>> print(table(("a", "n"), [("x", "10"), ("yy", "9")]))
    a    n
    x   10
    yy   9
    """
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    right = [all(row[i][:1].isdigit() for row in rows[1:]) and i > 0 for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)).rstrip()
        for row in rows
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} minutes"


def main() -> None:
    defaults = DataConfig(data_dir="")
    parser = Parser(prog="python -m meloformer.data.inspect", description=__doc__.split(":")[0])
    parser.add_argument("path", metavar="FILE|DIR", help="a MIDI file, or a folder that preprocess_data.py wrote")
    parser.add_argument(
        "--resolution", type=int, help=f"a file on another grid than {DEFAULT_RESOLUTION} ticks a quarter note"
    )
    parser.add_argument("--sustain-pedal", choices=("ignore", "extend"), help="a file with notes held by the pedal")
    parser.add_argument("--max-seq-len", type=int, help=f"tokens in a row (default {defaults.max_seq_len})")
    parser.add_argument("--max-bars", type=int, help=f"bars in a piece (default {defaults.max_bars})")
    parser.add_argument("--piece", type=int, help="one piece of the corpus, from 0")
    parser.add_argument("--midi", metavar="OUT.mid", help="write the piece, or the file on its grid")
    parser.add_argument("--plot", metavar="OUT.png", help="draw it as a piano roll")
    given = parser.parse_args()
    path = Path(given.path)
    if path.is_dir():
        unused = {"--resolution": given.resolution, "--sustain-pedal": given.sustain_pedal}
        if given.piece is None:
            unused |= {"--midi without --piece": given.midi, "--plot without --piece": given.plot}
    else:
        unused = {"--piece": given.piece, "--max-seq-len": given.max_seq_len, "--max-bars": given.max_bars}
    for flag, value in unused.items():
        if value is not None:
            raise UserError(f"{flag}: means nothing for a {'corpus' if path.is_dir() else 'file'}; leave it out")
    if not path.is_dir():
        resolution = DEFAULT_RESOLUTION if given.resolution is None else given.resolution
        pedal = given.sustain_pedal or "ignore"
        text = describe_file(path, resolution, pedal)
        score = Tokenizer(Vocabulary(resolution)).quantize(read_score(path, pedal))
    elif given.piece is not None:
        text, score = describe_piece(Corpus(path), given.piece)
    else:
        max_seq_len = defaults.max_seq_len if given.max_seq_len is None else given.max_seq_len
        max_bars = defaults.max_bars if given.max_bars is None else given.max_bars
        text, score = describe_corpus(Corpus(path), max_seq_len, max_bars), None
    print(text)
    _write(score, given.midi, given.plot, path.name)


def _write(score: Score | None, midi: str | None, plot: str | None, title: str) -> None:
    try:
        if midi is not None:
            write_midi(score, midi)
        if plot is not None:
            # A command at the edge of this room: the only import of a room above it, and only on request.
            from meloformer.evaluation.plots import piano_roll

            piano_roll(score, plot, title)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    exit_cleanly(main)
