"""Windows: a piece that is too long for a row is cut along bars, all instruments together.

A window [first, last) of bars is itself a valid stream: the stream's controls, the conductor's bars with the meter
and tempo in force restated at the first, and of every track that plays in the window its INSTRUMENT and its bars up to
its last one with notes; and the conditions that are given, the chord in force restated too. PIECE_BEGIN stands in it
if it starts at the piece's first bar, PIECE_END if it ends at the last. A note belongs to the bar it begins in and may
ring past the window's end.

>>> v = Vocabulary()
>>> note = [v.time(0), v.pitch(60), v.duration(24), v.velocity(90)]
>>> piece = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.BAR, v.instrument(0), v.BAR, v.BAR, *note, v.EOS]
>>> table = PieceTable(np.array(piece), v)
>>> table.cost(1, 2), [v.name(token) for token in table.window(1, 2)[:6]]
((13, 1), ['BOS', 'PIECE_END', 'CONDUCTOR', 'BAR', 'METER_4/4', 'TEMPO_120'])

The surprise: the cost of a window is exact before any token is copied, because a window is the concatenation of a
head, a slice of the conductor and one slice of each track, and conditions are counted by bar and by track.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from meloformer.data.shards import NO_CONDITIONS
from meloformer.hid.controls import insert, rows_in_window
from meloformer.hid.vocabulary import Family, Vocabulary

BAR_TOO_LONG = "bar_over_max_seq_len"
BAR_TOO_MANY = "bar_over_max_segments"


class PieceTable:
    """Where the bars of a whole valid stream (without MASK) stand, and what each costs.

    `conditions`: (n, 4) sorted rows of controls (hid.controls) that its windows hold beside the stream's own.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: Vocabulary, conditions: np.ndarray = NO_CONDITIONS):
        self.tokens = tokens = np.asarray(tokens)
        self.vocabulary, self.conditions = vocabulary, conditions
        kind = vocabulary.family_of[tokens]
        end = len(tokens) - 1  # EOS
        bars = np.flatnonzero(kind == Family.BAR)
        self._instrument_at = instruments = np.flatnonzero(kind == Family.INSTRUMENT)
        bounds = np.sort(np.concatenate((bars, instruments, [end])))
        bar_end = bounds[np.searchsorted(bounds, bars, side="right")]
        self.num_bars = num_bars = int(np.searchsorted(bars, instruments[0] if len(instruments) else end))
        self.num_tracks = num_tracks = len(instruments)

        # The head: controls of the stream, less the two that each window decides for itself.
        conductor_at = int(np.flatnonzero(kind == Family.CONDUCTOR)[0])
        head = kind[1:conductor_at]
        self._controls = tokens[1:conductor_at][(head != Family.PIECE_BEGIN) & (head != Family.PIECE_END)]

        # The conductor: (num_bars + 1,) token positions; which bars say meter and tempo, and what is in force.
        self._conductor = np.concatenate((bars[:num_bars], bar_end[num_bars - 1 : num_bars]))
        self._meter, says_meter = self._in_force(kind, Family.METER)
        self._tempo, says_tempo = self._in_force(kind, Family.TEMPO)
        self._restated = 2 - says_meter.astype(np.int64) - says_tempo

        # The tracks: tokens of each (track, bar), added up along the bars.
        position, stop = bars[num_bars:], bar_end[num_bars:]
        track = np.searchsorted(instruments, position) - 1
        first = np.searchsorted(position, instruments)
        bar = np.arange(len(position)) - first[track]
        onsets = np.concatenate(([0], np.cumsum(kind == Family.TIME)))
        sounding = np.zeros((num_tracks, num_bars), dtype=bool)
        sounding[track, bar] = onsets[stop] > onsets[position]
        length = np.zeros((num_tracks, num_bars), dtype=np.int64)
        length[track, bar] = stop - position
        # At least one BAR follows every INSTRUMENT: the grammar has no empty track.
        self._head = position[first] - instruments if num_tracks else np.zeros(0, dtype=np.int64)
        self._tokens_before = _running_sum(length)  # (tracks, num_bars + 1)
        self._segments_before = _running_sum(sounding.sum(axis=0)[None])[0]  # (num_bars + 1,)
        # (tracks, num_bars + 1): one past the last sounding bar before each bar line, 0 if there is none
        last = np.where(sounding, np.arange(1, num_bars + 1), 0)
        self._played_until = np.maximum.accumulate(np.pad(last, ((0, 0), (1, 0))), axis=1)
        self._count_conditions()

    def _count_conditions(self) -> None:
        """Tokens of the conditions: of the whole piece, of each track, up to each bar line, and to restate a chord."""
        track, bar, onset, _ = self.conditions.T
        self._said_of_piece = int(np.count_nonzero((track < 0) & (bar < 0)))
        self._said_of_track = np.bincount(track[track >= 0], minlength=self.num_tracks)
        in_bar = (track < 0) & (bar >= 0)
        is_chord = onset[in_bar] >= 0
        self._said_before = _running_sum(np.bincount(bar[in_bar], 1 + is_chord, self.num_bars)[None])[0]
        chords = np.bincount(bar[onset >= 0], minlength=self.num_bars)
        in_force = np.concatenate(([0], np.cumsum(chords)[:-1])) > 0
        begins = np.bincount(bar[onset == 0], minlength=self.num_bars) > 0
        self._chord_restated = 2 * (in_force & ~begins)

    def _in_force(self, kind: np.ndarray, family: Family) -> tuple[np.ndarray, np.ndarray]:
        """(num_bars,) token of the family in force in each bar, and whether the bar itself says it."""
        at = np.flatnonzero(kind[: self._conductor[-1]] == family)
        bar = np.searchsorted(self._conductor, at) - 1
        says = np.zeros(self.num_bars, dtype=bool)
        says[bar] = True
        return self.tokens[at][np.cumsum(says) - 1], says

    def cost(self, first: int, last: int) -> tuple[int, int]:
        """Tokens and segments of the window [first, last), exactly."""
        until = self._played_until[:, last]
        playing = until > first
        rows = np.flatnonzero(playing)
        tracks = self._tokens_before[rows, until[rows]] - self._tokens_before[rows, first] + self._head[rows]
        head = 3 + len(self._controls) + (first == 0) + (last == self.num_bars)  # BOS, CONDUCTOR, EOS
        conductor = self._conductor[last] - self._conductor[first] + self._restated[first]
        segments = self._segments_before[last] - self._segments_before[first]
        said = self._said_of_piece + self._said_before[last] - self._said_before[first] + self._chord_restated[first]
        return int(head + conductor + tracks.sum() + said + self._said_of_track[rows].sum()), int(segments)

    def layout(self, first: int, last: int) -> tuple[int, int]:
        """Tracks of the window, and how many BARs they write together."""
        written = self._played_until[:, last] - first
        return int((written > 0).sum()), int(written[written > 0].sum())

    def window(self, first: int, last: int) -> np.ndarray:
        """(T,) uint16: the stream of bars [first, last); a copy."""
        v = self.vocabulary
        if not 0 <= first < last <= self.num_bars:
            raise ValueError(f"bars [{first}, {last}) of a piece with {self.num_bars}")
        marks = [v.PIECE_BEGIN] * (first == 0) + [v.PIECE_END] * (last == self.num_bars)
        conductor = self.tokens[self._conductor[first] : self._conductor[last]]
        bar = self.tokens[self._conductor[first] : self._conductor[first + 1]]
        kind = v.family_of[bar]
        is_control = (kind >= Family.PIECE_BEGIN) & (kind != Family.CHORD)
        head = 1 + int(is_control.sum())  # BAR and its controls come first
        said = int(((kind == Family.METER) | (kind == Family.TEMPO)).sum())
        parts = [[v.BOS, *marks], self._controls, [v.CONDUCTOR], bar[:head]]
        parts += [[self._meter[first], self._tempo[first]], conductor[head + said :]]
        until = self._played_until[:, last]
        playing = np.flatnonzero(until > first)
        for track in playing:
            start = self._instrument_at[track]
            notes = start + self._head[track]
            parts.append(self.tokens[start:notes])
            begin, end = self._tokens_before[track, first], self._tokens_before[track, until[track]]
            parts.append(self.tokens[notes + begin : notes + end])
        parts.append([v.EOS])
        tokens = np.concatenate(parts).astype(np.uint16)
        if not len(self.conditions):
            return tokens
        return insert(tokens, rows_in_window(self.conditions, first, last, playing), v)

    def furthest(self, first: int, max_tokens: int, max_segments: int) -> int:
        """The last bar line to which a window from `first` fits both budgets; `first` if one bar does not."""
        low, high = first, self.num_bars
        while low < high:  # cost never falls as the window grows
            middle = (low + high + 1) // 2
            tokens, segments = self.cost(first, middle)
            if tokens <= max_tokens and segments <= max_segments:
                low = middle
            else:
                high = middle - 1
        return low


def _running_sum(values: np.ndarray) -> np.ndarray:
    """(rows, n + 1) sums of the first 0..n columns."""
    return np.pad(np.cumsum(values, axis=1, dtype=np.int64), ((0, 0), (1, 0)))


def cut(
    table: PieceTable,
    max_tokens: int,
    max_segments: int,
    budget: Callable[[int], int] | None = None,
    first_share: float = 1.0,
) -> tuple[list[tuple[int, int]], Counter]:
    """Windows that tile a piece's bars in order, and the bars left out because one alone is over a budget.

    `budget(k)`, at most max_tokens, is what the k-th window should stay within (room for what it will grow by); a
    single bar may use all of max_tokens. `first_share` in (0, 1] makes the first window smaller, which moves every
    later cut: draw it anew each epoch. A piece that fits whole is one window.
    """
    budget = budget or (lambda _: max_tokens)
    windows: list[tuple[int, int]] = []
    skipped: Counter = Counter()
    whole_tokens, whole_segments = table.cost(0, table.num_bars)
    if whole_tokens <= budget(0) and whole_segments <= max_segments:
        return [(0, table.num_bars)], skipped
    first = 0
    while first < table.num_bars:
        room = budget(len(windows))
        share = first_share if not windows else 1.0
        last = table.furthest(first, int(room * share), max(1, int(max_segments * share)))
        if last == first:
            last = first + 1
            tokens, segments = table.cost(first, last)
            if tokens > max_tokens or segments > max_segments:
                skipped[BAR_TOO_LONG if tokens > max_tokens else BAR_TOO_MANY] += 1
                first = last
                continue
        windows.append((first, last))
        first = last
    return windows, skipped
