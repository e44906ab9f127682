"""An event of a MIDI file as the standard has it, for strict readers refuse a whole file over one that is not.

    repaired(event)      the event itself where it is sound; repaired where readers agree how; None where they do not

>>> repaired(bytes((0x90, 60, 200))).hex(" ")                      # a data byte above 127 is read as 127
'90 3c 7f'
>>> repaired(bytes((0xFF, 0x59, 2, 0xFA, 0xFF))) is None            # a key of six flats that is neither major nor minor
True

In: an event with its status byte, as `meloformer.midi.chunks.events` gives it. Source: MIDI Manufacturers Association,
Standard MIDI Files 1.0 (RP-001), "Meta-Events"; MIDI 1.0 Detailed Specification, "Data Types", for the bytes.

The surprise: what is longer than stated there is sound, for the standard says that more may be added to an event.
"""

from __future__ import annotations

from meloformer.midi.chunks import variable_length

_META, _SYSEX, _END_OF_SYSEX = 0xFF, 0xF0, 0xF7
# Bytes that a meta event of a type has at least: channel prefix, tempo, SMPTE offset, meter, key. Text, ports and what
# a sequencer keeps for itself may have any number.
_LEAST = {0x20: 1, 0x51: 3, 0x54: 5, 0x58: 4, 0x59: 2}
_SEQUENCE_NUMBER, _END_OF_TRACK, _SMPTE_OFFSET, _KEY = 0x00, 0x2F, 0x54, 0x59


def repaired(event: bytes) -> bytes | None:
    """The event, with data bytes of at most 127, or None where it says nothing that is defined."""
    if event[0] < _SYSEX:
        return event if max(event[1:]) < 0x80 else event[:1] + bytes(min(byte, 127) for byte in event[1:])
    if event[0] == _META:
        return event if _is_sound_meta(event[1], event[variable_length(event, 2)[1] :]) else None
    if event[0] == _SYSEX:
        data = event[variable_length(event, 1)[1] :]
        data = data[:-1] if data.endswith(bytes((_END_OF_SYSEX,))) else data
        return event if max(data, default=0) < 0x80 else None
    return event  # an escape, which may hold any bytes


def _is_sound_meta(kind: int, data: bytes) -> bool:
    if len(data) < _LEAST.get(kind, 0):
        return False
    if kind == _SEQUENCE_NUMBER:
        return len(data) != 1  # none: the place in the file counts
    if kind == _END_OF_TRACK:
        return not data
    if kind == _SMPTE_OFFSET:
        return data[0] < 0x80
    if kind == _KEY:
        return (data[0] <= 7 or data[0] >= 256 - 7) and data[1] <= 1
    return True
