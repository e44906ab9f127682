"""A MIDI file, untouched, with new notes in it: what a continuation, a rewritten bar or an added part is written as.

>>> source = MidiSource("song.mid")                                            # doctest: +SKIP
>>> merge_midi(source, "more.mid", note_table([(0, 15360, 480, 60, 90)]))      # doctest: +SKIP
Counter()

In: the file, and notes in its own ticks whose `track` counts the tracks of `source.score`, then `instruments`.
Out: a file with every event of the first one, byte for byte and on its tick (names, channels, controllers, bends,
tempos), without the notes of `removed`, and with the new ones; and counts of what the rules below did.

- An event that the standard does not define, such as a key of mode 255, is left out, for it makes strict readers refuse
  the file: `broken_events`. A data byte above 127 becomes 127, as which all read it: `repaired_events`.
- A new note of an existing track goes into that track of the file, on its channel. Where the program in force there is
  another one (the track changes its sound), it goes to a track of its own: `own_channel` tracks.
- A new instrument, and a track of its own, get a channel that the file does not use. Where all are taken it joins the
  channel with its program, else of the nearest General MIDI family, and sounds as that does: `channel_shared`. Drums
  are on channel 10.
- A new note is never struck while a kept note of its pitch sounds in its track (`held_dropped`), and ends where the
  next of its pitch, kept or new, begins (`overlap_cut`); of new notes struck together the longest stays
  (`duplicate_dropped`). So readers pair the kept notes as before.
- A note-on that the file never ends would take the end of any later note of its pitch, and a note-off without a note
  would cut a new note short. A new note that meets one goes to a track of its own: `unpaired_avoided` notes.
- What the file has beside the tracks that it states is not copied either: `skipped_chunks`, `leftover_tracks`.

As many new notes are written as were given, less `held_dropped` and `duplicate_dropped`, and readers find all of them.

The surprise: events are copied as bytes, and no library reads and writes them: those drop what they do not know.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meloformer.files import write_atomic
from meloformer.midi.chunks import RESAVE, events, header, shared_programs, split, track_chunk
from meloformer.midi.general_midi import instrument_name
from meloformer.midi.read import read_score
from meloformer.midi.repair import repaired
from meloformer.midi.score import DRUMS, MidiError, note_table
from meloformer.midi.write import DRUM_CHANNEL, MELODIC_CHANNELS, family_distance, resolve_overlaps

NOTE_OFF, NOTE_ON, PROGRAM_CHANGE = 0x8, 0x9, 0xC
_END_OF_TRACK = b"\xff\x2f\x00"
# On one tick: new notes end, then what the file has, then new notes begin.
_ENDS, _FILE, _BEGINS = range(3)


class Note(NamedTuple):
    """A note of a track of the file, with the places of its two events in the track's list."""

    channel: int
    program: int
    onset: int
    end: int
    pitch: int
    velocity: int
    on_at: int
    off_at: int


@dataclass
class _FileTrack:
    """One MTrk: its events, its notes, and per channel the ticks and programs of its program changes. `unpaired`: by
    channel and pitch, (first, last) tick of what is no note: a note-on without an end, to the end of time, and a
    note-off without a beginning, on its tick."""

    events: list[tuple[int, bytes]]
    notes: list[Note]
    changes: dict[int, tuple[list[int], list[int]]]
    unpaired: dict[tuple[int, int], list[tuple[int, float]]]

    def program(self, channel: int, tick: int) -> int:
        ticks, programs = self.changes[channel]
        return programs[bisect_right(ticks, tick)]

    def has_room(self, channel: int, onset: int, duration: int, pitch: int, _velocity: int) -> bool:
        """Whether nothing unpaired would end a new note, or take its end: on one tick new notes end before the file's
        events and begin after them."""
        spans = self.unpaired.get((channel, pitch), ())
        return not any(first < onset + duration and onset < last for first, last in spans)


class Part(NamedTuple):
    """A track of the score: the channel and program of a track of the file."""

    file_track: int
    channel: int
    program: int


class MidiSource:
    """A file taken apart: `score` as `read_score` has it, where each of its notes stands in the file, and counts of
    what is not copied as it is: `not_copied`.

    MidiError where it cannot be read, or is so damaged that its events cannot be told apart.
    """

    def __init__(self, path: str | Path):
        self.path, self.score = path, read_score(path)
        self.kind, self.ticks_per_quarter, chunks, self.not_copied = split(path)
        programs = shared_programs(chunks)
        try:
            self.tracks = [_read_track(chunk, programs, self.not_copied) for chunk in chunks]
        except MidiError as error:
            raise MidiError(f"{path}: {error}") from None
        self.parts = [
            Part(i, channel, program)
            for i, track in enumerate(self.tracks)
            for channel, program in sorted({(note.channel, note.program) for note in track.notes})
        ]
        self.number = {part: i for i, part in enumerate(self.parts)}
        rows = [self.row(i, note) for i, track in enumerate(self.tracks) for note in track.notes]
        fields = list(self.score.notes.dtype.names)
        if not np.array_equal(np.sort(note_table(rows), order=fields), np.sort(self.score.notes, order=fields)):
            raise MidiError(f"{path}: damaged MIDI (its notes read differently twice); {RESAVE}")

    def row(self, file_track: int, note: Note) -> tuple[int, int, int, int, int]:
        """A note of a track of the file as `score.notes` has it: track, onset, duration, pitch, velocity."""
        track = self.number[Part(file_track, note.channel, note.program)]
        return track, note.onset, max(note.end - note.onset, 1), note.pitch, note.velocity

    @property
    def loss(self) -> str:
        """What of the file is left out, in words; empty where nothing is."""
        kinds = {
            "skipped_chunks": "chunks that are no tracks",
            "leftover_tracks": "tracks beyond the stated number",
            "broken_events": "events that MIDI does not define",
        }
        said = [f"{words}: {self.not_copied[name]}" for name, words in kinds.items() if self.not_copied[name]]
        return f"not copied are {', '.join(said)}" if said else ""

    def places(self, notes: np.ndarray) -> list[tuple[int, int, int, int]]:
        """(track of the file, channel, onset, pitch) of rows of `score.notes`."""
        parts = [self.parts[track][:2] for track in notes["track"].tolist()]
        return [(*part, *note) for part, note in zip(parts, notes[["onset", "pitch"]].tolist())]

    def plays(self, track: int, tick: int) -> bool:
        """Whether a note struck there on the track's channel would sound as the track does."""
        part = self.parts[track]
        in_force = self.tracks[part.file_track].program(part.channel, tick)
        return part.channel == DRUM_CHANNEL or in_force == part.program

    def part_at(self, file_track: int, channel: int, tick: int) -> int:
        """The part that plays there; of drums, whose kit may be one without notes, the first if it is none."""
        program = self.tracks[file_track].program(channel, tick)
        same = [i for i, part in enumerate(self.parts) if part[:2] == (file_track, channel)]
        return min(same, key=lambda i: self.parts[i].program != program)


def merge_midi(
    source: MidiSource,
    path: str | Path,
    notes: np.ndarray,
    instruments: Sequence[int] = (),
    removed: np.ndarray | None = None,
    end_tick: int = 0,
    only_new: bool = False,
) -> Counter:
    """Write the source with `notes` (a note table) to `path`; returns counts.

    removed: rows of `source.score.notes` that are left out. end_tick: the file lasts at least so long. only_new: no
    note of the source is written. MidiError where the file cannot be written.
    """
    counts = source.not_copied.copy()
    tracks = source.tracks
    guests = defaultdict(list)  # new notes by the track of the file that takes them; their track is the channel there
    homeless = defaultdict(list)  # those that need a track of their own, by number
    for row in resolve_overlaps(notes, counts).tolist():
        if row[0] < len(source.parts) and source.plays(row[0], row[1]):
            part = source.parts[row[0]]
            guests[part.file_track].append((part.channel, *row[1:]))
        else:
            homeless[row[0]].append(row)

    gone = set() if removed is None else set(removed.tolist())
    lists = []
    for i, track in enumerate(tracks):
        kept, dropped = [], set()
        for note in [] if only_new else track.notes:
            if source.row(i, note) in gone:
                dropped |= {note.on_at, note.off_at}
            else:
                kept.append(note)
        stays = [
            (tick, _FILE, event)
            for at, (tick, event) in enumerate(track.events)
            if at not in dropped and not (only_new and event[0] >> 4 in (NOTE_ON, NOTE_OFF))
        ]
        # Channel by channel, not part by part: two kits of one track of the file are two parts on channel 10.
        rows = _avoid_kept(resolve_overlaps(note_table(guests[i]), counts).tolist(), kept, counts)
        for row in rows:
            if only_new or track.has_room(*row):
                stays += _note_events(row[0], row)
            else:
                homeless[source.part_at(i, row[0], row[1])].append(row)
                counts["unpaired_avoided"] += 1
        lists.append(stays)

    lists += _new_tracks(source, homeless, instruments, counts)
    ends = [track.events[-1][0] if track.events else 0 for track in tracks] + [0] * (len(lists) - len(tracks))
    ends[0] = max(ends[0], end_tick)
    try:
        written = [_close(listed, end) for listed, end in zip(lists, ends)]
    except MidiError as error:
        raise MidiError(f"{path}: {error}; lower the resolution") from None
    kind = source.kind if len(written) == 1 else 1
    try:
        write_atomic(path, header(kind, len(written), source.ticks_per_quarter) + b"".join(written))
    except OSError as error:
        raise MidiError(f"{path}: cannot be written ({error.strerror}); check the folder") from None
    return +counts


def _new_tracks(
    source: MidiSource, homeless: Mapping[int, list], instruments: Sequence[int], counts: Counter
) -> list[list[tuple[int, int, bytes]]]:
    """The events of a track for each number in `homeless`, a track of the score or a new instrument: its name, its
    channel's program where the channel is new, its notes."""
    lists, channels = [], _Channels(source.tracks, counts)
    for number, rows in sorted(homeless.items()):
        if number < len(source.parts):
            part = source.score.tracks[number]
            instrument, name = part.instrument, part.name or instrument_name(part.instrument)
            counts["own_channel"] += instrument != DRUMS
        else:
            instrument = int(instruments[number - len(source.parts)])
            name = instrument_name(instrument)
        channel, setup = channels.choose(instrument)
        head = [(0, _FILE, event) for event in (_name_event(name), *setup)]
        lists.append(head + [event for row in rows for event in _note_events(channel, row)])
    return lists


# --- the file's own tracks ----------------------------------------------------------------------------------------


def _read_track(chunk: bytes, shared: dict[int, int], counts: Counter) -> _FileTrack:
    """Events and notes, paired as `read_score` pairs them: a note-off ends the oldest note of its pitch."""
    listed = []
    for tick, found in events(chunk):
        event = repaired(found)
        counts["broken_events"] += event is None
        counts["repaired_events"] += event not in (None, found)
        if event is not None:
            listed.append((tick, event))
    changes: dict[int, tuple[list[int], list[int]]] = {c: ([], [shared.get(c, 0)]) for c in range(16)}
    sounding: dict[tuple[int, int], deque] = defaultdict(deque)
    notes, unpaired = [], defaultdict(list)
    for at, (tick, event) in enumerate(listed):
        kind, channel = event[0] >> 4, event[0] & 15
        data = event[1:3]
        if kind == NOTE_ON and data[1]:
            sounding[channel, data[0]].append((changes[channel][1][-1], tick, data[1], at))
        elif kind in (NOTE_ON, NOTE_OFF) and sounding[channel, data[0]]:
            program, onset, velocity, on_at = sounding[channel, data[0]].popleft()
            notes.append(Note(channel, program, onset, tick, data[0], velocity, on_at, at))
        elif kind in (NOTE_ON, NOTE_OFF):
            unpaired[channel, data[0]].append((tick, tick))
        elif kind == PROGRAM_CHANGE:
            changes[channel][0].append(tick)
            changes[channel][1].append(data[0])
    for key, begun in sounding.items():
        unpaired[key] += [(onset, math.inf) for _, onset, _, _ in begun]
    return _FileTrack(listed, notes, changes, dict(unpaired))


def _avoid_kept(rows: list, kept: list[Note], counts: Counter) -> list:
    """The new notes, rows that begin with a channel, that do not disturb how the kept notes of their channel and pitch
    are paired."""
    held: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for note in kept:
        held[note.channel, note.pitch].append((note.onset, note.end))
    for spans in held.values():
        spans.sort()
    result = []
    for channel, onset, duration, pitch, velocity in rows:
        spans = held.get((channel, pitch), [])
        if any(start <= onset < max(end, start + 1) for start, end in spans):
            counts["held_dropped"] += 1
            continue
        after = bisect_right(spans, (onset, onset))
        if after < len(spans) and spans[after][0] < onset + duration:
            counts["overlap_cut"] += 1
            duration = spans[after][0] - onset
        result.append((channel, onset, duration, pitch, velocity))
    return result


# --- what is new --------------------------------------------------------------------------------------------------


class _Channels:
    """Hands out the channels that the file leaves free."""

    def __init__(self, tracks: Sequence[_FileTrack], counts: Counter):
        used = {event[0] & 15 for track in tracks for _, event in track.events if 0x80 <= event[0] < 0xF0}
        self.free = [channel for channel in MELODIC_CHANNELS if channel not in used]
        self.mine: dict[int, int] = {}  # program: channel
        self.theirs: dict[int, int] = {}  # program: the first channel of the file that plays it
        for track in tracks:
            for note in track.notes:
                if note.channel != DRUM_CHANNEL:
                    self.theirs.setdefault(note.program, note.channel)
        self.counts = counts

    def choose(self, instrument: int) -> tuple[int, list[bytes]]:
        """A channel, and the events that set it up."""
        if instrument == DRUMS:
            return DRUM_CHANNEL, []
        if instrument not in self.mine and self.free:
            self.mine[instrument] = self.free.pop(0)
        if instrument in self.mine:
            channel = self.mine[instrument]
            return channel, [bytes((PROGRAM_CHANGE << 4 | channel, instrument))]
        sounds = self.theirs | self.mine or {0: 0}
        nearest = min(sounds, key=lambda other: family_distance(other, instrument))
        self.counts["channel_shared"] += 1
        return sounds[nearest], []


def _note_events(channel: int, row: Sequence[int]) -> list[tuple[int, int, bytes]]:
    _, onset, duration, pitch, velocity = row
    return [
        (onset, _BEGINS, bytes((NOTE_ON << 4 | channel, pitch, velocity))),
        (onset + duration, _ENDS, bytes((NOTE_OFF << 4 | channel, pitch, 0))),
    ]


def _name_event(name: str) -> bytes:
    text = name.encode("utf-8")[:127].decode("utf-8", "ignore").encode("utf-8")  # no character is cut in two
    return bytes((0xFF, 0x03, len(text))) + text


def _close(listed: list[tuple[int, int, bytes]], end: int) -> bytes:
    """An MTrk chunk of events in any order of ticks; what the file has keeps its order."""
    ordered = sorted((event for event in listed if event[2] != _END_OF_TRACK), key=lambda event: event[:2])
    last = max(end, ordered[-1][0] if ordered else 0)
    return track_chunk([*((tick, event) for tick, _, event in ordered), (last, _END_OF_TRACK)])
