"""`Score` -> a type 1 MIDI file, whole or absent.

>>> write_midi(score, "out.mid")   # doctest: +SKIP
Counter()

Takes any Score, raw or quantized, and returns what it had to change, by rule:

- The first track of the file holds the meter and tempo maps; a tempo is rounded to whole microseconds a quarter. Then
  one track for each track of the score, in its order, with its name and program. The file ends with the last bar.
- Drums are on channel 10, all with the kit (program) of the first drum track. Tracks of one program share a channel:
  the first fifteen programs to appear have one each. A program beyond them joins the channel of the nearest General
  MIDI family, and of the nearest number in it, and sounds as that channel's program: `channel_shared` tracks.
- Inside a track the earlier of two overlapping notes of one pitch ends where the later begins: `overlap_cut`. Of
  notes with the same onset and pitch the longest stays: `duplicate_dropped`.
- Control tokens are not music and are not written.

So `read_score` returns the same notes, meters and instruments, and the same tempos to the microsecond, for a score
without overlaps inside a track, without empty tracks, and with at most fifteen programs.

The surprise: overlaps are resolved inside a track only. Two tracks of one program may hold the same pitch on one
channel; every reader pairs their notes track by track, and cutting them would lose what the score says.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import mido
import numpy as np

from meloformer.files import write_atomic
from meloformer.midi.chunks import MAX_DELTA
from meloformer.midi.general_midi import FAMILY_SIZE
from meloformer.midi.score import MidiError, Score, flaw_of

DRUM_CHANNEL = 9  # counted from 0
MELODIC_CHANNELS = [channel for channel in range(16) if channel != DRUM_CHANNEL]

MAX_TICKS_PER_QUARTER = 2**15 - 1
SLOWEST, FASTEST = 2**24 - 1, 1  # microseconds a quarter, in three bytes

# Order on one tick: a note ends before the same pitch begins again
NOTE_OFF, NOTE_ON = range(2)


def write_midi(score: Score, path: str | Path) -> Counter:
    """Write `score` to `path`; returns counts of what was changed. MidiError if a MIDI file cannot hold it."""
    _check(score, path)
    counts: Counter = Counter()
    file = mido.MidiFile(type=1, ticks_per_beat=score.ticks_per_quarter, charset="utf-8")
    file.tracks.append(_conductor(score, path))
    channels = _assign_channels(score, counts)
    notes = resolve_overlaps(score.notes, counts)
    starts = np.searchsorted(notes["track"], np.arange(len(score.tracks) + 1))
    for i, (track, (channel, program)) in enumerate(zip(score.tracks, channels)):
        file.tracks.append(_track(track.name, channel, program, notes[starts[i] : starts[i + 1]], path))
    buffer = io.BytesIO()
    file.save(file=buffer)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise MidiError(f"{path}: cannot be written ({error.strerror}); check the folder") from None
    return counts


def _check(score: Score, path) -> None:
    if score.ticks_per_quarter > MAX_TICKS_PER_QUARTER:
        raise MidiError(f"{path}: {score.ticks_per_quarter} ticks per quarter, MIDI holds {MAX_TICKS_PER_QUARTER}")
    numerators, denominators = score.meters["numerator"], score.meters["denominator"]
    bad = (numerators < 1) | (numerators > 255) | (denominators < 1) | (denominators & (denominators - 1) != 0)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise MidiError(f"{path}: meter {numerators[i]}/{denominators[i]}: 1..255 over a power of two is accepted")
    if not (score.tempos["qpm"] > 0).all():
        raise MidiError(f"{path}: a tempo of {score.tempos['qpm'].min()} quarters a minute: it must be positive")
    flaw = flaw_of(score)
    if not flaw and len(score.notes) and not score.notes["velocity"].all():
        flaw = "a note of velocity 0, which would end another"
    if flaw:
        raise MidiError(f"{path}: {flaw}")


def _assign_channels(score: Score, counts: Counter) -> list[tuple[int, int]]:
    """(channel, program) of each track."""
    melodic = list(dict.fromkeys(track.program for track in score.tracks if not track.is_drum))
    channel_of = dict(zip(melodic, MELODIC_CHANNELS))
    kit = next((track.program for track in score.tracks if track.is_drum and 0 <= track.program < 128), 0)
    assigned = []
    for track in score.tracks:
        if track.is_drum:
            assigned.append((DRUM_CHANNEL, kit))
            continue
        program = track.program
        if program not in channel_of:
            program = min(channel_of, key=lambda other: family_distance(other, track.program))
            counts["channel_shared"] += 1
        assigned.append((channel_of[program], program))
    return assigned


def family_distance(a: int, b: int) -> tuple[int, int]:
    """Nearest family first, then nearest number."""
    return abs(a // FAMILY_SIZE - b // FAMILY_SIZE), abs(a - b)


def resolve_overlaps(notes: np.ndarray, counts: Counter) -> np.ndarray:
    """A copy in which no two notes of one track and pitch sound together, sorted by track."""
    notes = notes[np.lexsort((notes["duration"], notes["onset"], notes["pitch"], notes["track"]))]
    notes["duration"] = np.maximum(notes["duration"], 1)
    if len(notes) > 1:
        same = (notes["track"][1:] == notes["track"][:-1]) & (notes["pitch"][1:] == notes["pitch"][:-1])
        room = np.where(same, np.diff(notes["onset"]), np.iinfo(np.int64).max)
        counts["overlap_cut"] += int(((room > 0) & (notes["duration"][:-1] > room)).sum())
        counts["duplicate_dropped"] += int((room == 0).sum())
        notes["duration"][:-1] = np.minimum(notes["duration"][:-1], room)
        notes = notes[notes["duration"] > 0]
    for rule in [rule for rule, count in counts.items() if not count]:
        del counts[rule]
    return notes


def _conductor(score: Score, path) -> mido.MidiTrack:
    events = [
        (int(tick), mido.MetaMessage("time_signature", numerator=int(numerator), denominator=int(denominator)))
        for tick, numerator, denominator in score.meters
    ]
    for tick, qpm in score.tempos:
        microseconds = min(max(round(60_000_000 / float(qpm)), FASTEST), SLOWEST)
        events.append((int(tick), mido.MetaMessage("set_tempo", tempo=microseconds)))
    events.sort(key=lambda event: event[0])
    end = score.end_tick if score.num_bars is None else int(score.bar_lines()[-1])
    return _with_deltas(events, max(end, events[-1][0] if events else 0), path)


def _track(name: str, channel: int, program: int, notes: np.ndarray, path) -> mido.MidiTrack:
    setup = [(0, mido.MetaMessage("track_name", name=name))] if name else []
    setup.append((0, mido.Message("program_change", channel=channel, program=program)))
    # (event, 4): tick, NOTE_OFF or NOTE_ON, pitch, velocity
    begins = np.stack([notes["onset"], np.full(len(notes), NOTE_ON), notes["pitch"], notes["velocity"]], axis=1)
    ends = np.stack([notes["onset"] + notes["duration"], np.full(len(notes), NOTE_OFF), notes["pitch"]], axis=1)
    ends = np.concatenate([ends, np.zeros((len(notes), 1), dtype=np.int64)], axis=1)
    rows = np.concatenate([begins, ends]).astype(np.int64)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    # velocity 0 is a note-off by another name, and keeps the running status
    events = [
        (tick, mido.Message("note_on", channel=channel, note=pitch, velocity=velocity))
        for tick, _, pitch, velocity in rows.tolist()
    ]
    return _with_deltas(setup + events, events[-1][0] if events else 0, path)


def _with_deltas(events: list[tuple[int, mido.Message | mido.MetaMessage]], end: int, path) -> mido.MidiTrack:
    """A track of the file from (tick, message) in order, closed at tick `end`."""
    track, now = mido.MidiTrack(), 0
    for tick, message in [*events, (end, mido.MetaMessage("end_of_track"))]:
        if tick - now > MAX_DELTA:
            raise MidiError(f"{path}: a silence of {tick - now} ticks, MIDI holds {MAX_DELTA}; lower the resolution")
        message.time = tick - now
        track.append(message)
        now = tick
    return track
