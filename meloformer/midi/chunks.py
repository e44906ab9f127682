"""The bytes of a MIDI file, looked at before any library reads them: is it one, is it whole, which programs hold.

>>> data, counts = tidy("song.mid")   # doctest: +SKIP
>>> data[:4], counts                  # doctest: +SKIP
(b'MThd', Counter({'skipped_chunks': 1}))

In: a path. Out: the same music as bytes that every library reads alike, and counts; or a `MidiError` that says what
the file is instead and what to do. The tidied copy has the MTrk chunks alone and their true number in the header, for
one library stops at a number too high and another at a foreign chunk. Tracks beyond the stated number are not read:
they are what was left when a shorter file was written over a longer one, often in ruins.

The surprise: a program change belongs to a channel, not to a track, and libraries follow it inside its track only. In
5 % of web files (10 of 199) a channel gets its program in one track and its notes in another, and these would come
out as pianos. So what a track states before its first note is put before every other track as well.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from meloformer.midi.score import MidiError

MAX_DELTA = 2**28 - 1  # ticks between two events: four bytes of seven bits
RESAVE = "open it in a sequencer and save it as a Standard MIDI File"
# What a file that is no MIDI begins with: (offset, bytes, what it is, what to do)
DISGUISES = (
    (0, b"RIFF", "a RIFF file (RMID), not a plain MIDI file", RESAVE),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first"),
    (0, b"\x1f\x8b", "gzip data", "unpack it first"),
    (0, b"CTMF", "a Creative Music File, not MIDI", RESAVE),
    (0, b"CAKEWALK", "a Cakewalk project, not MIDI", RESAVE),
    (128, b"MThd", "a MIDI file inside a MacBinary wrapper", "remove its first 128 bytes"),
)


class Chunks(NamedTuple):
    """A file as it is: `kind` 0 or 1, ticks a quarter note, its MTrk chunks, headers included, and counts."""

    kind: int
    ticks_per_quarter: int
    tracks: list[bytes]
    counts: Counter


def tidy(path: str | Path) -> tuple[bytes, Counter]:
    """The file with its MTrk chunks alone and their true number in the header, and counts; MidiError if not MIDI."""
    kind, ticks_per_quarter, tracks, counts = split(path)
    programs = shared_programs(tracks)
    prefix = b"".join(bytes((0, 0xC0 | channel, program)) for channel, program in sorted(programs.items()))
    if prefix:
        tracks = [b"MTrk" + struct.pack(">I", len(prefix) + len(track) - 8) + prefix + track[8:] for track in tracks]
    return b"".join([header(kind, len(tracks), ticks_per_quarter), *tracks]), counts


def header(kind: int, num_tracks: int, ticks_per_quarter: int) -> bytes:
    """The MThd chunk."""
    return b"MThd" + struct.pack(">IHHH", 6, kind, num_tracks, ticks_per_quarter)


def split(path: str | Path) -> Chunks:
    """The chunks of a file; MidiError, saying what it is instead, if it is not MIDI."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except OSError as error:
        raise MidiError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if data[:4] != b"MThd":
        raise MidiError(f"{path}: {_what_it_is(data)}")
    if len(data) < 14:
        raise MidiError(f"{path}: cut short after {len(data)} bytes; fetch the file again")
    length, kind, stated_tracks, division = struct.unpack(">IHHH", data[4:14])
    if length < 6 or length > len(data) - 8 or kind > 2:
        raise MidiError(f"{path}: damaged header (length {length}, type {kind}); fetch the file again")
    if kind == 2:
        raise MidiError(f"{path}: type 2, independent patterns; {RESAVE} of type 1")
    if division & 0x8000:
        raise MidiError(f"{path}: SMPTE time, which has no bars; {RESAVE} with ticks per quarter note")
    if division == 0:
        raise MidiError(f"{path}: division 0, so its times mean nothing; {RESAVE}")

    tracks, skipped, at = [], 0, 8 + length
    while at + 8 <= len(data) and len(tracks) < (stated_tracks or len(data)):
        name, size = struct.unpack(">4sI", data[at : at + 8])
        if name == b"MTrk":
            if at + 8 + size > len(data):
                raise MidiError(
                    f"{path}: cut short: track {len(tracks) + 1} states {size} bytes, {len(data) - at - 8} are there; "
                    "fetch the file again"
                )
            tracks.append(data[at : at + 8 + size])
            at += 8 + size
            continue
        skipped += 1
        next_track = data.find(b"MTrk", at)
        fits = name.isalnum() and at + 8 + size <= len(data)
        at = at + 8 + size if fits else next_track if next_track >= 0 else len(data)
    if not tracks:
        raise MidiError(f"{path}: a header and no tracks (it states {stated_tracks}); fetch the file again")
    counts = Counter()
    if skipped:
        counts["skipped_chunks"] = skipped
    if leftover := data.count(b"MTrk", at):
        counts["leftover_tracks"] = leftover
    return Chunks(kind if len(tracks) == 1 else 1, division, tracks, counts)


def _what_it_is(data: bytes) -> str:
    if not data:
        return "empty; fetch the file again"
    if not data.strip(b"\0 \t\r\n"):
        return "only zeros and blanks; fetch the file again"
    for offset, mark, what, remedy in DISGUISES:
        if data[offset : offset + len(mark)] == mark:
            return f"{what}; {remedy}"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")) or b"<html" in start:
        return "a web page, not MIDI; fetch the file again"
    at = data.find(b"MThd")
    if at >= 0:
        return f"no MIDI at its start, but MThd stands at byte {at}; remove what precedes it"
    return "not a MIDI file (no MThd at its start); leave it out, or export it as MIDI"


def shared_programs(tracks: list[bytes]) -> dict[int, int]:
    """{channel: program} that holds in every track from its beginning: what any of them states first for a channel.

    A track's own program changes come after and win. Only what stands before a track's first note counts: later
    changes are followed inside their own track alone. Empty for a single track, and where all are pianos.
    """
    if len(tracks) < 2:
        return {}
    stated = [event for track in tracks for event in _opening_programs(track)]
    stated.sort(key=lambda event: event[0])
    programs: dict[int, int] = {}
    for _, channel, program in stated:
        programs.setdefault(channel, program)
    return programs if any(programs.values()) else {}


def _opening_programs(track: bytes) -> list[tuple[int, int, int]]:
    """(tick, channel, program) of the program changes before the first note of an MTrk chunk; stops at damage."""
    found: list[tuple[int, int, int]] = []
    for tick, status, at, _ in walk(track):
        kind = status >> 4
        if kind == 0xC and track[at] < 128:
            found.append((tick, status & 15, track[at]))
        elif kind == 0x9 and track[at + 1]:
            break
    return found


def track_chunks(data: bytes) -> list[bytes]:
    """The MTrk chunks of tidied data."""
    chunks, at = [], 14
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "big")
        chunks.append(data[at:end])
        at = end
    return chunks


def walk(track: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(tick, status, where its data begins, how many bytes) of each event of an MTrk chunk; ends at damage.

    A meta event has 0xFF00 + its type for a status.
    """
    at, tick, running, end = 8, 0, 0, len(track)
    try:
        while at < end:
            delta = track[at]
            at += 1
            if delta >= 0x80:
                delta, at = variable_length(track, at - 1)
            tick += delta
            status = track[at]
            if status >= 0x80:
                at += 1
            else:
                status = running
            if 0x80 <= status < 0xF0:
                running = status
                size = 1 if 0xC0 <= status < 0xE0 else 2
            elif status in (0xFF, 0xF0, 0xF7):
                if status == 0xFF:
                    status = 0xFF00 | track[at]
                    at += 1
                size, at = variable_length(track, at)
            else:
                return
            if at + size > end:
                return
            yield tick, status, at, size
            at += size
    except IndexError:
        return  # cut inside an event: the readers will say so


def events(track: bytes) -> Iterator[tuple[int, bytes]]:
    """(tick, event) of an MTrk chunk in order, each event with its status byte; MidiError where it is damaged.

    >>> track = bytes((0, 0x90, 60, 90, 24, 60, 0, 0, 0xFF, 0x2F, 0))        # the second note-on has a running status
    >>> [(tick, event.hex(" ")) for tick, event in events(b"MTrk" + struct.pack(">I", len(track)) + track)]
    [(0, '90 3c 5a'), (24, '90 3c 00'), (24, 'ff 2f 00')]
    """
    tick, end = 0, 8
    for tick, status, at, size in walk(track):
        end = at + size
        data = track[at:end]
        if status >= 0xFF00:  # a meta event has a type byte before its length, a sysex has not
            yield tick, bytes((0xFF, status & 0xFF)) + _as_variable_length(size) + data
        elif status in (0xF0, 0xF7):
            yield tick, bytes((status,)) + _as_variable_length(size) + data
        else:
            yield tick, bytes((status,)) + data
    if end != len(track):
        raise MidiError(f"damaged MIDI ({_stumbling_block(track, end)} after tick {tick}); {RESAVE}")


def _stumbling_block(track: bytes, at: int) -> str:
    """What the event that begins at `at`, where `walk` stopped, is in words."""
    try:
        _, at = variable_length(track, at)
        status = track[at]
    except IndexError:
        return "a track ends inside an event"
    known = status < 0xF0 or status in (0xF0, 0xF7, 0xFF)
    return "a track ends inside an event" if known else f"a status byte {status:#04x}"


def track_chunk(events: Iterable[tuple[int, bytes]]) -> bytes:
    """The inverse of `events`, every status byte written out; MidiError for a silence that MIDI cannot hold."""
    out, now = bytearray(), 0
    for tick, event in events:
        if tick - now > MAX_DELTA:
            raise MidiError(f"a silence of {tick - now} ticks, MIDI holds {MAX_DELTA}")
        out += _as_variable_length(tick - now) + event
        now = tick
    return b"MTrk" + struct.pack(">I", len(out)) + bytes(out)


def _as_variable_length(value: int) -> bytes:
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


def is_broken(track: bytes) -> bool:
    """Whether an MTrk chunk holds what no reader accepts: an undefined status, data without one, an event cut short."""
    end = 8
    for _, _, at, size in walk(track):
        end = at + size
    if end == len(track):
        return False
    try:
        _, at = variable_length(track, end)
        status = track[at]
    except IndexError:
        return True
    return status < 0xF0 or status in (0xF0, 0xF4, 0xF5, 0xF7, 0xF9, 0xFD, 0xFF)


def variable_length(data: bytes, at: int) -> tuple[int, int]:
    """The number of seven bits a byte at `at`, and where it ends."""
    value = 0
    while data[at] & 0x80:
        value = value << 7 | data[at] & 0x7F
        at += 1
    return value << 7 | data[at], at + 1
