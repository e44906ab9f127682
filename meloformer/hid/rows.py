"""Rows: several annotated streams side by side, padded to one static shape. What a model reads.

`make_row(documents, vocabulary, max_seq_len=N, max_segments=M)` returns a dict of int32 arrays: TOKEN_FIELDS of
shape (N,), SEGMENT_FIELDS of shape (M,). `stack_rows` makes a batch (B, N), (B, M) of several. Without N and M a row is
as large as its documents.

>>> v = Vocabulary()
>>> row = make_row([np.array([v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.EOS])], v, 8, 4)
>>> row["document"].tolist(), row["targets"].tolist()[:2] == [v.CONDUCTOR, v.BAR]
([0, 0, 0, 0, 0, 0, -1, -1], True)

The surprise: `segment` and `onset` are numbered through the row, `position`, `track`, `bar` and `time` within a
document. A target of -1 carries no loss: padding, what follows EOS, MASK, and conditions, which are given unless
they are named in `predicted`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from meloformer.hid.annotate import Annotations, annotate, find_segments
from meloformer.hid.vocabulary import Family, Vocabulary

TOKEN_FIELDS = ("tokens", "targets", "document", "position", *Annotations._fields)
SEGMENT_FIELDS = tuple(
    f"segment_{name}" for name in ("document", "start", "end", "bar", "track", "instrument", "ordinal", "time")
)
NO_TARGET = -1
_GIVEN = np.zeros(len(Family), dtype=bool)  # families that are never predicted
_GIVEN[[Family.PAD, Family.BOS, Family.MASK, *range(Family.PIECE_BEGIN, len(Family))]] = True


def next_tokens(
    tokens: np.ndarray, annotations: Annotations, predicted: Collection[Family] = frozenset()
) -> np.ndarray:
    """(T,) int32 target at each position: the next token, or NO_TARGET where it is given and not predicted.

    `predicted`: families of conditions that the model is to write itself. A T of the conductor belongs to the chord
    behind it and is given, or predicted, with it.
    """
    kind = annotations.type
    given = _GIVEN.copy()
    given[list(predicted)] = False
    given = given[kind] | ((kind == Family.TIME) & (annotations.track < 0) & (Family.CHORD not in predicted))
    targets = np.full(len(tokens), NO_TARGET, dtype=np.int32)
    targets[:-1] = np.where(given[1:], NO_TARGET, tokens[1:].astype(np.int32))
    return targets


def make_row(
    documents: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    max_seq_len: int | None = None,
    max_segments: int | None = None,
    predicted: Collection[Family] = frozenset(),
) -> dict[str, np.ndarray]:
    """One row; ValueError where the documents do not fit. An empty list gives a row of padding.

    max_seq_len and max_segments: room for tokens and segments, None for as many as there are. `predicted`: see
    `next_tokens`.
    """
    about = [annotate(tokens, vocabulary) for tokens in documents]
    if max_seq_len is None:
        max_seq_len = sum(map(len, documents))
    if max_segments is None:
        max_segments = sum(int(a.segment.max(initial=-1)) + 1 for a in about)
    row = {name: np.full(max_seq_len, -1, dtype=np.int32) for name in TOKEN_FIELDS}
    row.update({name: np.full(max_segments, -1, dtype=np.int32) for name in SEGMENT_FIELDS})
    row["tokens"][:] = vocabulary.PAD
    row["type"][:] = Family.PAD
    for name in ("position", "time"):
        row[name][:] = 0
    start = first_segment = first_onset = 0
    for number, (tokens, a) in enumerate(zip(documents, about)):
        segments = find_segments(a)
        stop, last_segment = start + len(tokens), first_segment + len(segments.start)
        if stop > max_seq_len or last_segment > max_segments:
            raise ValueError(
                f"documents need at least {stop} tokens and {last_segment} segments, "
                f"the row holds {max_seq_len} and {max_segments}"
            )
        here = slice(start, stop)
        row["tokens"][here] = tokens
        row["targets"][here] = next_tokens(tokens, a, predicted)
        row["document"][here] = number
        row["position"][here] = np.arange(len(tokens))
        for name, values in a._asdict().items():
            row[name][here] = values
        row["segment"][here] += np.where(a.segment >= 0, first_segment, 0).astype(np.int32)
        row["onset"][here] += np.where(a.onset >= 0, first_onset, 0).astype(np.int32)
        row["segment_document"][first_segment:last_segment] = number
        for name, values in segments._asdict().items():
            row[f"segment_{name}"][first_segment:last_segment] = values
        start, first_segment = stop, last_segment
        first_onset += int(a.onset.max(initial=-1)) + 1
    return row


def stack_rows(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A batch: every field stacked along a new first axis."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
