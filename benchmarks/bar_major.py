"""The rows of a plan in bar-major order: all instruments of bar 1, then all of bar 2; for the ablation alone.

    python -m benchmarks.ablation --variants bar_sparse,bar_major ...

In: a HID stream, which is track-major. Out: the same tokens in another order, with their annotations: the conductor
and every INSTRUMENT first, then for each bar of the conductor one BAR of each track, in order, with its notes. A track
that has fallen silent gets its trailing empty BARs back, so the order still says whose bar it is and nothing is lost.

The surprise: nothing but rows is needed. The attention rule reads bars, instruments and positions, and segments stay
unbroken runs of the stream.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from meloformer.data import Corpus, Document, RowPlan
from meloformer.data.windows import PieceTable
from meloformer.hid import Family, Vocabulary
from meloformer.hid.rows import NO_TARGET, make_row

ROUND = 128


def bar_major(tokens: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """(T,) a stream without MASK -> the stream with its trailing empty BARs written, and the order that makes it
    bar-major.

    >>> v = Vocabulary()
    >>> note = [v.time(0), v.pitch(60), v.duration(24), v.velocity(90)]
    >>> head = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.BAR]
    >>> piece = [*head, v.instrument(0), v.BAR, *note, v.instrument(33), v.BAR, *note, v.BAR, *note, v.EOS]
    >>> full, order = bar_major(np.array(piece), v)
    >>> [v.name(token).split("_")[0] for token in full[order][6:]]
    ... # doctest: +NORMALIZE_WHITESPACE
    ['INSTRUMENT', 'INSTRUMENT', 'BAR', 'T', 'P', 'L', 'V', 'BAR', 'T', 'P', 'L', 'V',
     'BAR', 'BAR', 'T', 'P', 'L', 'V', 'EOS']
    """
    kind = vocabulary.family_of[tokens]
    starts = np.flatnonzero(kind == Family.INSTRUMENT)
    end = len(tokens) - 1
    first = int(starts[0]) if len(starts) else end
    num_bars = int((kind[:first] == Family.BAR).sum())
    parts, track, bar = [tokens[:first]], [np.full(first, -1)], [np.full(first, -1)]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], end])):
        bars = np.cumsum(kind[start:stop] == Family.BAR)
        missing = num_bars - int(bars[-1])
        parts += [tokens[start:stop], np.full(missing, vocabulary.BAR, dtype=tokens.dtype)]
        track.append(np.full(stop - start + missing, number))
        bar += [bars - 1, np.arange(num_bars - missing, num_bars)]
    full = np.concatenate([*parts, tokens[-1:]])
    track, bar = np.concatenate([*track, [len(starts)]]), np.concatenate([*bar, [num_bars]])
    return full, np.lexsort((np.arange(len(full)), track, bar))


def reorder(row: dict[str, np.ndarray], orders: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The row with each document's tokens in its order; targets and the places of segments follow."""
    lengths = [len(order) for order in orders]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(int)
    padding = np.arange(offsets[-1], len(row["tokens"]))
    whole = np.concatenate([*(order + offset for order, offset in zip(orders, offsets)), padding])
    segments = {name: values for name, values in row.items() if name.startswith("segment_")}
    out = {name: values if name in segments else values[whole] for name, values in row.items()}
    out["position"] = row["position"]
    # What is never predicted stays so; what follows each token is another.
    given = np.ones(len(whole), dtype=bool)
    given[1:] = row["targets"][:-1] == NO_TARGET  # by the old place
    given = given[whole]
    out["targets"] = np.full_like(row["targets"], NO_TARGET)
    inside = np.flatnonzero((out["document"][:-1] == out["document"][1:]) & (out["document"][:-1] >= 0))
    out["targets"][inside] = np.where(given[inside + 1], NO_TARGET, out["tokens"][inside + 1])
    for i, order in enumerate(orders):
        place = np.argsort(order)
        mine = row["segment_document"] == i
        for name in ("segment_start", "segment_end"):
            out[name] = out[name].copy()
            out[name][mine] = place[row[name][mine]]
    return out


class BarMajorPlan(RowPlan):
    """A `RowPlan` of the same windows in the same rows; rows are longer by the empty BARs that they need at most."""

    def __init__(self, corpus: Corpus, *arguments, **named):
        super().__init__(corpus, *arguments, **named)
        table = lru_cache(1)(lambda piece: PieceTable(corpus.piece(piece), corpus.vocabulary))
        extra = np.zeros(len(self.windows), dtype=np.int64)
        for i in np.argsort(self.windows["piece"], kind="stable"):  # each piece's table is made once
            piece, first, last = (int(self.windows[name][i]) for name in ("piece", "first_bar", "last_bar"))
            tracks, written = table(piece).layout(first, last)
            extra[i] = tracks * (last - first) - written
        starts = [self.window_range(row) for row in range(self.num_rows)]
        most = max((int(extra[a:b].sum()) for a, b in starts), default=0)
        self.length = -(-(self.data.max_seq_len + most) // ROUND) * ROUND

    def row(self, row: int) -> tuple[dict[str, np.ndarray], list[Document]]:
        pairs = [self.document(window) for window in range(*self.window_range(row))]
        streams = [bar_major(tokens, self.corpus.vocabulary) for tokens, _ in pairs]
        documents = [full for full, _ in streams]
        arrays = make_row(documents, self.corpus.vocabulary, self.length, self.data.max_segments)
        return reorder(arrays, [order for _, order in streams]), [document for _, document in pairs]

    def empty_row(self) -> dict[str, np.ndarray]:
        return make_row([], self.corpus.vocabulary, self.length, self.data.max_segments)
