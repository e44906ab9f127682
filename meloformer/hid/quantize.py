"""From a raw `Score` to one that the token grid holds exactly, every loss counted by name.

`quantize(score, vocabulary)` returns a new Score with `quantized=True`: times in ticks of the vocabulary's grid, meters
from its table and only at bar lines, whole-BPM tempos only at bar lines, `num_bars` set, representable durations and
velocities, tracks without notes gone. A score that is already quantized comes back as it is.

>>> from meloformer.midi import Track, note_table
>>> raw = Score(480, [Track(0)], note_table([(0, 490, 230, 60, 99)]), meters=[(0, 3, 4)])
>>> score = quantize(raw, Vocabulary())
>>> score.notes[["onset", "duration", "velocity"]].tolist(), score.num_bars
([(25, 11, 98)], 1)

The rules (counted under the names in brackets; DESIGN.md section 3):

- onset and end are rounded to the grid, halves up; a note lasts at least one tick. [onsets_moved: by more than 1/48
  of a quarter note]
- the same pitch struck twice at once in one track: the longer, then the louder stays. [duplicate_notes]
- a note that still sounds when its pitch is struck again ends there. [overlaps]
- a duration between two representable ones goes to the nearest, but never past the next note of its pitch; longer than
  eight whole notes is cut. [durations_rounded, durations_cut]
- 1/4 throughout means that the writer had no meter: 4/4. [meter_quarter_throughout]
- a meter outside the table: the same length over another denominator; else each bar split into equal bars of at least
  two quarters; else 4/4. [meters_rewritten, meters_split, meters_replaced]
- a meter change inside a bar cuts that bar short, to a sixteenth. [bars_cut] A restatement of the meter in force is
  no change.
- a meter that lasts for no bar, because the next comes on the same bar line of the grid or because no note begins after
  it, is dropped. [meters_dropped]
- notes beyond a gap of more than 64 bars are dropped if they are at most 1 % of the piece. [stray_notes]
- one tempo a bar, the bar's average so that its seconds are kept, written where it differs by 4 % or more from the one
  in force; what a smaller change leaves is carried into the next bar. [tempos_merged; tempos_clipped outside 20..320]
- the piece ends with the bar of its last onset.
"""

from __future__ import annotations

from collections import Counter
from math import floor

import numpy as np

from meloformer.hid.vocabulary import MAX_BPM, MIN_BPM, VELOCITIES, VELOCITY_BIN, Vocabulary
from meloformer.midi.score import (
    METER_DTYPE,
    TEMPO_DTYPE,
    MidiError,
    NoteColumns,
    Score,
    bar_of,
    bar_ticks,
    flaw_of,
    seconds_at,
)

STRAY_GAP_BARS = 64
STRAY_SHARE = 0.01
MAX_BARS = 100_000  # beyond this a file is damaged, not long: some claim millions of bars
TEMPO_CHANGE = 0.04
_SLOWEST, _FASTEST = 1.0, 100_000.0  # qpm; what damaged tempo events are held to before averaging


def round_half_up(numerator: np.ndarray, denominator: int) -> np.ndarray:
    """floor(numerator / denominator + 1/2) in integers."""
    return (2 * numerator + denominator) // (2 * denominator)


def quantize(score: Score, vocabulary: Vocabulary) -> Score:
    """See the module's docstring. MidiError for a piece of more than MAX_BARS bars, and for notes or tracks that no
    stream can hold."""
    if flaw := flaw_of(score):
        raise MidiError(f"the score has {flaw}")
    if score.quantized:
        if score.ticks_per_quarter != vocabulary.resolution:
            raise MidiError(
                f"the score is quantized to {score.ticks_per_quarter} ticks a quarter note, "
                f"the vocabulary to {vocabulary.resolution}"
            )
        return score
    counts = Counter()
    resolution = vocabulary.resolution
    notes = _notes_on_grid(score, resolution, counts)
    last_onset = int(notes.onset.max(initial=0))
    meters = _meters_on_grid(score, vocabulary, last_onset, counts)
    last_bar = int(bar_of(np.array([last_onset]), meters, resolution)[0])
    if last_bar > STRAY_GAP_BARS:
        notes, last_bar = _drop_stray(notes, meters, resolution, counts)
    num_bars = last_bar + 1
    if num_bars > MAX_BARS:
        raise MidiError(f"the piece has {num_bars:,} bars; at most {MAX_BARS:,} are read, so the file looks damaged")
    notes = _apart(notes, vocabulary, counts)
    sounding = np.zeros(len(score.tracks), dtype=bool)
    sounding[notes.track] = True
    tracks = [track for track, sounds in zip(score.tracks, sounding.tolist()) if sounds]
    if len(tracks) < len(score.tracks):
        counts["empty_tracks"] += len(score.tracks) - len(tracks)
        notes = notes._replace(track=(sounding.cumsum() - 1)[notes.track])
    result = Score(
        ticks_per_quarter=resolution,
        tracks=tracks,
        notes=notes,
        meters=meters,
        num_bars=num_bars,
        quantized=True,
    )
    lines = result.bar_lines()
    result.meters = meters[meters["tick"] < lines[-1]]
    counts["meters_dropped"] += len(meters) - len(result.meters)
    result.tempos = _tempos_on_grid(score, lines, resolution, counts)
    result.counts = score.counts + counts  # + drops the zeros
    return result


def bin_velocity(velocity: np.ndarray) -> np.ndarray:
    """The middle of each MIDI velocity's bin, 1..127; a fixed point of itself.

    >>> bin_velocity(np.array([1, 64, 66, 127], dtype=np.uint8)).tolist()
    [2, 66, 66, 126]
    """
    return VELOCITIES[np.clip(velocity, 1, 127) // VELOCITY_BIN]


# --- notes ---------------------------------------------------------------------------------------------------


def _notes_on_grid(score: Score, resolution: int, counts: Counter) -> NoteColumns:
    notes, tpq = score.columns, score.ticks_per_quarter
    scaled = notes.onset * resolution
    onset = round_half_up(scaled, tpq)
    if resolution < 24:  # on a finer grid none is moved so far
        # |onset / resolution - raw / tpq| > 1 / 48 quarter, in integers
        counts["onsets_moved"] += int(np.count_nonzero(48 * np.abs(onset * tpq - scaled) > tpq * resolution))
    end = round_half_up(scaled + notes.duration * resolution, tpq)
    return notes._replace(onset=onset, duration=np.maximum(end - onset, 1))


def _drop_stray(notes: NoteColumns, meters: np.ndarray, resolution: int, counts: Counter) -> tuple[NoteColumns, int]:
    """The notes that stay, and the bar of the last of them."""
    ordered = np.sort(notes.onset)
    bars = bar_of(ordered, meters, resolution)
    after_gap = np.flatnonzero(bars[1:] - bars[:-1] > STRAY_GAP_BARS) + 1
    few = after_gap[len(bars) - after_gap <= STRAY_SHARE * len(bars)]
    if not len(few):
        return notes, int(bars[-1])
    counts["stray_notes"] += len(bars) - int(few[0])
    return notes.take(notes.onset < ordered[few[0]]), int(bars[few[0] - 1])


def _apart(notes: NoteColumns, vocabulary: Vocabulary, counts: Counter) -> NoteColumns:
    """The notes as a grid score has them: no two on one (track, onset, pitch), none sounding into the next.

    Two sorts, by pitch to see what follows what, and back by onset.
    """
    bits = NoteColumns(*[_num_bits(column) for column in notes])
    notes = _sorted(notes, ("track", "pitch", "onset", "duration", "velocity"), bits)
    follows = (notes.track[1:] == notes.track[:-1]) & (notes.pitch[1:] == notes.pitch[:-1])
    room = notes.onset[1:] - notes.onset[:-1]
    same = follows & (room == 0)
    num_same = int(np.count_nonzero(same))
    if num_same:  # of several the last, the longest and loudest, stays
        counts["duplicate_notes"] += num_same
        notes = notes.take(np.append(~same, True))
        follows, room = follows[~same], notes.onset[1:] - notes.onset[:-1]
    to_next = np.full(len(notes.track), np.iinfo(np.int64).max)
    np.copyto(to_next[:-1], room, where=follows)
    notes = notes._replace(
        duration=_durations_on_grid(notes.duration, to_next, vocabulary, counts),
        velocity=bin_velocity(notes.velocity).astype(np.int64),
    )
    bits = bits._replace(duration=int(vocabulary.durations[-1]).bit_length(), velocity=7)
    return _sorted(notes, ("track", "onset", "pitch", "duration", "velocity"), bits)


def _num_bits(column: np.ndarray) -> int:
    """Enough for every number of a column; 64 where one is negative."""
    return int(column.view(np.uint64).max(initial=0)).bit_length()


def _sorted(notes: NoteColumns, keys: tuple[str, ...], bits: NoteColumns) -> NoteColumns:
    """The notes in the order of all five columns, which hold numbers of so many bits.

    Numbers of usual size are packed into one, which is sorted and taken apart again: several times as fast as
    np.lexsort and moving the columns.
    """
    columns = [getattr(notes, key) for key in keys]
    sizes = [getattr(bits, key) for key in keys]
    if sum(sizes) > 63:
        return notes.take(np.lexsort(columns[::-1]))
    packed = columns[0]
    for column, size in zip(columns[1:], sizes[1:]):
        packed = packed << size | column
    packed.sort()
    unpacked = {}
    for key, size in zip(keys[:0:-1], sizes[:0:-1]):
        unpacked[key] = packed & ((1 << size) - 1)
        packed = packed >> size
    return NoteColumns(**unpacked, **{keys[0]: packed})


def _durations_on_grid(wanted: np.ndarray, room: np.ndarray, vocabulary: Vocabulary, counts: Counter) -> np.ndarray:
    """(notes,) representable durations of at most `room` ticks, what there is to the next note of the pitch."""
    held = np.minimum(wanted, room)
    counts["overlaps"] += int(np.count_nonzero(held < wanted))
    index = vocabulary.duration_index(held)
    index -= vocabulary.durations[index] > room  # rounding up would run into the next note
    value = vocabulary.durations[index]
    cut = int(np.count_nonzero(held > vocabulary.durations[-1]))
    counts["durations_cut"] += cut
    counts["durations_rounded"] += int(np.count_nonzero(value != held)) - cut
    return value


# --- meters --------------------------------------------------------------------------------------------------


def fit_meter(numerator: int, denominator: int, vocabulary: Vocabulary) -> tuple[tuple[int, int], str | None]:
    """A meter of the table for any meter, and the name of the rule that was needed.

    >>> v = Vocabulary()
    >>> [fit_meter(n, d, v) for n, d in ((4, 4), (8, 32), (65, 4), (97, 4))]
    [((4, 4), None), ((1, 4), 'meters_rewritten'), ((5, 4), 'meters_split'), ((4, 4), 'meters_replaced')]
    """
    if vocabulary.has_meter(numerator, denominator):
        return (numerator, denominator), None
    if denominator > 0:
        for d in (4, 8, 16, 2):
            n, remainder = divmod(numerator * d, denominator)
            if not remainder and vocabulary.has_meter(n, d):
                return (n, d), "meters_rewritten"
        for parts in range(2, 2 * numerator // denominator + 1):  # of at least two quarter notes each
            n, remainder = divmod(numerator, parts)
            if not remainder and vocabulary.has_meter(n, denominator):
                return (n, denominator), "meters_split"
    return (4, 4), "meters_replaced"


def _meter_of_length(sixteenths: int, denominator: int, vocabulary: Vocabulary) -> tuple[int, int]:
    """A meter for a bar cut to so many sixteenths, over the given denominator where that divides."""
    for d in (denominator, 4, 8, 16):
        n, remainder = divmod(sixteenths * d, 16)
        if not remainder and vocabulary.has_meter(n, d):
            return n, d
    raise AssertionError("a bar shorter than eight quarters always has a meter over 16")


def _meters_on_grid(score: Score, vocabulary: Vocabulary, last_onset: int, counts: Counter) -> np.ndarray:
    """Meter changes at bar lines of the grid, from tick 0 to the last onset."""
    resolution = vocabulary.resolution
    stated = score.meters.tolist()
    if all((n, d) == (1, 4) for _, n, d in stated):
        stated = [(0, 4, 4)]
        counts["meter_quarter_throughout"] += 1
    sixteenth = resolution // 4
    table: list[tuple[int, int, int]] = []
    position, in_force = 0, None
    for tick, n, d in stated:
        if (n, d) == in_force:
            continue
        tick = floor(tick * resolution / score.ticks_per_quarter + 0.5)
        if table and tick > last_onset:
            counts["meters_dropped"] += 1
            in_force = (n, d)
            continue
        if table:
            _, last_n, last_d = table[-1]
            length = bar_ticks(last_n, last_d, resolution)
            bars, rest = divmod(tick - position, length)
            cut = round_half_up(rest, sixteenth)
            if cut * sixteenth >= length:
                bars, cut = bars + 1, 0
            position += bars * length
            if cut:
                if not bars:  # the earlier meter lasted for less than a bar: the cut one stands in its place
                    table.pop()
                table.append((position, *_meter_of_length(int(cut), last_d, vocabulary)))
                position += int(cut) * sixteenth
                counts["bars_cut"] += 1
        meter, rule = fit_meter(n, d, vocabulary)
        if rule:
            counts[rule] += 1
        if table and table[-1][0] == position:  # the earlier meter lasted for no bar at all
            table.pop()
            counts["meters_dropped"] += 1
        table.append((position, *meter))
        in_force = (n, d)
    changes = [m for i, m in enumerate(table) if i == 0 or m[1:] != table[i - 1][1:]]
    return np.array(changes, dtype=METER_DTYPE)


# --- tempos --------------------------------------------------------------------------------------------------


def _tempos_on_grid(score: Score, lines: np.ndarray, resolution: int, counts: Counter) -> np.ndarray:
    """Whole-BPM tempo changes at the given bar lines that keep each bar's seconds, by the rule above."""
    tempos = score.tempos
    if len(tempos) == 1:
        average = min(max(float(tempos["qpm"][0]), _SLOWEST), _FASTEST)
        seconds, quarters = [1.0], [average / 60]
    else:
        held = tempos.copy()
        held["qpm"] = np.clip(held["qpm"], _SLOWEST, _FASTEST)
        elapsed = seconds_at(held, score.ticks_per_quarter, lines * (score.ticks_per_quarter / resolution))
        seconds, quarters = np.diff(elapsed).tolist(), (np.diff(lines) / resolution).tolist()
    table: list[tuple[int, float]] = []
    exact = bpm = owed = 0.0  # exact: the average behind the tempo in force, before it was rounded to a whole BPM
    for bar, (length, beats) in enumerate(zip(seconds, quarters)):
        wanted = max(length + owed, 0.25 * length)  # a debt is paid over several bars rather than by a leap
        average = 60 * beats / wanted
        if not table or abs(average / exact - 1) >= TEMPO_CHANGE:
            exact = average
            rounded = float(min(max(floor(average + 0.5), MIN_BPM), MAX_BPM))
            counts["tempos_clipped"] += int(not MIN_BPM <= average <= MAX_BPM)
            if rounded != bpm:
                table.append((int(lines[bar]), rounded))
                bpm = rounded
        owed += length - 60 * beats / exact
    counts["tempos_merged"] += max(len(tempos) - len(table), 0)
    return np.array(table, dtype=TEMPO_DTYPE)
