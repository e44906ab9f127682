"""MIDI file -> raw `Score`, through symusic, or through miditoolkit's parser where symusic refuses or is not installed.

>>> score = read_score("song.mid")   # doctest: +SKIP
>>> score.num_notes, score.counts    # doctest: +SKIP
(2310, Counter({'control_changes': 412, 'zero_duration': 3}))

What the file says becomes tables, and nothing is moved: times are the file's own ticks, overlaps of one pitch, odd
meters and stray notes are all still there (`hid.quantize` deals with them). The rules, the same for both readers:

- One `Track` for each (track of the file, channel, program) that has notes, in that order. A program change inside
  a track so starts another track: `tracks_split`. A note has the program that was in force, in its own track, when it
  began (and before any, the one that another track states for the channel). Drums are channel 10; their program is
  the number of a kit, which no instrument stands for: `drum_kits`, the drum tracks with another than the standard one.
- A note-off ends the oldest sounding note of its pitch, channel and track. A note that is never ended is dropped,
  and so is a note-off without a note; symusic does not report them, so `midi.unheard` counts them, and only for a file
  that one asks about: it takes as long as all the rest.
- A note that ends on the tick where it begins (common in drum tracks) lasts one tick: `zero_duration`.
- Meters and tempos start at tick 0, 4/4 and 120 quarters a minute unless the file says so. Of several on one tick
  the last of the file wins: `same_tick_meters`, `same_tick_tempos`, counted where they differ. A meter without beats
  or whose lower number is no power of two up to 128, and a tempo of zero, are dropped: `invalid_meters`,
  `invalid_tempos`. A file that states no meter counts `no_meter`.
- Data bytes above 127 are read as 127: `repaired`. Chunks that are no tracks are skipped: `skipped_chunks`. A file
  with both is too far gone to be music. Tracks beyond the number that the file states are not read:
  `leftover_tracks`.
- What a Score does not hold is counted, as far as the library reports it: `pitch_bends`, `control_changes`,
  `pedals` (presses of the sustain pedal); aftertouch, lyrics, keys and system-exclusive events in `midi.unheard`.

What cannot be read is a `MidiError`: SMPTE time, division 0, type 2 (independent patterns, not one piece), files cut
short, and files that are no MIDI.

The surprise: the libraries do not see the file but a tidied copy (`midi.chunks`), in which a program that one track
states for a channel holds for the other tracks of that channel too.
"""

from __future__ import annotations

import io
import re
import struct
from collections import Counter, defaultdict, deque
from functools import partial
from pathlib import Path

import numpy as np

from meloformer.midi.chunks import RESAVE, is_broken, tidy, track_chunks, walk
from meloformer.midi.pedal import extend_sustained
from meloformer.midi.score import (
    DEFAULT_METER,
    DEFAULT_QPM,
    METER_DTYPE,
    TEMPO_DTYPE,
    MidiError,
    NoteColumns,
    Score,
    Track,
)
from meloformer.midi.splits import num_split

try:
    import symusic
except ImportError:  # no wheel for this platform: everything works, fifty times slower
    symusic = None

MAX_TICK = 2**31 - 1  # symusic holds times in 32 bits
TOO_LATE = MAX_TICK + 1  # a damaged file may state times beyond 64 bits; they are held to this and refused in the end
MICROSECONDS_PER_MINUTE = 60_000_000
MAX_DENOMINATOR = 128


def read_score(path: str | Path, sustain_pedal: str = "ignore") -> Score:
    """Read a MIDI file; `MidiError`, one line, if it holds no readable music. sustain_pedal: "ignore" or "extend"."""
    data, counts = tidy(path)
    score = _read(path, data, counts)
    return extend_sustained(score, data) if sustain_pedal == "extend" else score


def _read(path: str | Path, data: bytes, counts: Counter) -> Score:
    if symusic is None:
        return _with_miditoolkit(path, data, counts)
    try:
        return _with_symusic(path, data, counts)
    except MidiError as refusal:
        if any(map(is_broken, track_chunks(data))):
            raise  # the second reader would stumble as well, after fifty times as long
        try:
            return _with_miditoolkit(path, data, counts)
        except MidiError:
            raise refusal from None


def read_with_symusic(path: str | Path) -> Score:
    """`read_score` through symusic alone."""
    if symusic is None:
        raise MidiError(f"{path}: symusic is not installed; pip install symusic")
    return _with_symusic(path, *tidy(path))


def read_with_miditoolkit(path: str | Path) -> Score:
    """`read_score` through miditoolkit's parser (mido) alone: slow, and independent of symusic."""
    return _with_miditoolkit(path, *tidy(path))


def _count_repair(path, counts: Counter) -> None:
    """A few data bytes above 127 are a slip; together with foreign bytes between the tracks they are a wreck."""
    counts["repaired"] += 1
    if counts["skipped_chunks"]:
        raise MidiError(f"{path}: damaged MIDI (bytes above 127, and foreign bytes between its tracks); {RESAVE}")


# --- symusic ------------------------------------------------------------------------------------------------


def _with_symusic(path: str | Path, data: bytes, counts: Counter) -> Score:
    counts = counts.copy()
    parse = symusic.Score.from_midi
    try:
        try:
            parsed = parse(data)
        except RuntimeError:
            parse = partial(parse, sanitize_data=True)
            parsed = parse(data)
            _count_repair(path, counts)
    except (RuntimeError, IndexError, MemoryError, OverflowError, UnicodeError) as error:
        reason = str(error).split("\n")[0].removeprefix("MiniMidi: ").removesuffix(": iostream error")
        raise MidiError(f"{path}: damaged MIDI ({reason}); {RESAVE}") from None

    tracks, sizes, sounding = [], [], []
    bends = controls = pedals = 0
    for track in parsed.tracks:
        bends += len(track.pitch_bends)
        controls += len(track.controls)
        pedals += len(track.pedals)
        notes = track.notes
        if len(notes):
            sounding.append(notes.numpy())
            sizes.append(len(notes))
            tracks.append(Track(track.program, track.is_drum, track.name))
    split = num_split(data, parse, parsed)
    counts.update(pitch_bends=bends, control_changes=controls, pedals=pedals, tracks_split=split)
    columns = [_joined([part[name] for part in sounding]) for name in ("time", "duration", "pitch", "velocity")]
    notes = NoteColumns(np.repeat(np.arange(len(tracks)), sizes), *columns)
    meters, tempos = parsed.time_signatures.numpy(), parsed.tempos.numpy()
    if _order_was_lost(meters) or _order_was_lost(tempos):
        meters, tempos = _meta_events(data)
    return _finish(path, parsed.ticks_per_quarter, tracks, notes, meters, tempos, counts)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, dtype=np.int64) if parts else np.zeros(0, dtype=np.int64)


def _order_was_lost(events: dict[str, np.ndarray]) -> bool:
    """Whether symusic may have shuffled events of one tick: it sorts lists of more than 24 by an unstable sort."""
    if len(events["time"]) <= 24:
        return False
    same_tick = np.diff(events["time"]) == 0
    return any(bool((same_tick & (np.diff(events[name].astype(np.int64)) != 0)).any()) for name in events)


def _meta_events(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Meters and tempos of all tracks of tidied data, in the order of time, then of the file."""
    meters, tempos = [], []
    for track in track_chunks(data):
        if b"\xff\x51\x03" not in track and b"\xff\x58\x04" not in track:
            continue
        for tick, status, at, size in walk(track):
            if status == 0xFF58 and size == 4:
                meters.append((min(tick, TOO_LATE), track[at], _denominator(1 << min(track[at + 1], 30))))
            elif status == 0xFF51 and size == 3:
                tempos.append((min(tick, TOO_LATE), int.from_bytes(track[at : at + 3], "big")))
    return _by_time(meters, tempos)


def _denominator(stated: int) -> int:
    return stated if stated <= MAX_DENOMINATOR else 0


def _by_time(meters: list[tuple], tempos: list[tuple]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(tick, numerator, denominator) and (tick, microseconds a quarter) as columns; those of one tick stay in order."""
    meters = np.array(meters, dtype=np.int64).reshape(-1, 3)
    tempos = np.array(tempos, dtype=np.int64).reshape(-1, 2)
    meters = meters[np.argsort(meters[:, 0], kind="stable")]
    tempos = tempos[np.argsort(tempos[:, 0], kind="stable")]
    return (
        dict(zip(("time", "numerator", "denominator"), meters.T)),
        dict(zip(("time", "mspq"), tempos.T)),
    )


# --- miditoolkit's parser -----------------------------------------------------------------------------------


def _parse_with_mido(path: str | Path, data: bytes, counts: Counter):
    """mido's MidiFile. Not miditoolkit.MidiFile: version 1.0.1 gives a note the program of its note-off, and forgets
    all earlier tempos where a later track has one at tick 0."""
    try:
        import mido
        from mido.midifiles.meta import KeySignatureError
    except ImportError:
        raise MidiError(f"{path}: neither symusic nor miditoolkit reads it here; pip install miditoolkit") from None
    try:
        try:
            return mido.MidiFile(file=io.BytesIO(data))
        except KeySignatureError:  # mido stops at a key it does not know; nothing here reads keys
            data = re.sub(rb"\xff\x59\x02..", b"\xff\x59\x02\x00\x00", data, flags=re.DOTALL)
            return mido.MidiFile(file=io.BytesIO(data), clip=True)
        except (OSError, ValueError):
            parsed = mido.MidiFile(file=io.BytesIO(data), clip=True)
            _count_repair(path, counts)
            return parsed
    except MidiError:
        raise
    except (OSError, EOFError, ValueError, LookupError, TypeError, struct.error, KeySignatureError) as error:
        reason = str(error).split("\n")[0] or "it ends inside an event"
        raise MidiError(f"{path}: damaged MIDI ({reason}); {RESAVE}") from None


def _meta_events_of_mido(parsed) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    meters, tempos = [], []
    for track in parsed.tracks:
        tick = 0
        for event in track:
            tick = min(tick + event.time, TOO_LATE)
            if event.type == "time_signature":
                meters.append((tick, event.numerator, _denominator(event.denominator)))
            elif event.type == "set_tempo":
                tempos.append((tick, event.tempo))
    return _by_time(meters, tempos)


def _with_miditoolkit(path: str | Path, data: bytes, counts: Counter) -> Score:
    counts = counts.copy()
    parsed = _parse_with_mido(path, data, counts)
    tracks, rows = [], []
    for track in parsed.tracks:
        parts = _notes_by_part(track, counts)
        counts["tracks_split"] += len(parts) - len({channel for channel, _ in parts})
        for channel, program in sorted(parts):
            rows += [(len(tracks), *row) for row in parts[channel, program]]
            tracks.append(Track(program, channel == 9, _name(track)))
    notes = NoteColumns(*np.array(rows, dtype=np.int64).reshape(-1, 5).T)
    return _finish(path, parsed.ticks_per_beat, tracks, notes, *_meta_events_of_mido(parsed), counts)


def _notes_by_part(track, counts: Counter) -> dict[tuple[int, int], list[tuple[int, int, int, int]]]:
    """{(channel, program): [(onset, duration, pitch, velocity)]} of one track of the file."""
    parts = defaultdict(list)
    program = [0] * 16
    sounding = defaultdict(deque)  # (channel, pitch) -> (onset, velocity, program), oldest first
    pressed = [False] * 16
    tick = 0
    for event in track:
        tick = min(tick + event.time, TOO_LATE)
        if event.type == "note_on" and event.velocity > 0:
            sounding[event.channel, event.note].append((tick, event.velocity, program[event.channel]))
        elif event.type in ("note_on", "note_off"):
            if sounding[event.channel, event.note]:
                onset, velocity, started_as = sounding[event.channel, event.note].popleft()
                parts[event.channel, started_as].append((onset, tick - onset, event.note, velocity))
        elif event.type == "program_change":
            program[event.channel] = event.program
        elif event.type == "pitchwheel":
            counts["pitch_bends"] += 1
        elif event.type == "control_change":
            counts["control_changes"] += 1
            if event.control == 64:
                counts["pedals"] += event.value >= 64 and not pressed[event.channel]
                pressed[event.channel] = event.value >= 64
    return parts


def _name(track) -> str:
    """The last name of a track, as symusic has it; mido reads latin-1, most files of today are UTF-8."""
    names = [event.name for event in track if event.type == "track_name"]
    raw = names[-1].encode("latin-1", "replace") if names else b""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


# --- what both share ----------------------------------------------------------------------------------------


def _finish(path, ticks_per_quarter, tracks, notes: NoteColumns, meters, tempos, counts) -> Score:
    for times in (notes.onset, notes.onset + notes.duration, meters["time"], tempos["time"]):
        # as unsigned, a negative time is a large one
        if len(times) and times.astype(np.int64, copy=False).view(np.uint64).max() > MAX_TICK:
            raise MidiError(f"{path}: a time beyond {MAX_TICK} ticks, so the file is damaged; {RESAVE}")
    num_zero = len(notes.duration) - int(np.count_nonzero(notes.duration))
    if num_zero:
        notes = notes._replace(duration=np.maximum(notes.duration, 1))
        counts["zero_duration"] += num_zero
    counts["no_meter"] += not len(meters["time"])
    counts["drum_kits"] += sum(track.is_drum and track.program > 0 for track in tracks)
    return Score(
        ticks_per_quarter,
        tracks,
        notes,
        _meter_map(meters, counts),
        _tempo_map(tempos, counts),
        counts=+counts,
    )


# Most files state one meter and one tempo, so plain loops are faster than arrays here.


def _meter_map(events: dict[str, np.ndarray], counts: Counter) -> np.ndarray:
    rows = []
    for tick, above, below in zip(*[events[name].tolist() for name in ("time", "numerator", "denominator")]):
        if above > 0 and 0 < below <= MAX_DENOMINATOR and below & (below - 1) == 0:
            rows.append((tick, above, below))
        else:
            counts["invalid_meters"] += 1
    return np.array(_last_of_each_tick(rows, (0, *DEFAULT_METER), "meters", counts), dtype=METER_DTYPE)


def _tempo_map(events: dict[str, np.ndarray], counts: Counter) -> np.ndarray:
    rows = []
    for tick, mspq in zip(events["time"].tolist(), events["mspq"].tolist()):
        if mspq > 0:
            rows.append((tick, MICROSECONDS_PER_MINUTE / mspq))
        else:
            counts["invalid_tempos"] += 1
    return np.array(_last_of_each_tick(rows, (0, DEFAULT_QPM), "tempos", counts), dtype=TEMPO_DTYPE)


def _last_of_each_tick(rows: list[tuple], default: tuple, kind: str, counts: Counter) -> list[tuple]:
    """The rows, sorted by tick, one a tick, with `default` before them where they start after tick 0."""
    if not rows or rows[0][0] > 0:
        rows.insert(0, default)
    kept = rows[:1]
    for row in rows[1:]:
        if row[0] > kept[-1][0]:
            kept.append(row)
            continue
        counts[f"same_tick_{kind}"] += row != kept[-1]
        kept[-1] = row
    return kept
