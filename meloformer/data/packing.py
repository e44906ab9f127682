"""The plan of an epoch: which windows of which pieces share a row, and in what order rows come.

`RowPlan(corpus, data, seed, epoch, split)` is a pure function of its arguments (the corpus through `corpus.hash`), so
every process can make it for itself, and a run resumes at any step without replaying anything. Step s of a run with G
rows a step takes rows [s G, (s + 1) G) of the plan.

>>> plan = RowPlan(corpus, config.data, seed=0, epoch=0, split="train")             # doctest: +SKIP
>>> plan.num_rows, plan.fill, plan.skipped                                          # doctest: +SKIP
(31, {'tokens': 0.97, 'segments': 0.7}, Counter({'piece_over_max_bars': 1}))
>>> row, documents = plan.row(0)                                                    # doctest: +SKIP

A row is the dict of (N,) and (M,) arrays that hid.rows.make_row returns; a Document says where one of its streams
comes from.

The surprise: deferring bars makes windows longer, and how much is known only once the cells are drawn. The plan draws
each window's kind and level of deferral from counters and reserves what it can grow by at most; rows are packed by
the reserved lengths, so a planned row always fits, and `fill` is the reserved share.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

import numpy as np

from meloformer.config import DataConfig
from meloformer.data.augment import Augmentation, Deferral, augment, deferred_share, draw_deferral, growth_bound
from meloformer.data.corpus import Corpus
from meloformer.data.draws import generator, key, mix, uniform
from meloformer.data.windows import BAR_TOO_LONG, BAR_TOO_MANY, PieceTable, cut
from meloformer.errors import UserError
from meloformer.hid import Tokenizer
from meloformer.hid.rows import make_row

Split = Literal["train", "validation"]
BLOCK = 1024  # windows packed together: more fills rows better, fewer mixes better and costs less
FULL_GROWTH = 1 / 6  # of a stream with every bar deferred: two tokens for each bar of about twelve
SHORTEST_FIRST_WINDOW = 1 / 8  # of a row: the first cut of an epoch lies anywhere from here to a whole row
PIECE_TOO_LONG = "piece_over_max_bars"
WINDOW_DTYPE = np.dtype(
    [
        ("piece", np.int64),
        ("ordinal", np.int32),  # of the window in its piece
        ("first_bar", np.int32),
        ("last_bar", np.int32),  # exclusive
        ("tokens", np.int32),  # reserved: what the window can have at most
        ("segments", np.int32),
        ("deferral", np.int8),
        ("level", np.float64),
    ]
)


class Document(NamedTuple):
    """Where one document of a row comes from: bars [first_bar, last_bar) of a piece, and what was done to them."""

    piece: int
    first_bar: int
    last_bar: int
    augmentation: Augmentation


def split_pieces(corpus: Corpus, data: DataConfig) -> tuple[dict[str, np.ndarray], Counter]:
    """Piece numbers of "train" and "validation", and how many were skipped, by reason.

    A cluster of near-duplicates lies on one side whole; its id alone decides, so it stays put as a corpus grows.
    """
    if corpus.num_pieces == 0:
        raise UserError(f"{corpus.path}: holds no pieces; preprocess some MIDI files first")
    short = corpus.index["num_bars"] <= data.max_bars
    skipped = Counter({PIECE_TOO_LONG: int((~short).sum())} if not short.all() else {})
    pieces = np.flatnonzero(short)
    if not len(pieces):
        raise UserError(f"data.max_bars is {data.max_bars}: every piece of {corpus.path} has more bars; raise it")
    clusters = corpus.index["cluster"][pieces]
    held_out = hold_out(clusters, data.validation_fraction, data.validation_seed, str(corpus.path))
    train = pieces[~held_out]
    if data.max_samples is not None:
        content = corpus.index["content_hash"][train]
        train = np.sort(train[mix(content).argsort(kind="stable")][: data.max_samples])
    return {"train": train, "validation": pieces[held_out]}, skipped


def hold_out(clusters: np.ndarray, fraction: float, seed: int, where: str) -> np.ndarray:
    """(pieces,) bool: about `fraction` of the clusters, whole, and at least one on either side; none for fraction 0."""
    place = uniform(seed, 0, "split", clusters)
    held_out = place < fraction
    if fraction > 0 and (held_out.all() or not held_out.any()):
        names, first = np.unique(clusters, return_index=True)
        if len(names) < 2:
            raise UserError(
                f"{where}: all pieces are near-duplicates of one another, so none can be held out; "
                "give more MIDI files, or --validation_fraction 0"
            )
        order = place[first].argsort(kind="stable")
        nearest = names[order[0] if not held_out.any() else order[-1]]
        held_out = (clusters == nearest) ^ held_out.all()
    return held_out


class RowPlan:
    """`num_rows`, `windows` (WINDOW_DTYPE, in row order), `skipped` (Counter), `fill` ({"tokens", "segments"}).

    The training split is shuffled and augmented anew each epoch, the validation split never; `augment=False` gives
    the training split as the validation split is given. `without`: numbers of pieces to leave out.
    """

    def __init__(
        self,
        corpus: Corpus,
        data: DataConfig,
        seed: int = 0,
        epoch: int = 0,
        split: Split = "train",
        augment: bool | None = None,
        without: np.ndarray | None = None,
    ):
        if split not in ("train", "validation"):
            raise ValueError(f"split is {split!r}, must be train or validation")
        self.corpus, self.data, self.split = corpus, data, split
        self.augmented = split == "train" if augment is None else augment
        # Without augmentation no draw depends on seed or epoch: validation is the same music in the same rows.
        self.seed, self.epoch = (seed, epoch) if self.augmented else (0, 0)
        self.tokenizer = Tokenizer(corpus.vocabulary)
        pieces, self.skipped = split_pieces(corpus, data)
        self.pieces = pieces[split] if without is None else np.setdiff1d(pieces[split], without)
        windows = self._windows()
        order, self._row_offsets = self._pack(windows)
        self.windows = windows[order]

    # --- windows ------------------------------------------------------------------------------------------------

    def _windows(self) -> np.ndarray:
        """Windows of every piece, piece by piece. Only pieces longer than a row are read."""
        data, index, pieces = self.data, self.corpus.index, self.pieces
        deferral, level = self._draw_deferral(pieces, np.zeros_like(pieces))
        # What a whole piece costs as a window: the index counts the stream without PIECE_BEGIN and PIECE_END.
        length = index["num_tokens"][pieces] + 2
        fits = (length <= self._budget(deferral, level)) & (index["num_segments"][pieces] <= data.max_segments)
        whole = np.zeros(int(fits.sum()), dtype=WINDOW_DTYPE)
        chosen = pieces[fits]
        whole["piece"], whole["last_bar"] = chosen, index["num_bars"][chosen]
        whole["tokens"], whole["segments"] = length[fits], index["num_segments"][chosen]
        whole["deferral"], whole["level"] = deferral[fits], level[fits]
        growth = growth_bound(
            whole["deferral"],
            whole["level"],
            index["num_tracks"][chosen],
            whole["last_bar"],
            index["num_track_bars"][chosen],
        )
        whole["tokens"] = np.minimum(whole["tokens"] + growth, data.max_seq_len)
        parts = [whole, *(self._cut(int(piece)) for piece in pieces[~fits])]
        windows = np.concatenate(parts)
        return windows[np.lexsort((windows["ordinal"], windows["piece"]))]

    def _cut(self, piece: int) -> np.ndarray:
        data = self.data
        table = PieceTable(self.corpus.piece(piece), self.corpus.vocabulary)
        share = 1.0
        if self.augmented:
            draw = float(uniform(self.seed, self.epoch, "first window", piece))
            share = SHORTEST_FIRST_WINDOW + (1 - SHORTEST_FIRST_WINDOW) * draw

        def budget(ordinal: int) -> int:
            return int(self._budget(*self._draw_deferral(np.array([piece]), np.array([ordinal])))[0])

        bars, skipped = cut(table, data.max_seq_len, data.max_segments, budget, share)
        self.skipped += skipped
        out = np.zeros(len(bars), dtype=WINDOW_DTYPE)
        out["piece"], out["ordinal"] = piece, np.arange(len(bars))
        out["deferral"], out["level"] = self._draw_deferral(out["piece"], out["ordinal"])
        for window, (first, last) in zip(out, bars):
            tokens, segments = table.cost(first, last)
            num_tracks, num_track_bars = table.layout(first, last)
            growth = growth_bound(window["deferral"], window["level"], num_tracks, last - first, num_track_bars)
            window["first_bar"], window["last_bar"] = first, last
            window["tokens"], window["segments"] = min(tokens + int(growth), data.max_seq_len), segments
        return out

    def _draw_deferral(self, piece: np.ndarray, ordinal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self.augmented:
            return np.zeros(len(piece), dtype=np.int8), np.zeros(len(piece))
        data = self.data
        probabilities = [
            data.defer_rectangle_probability,
            data.defer_continuation_probability,
            data.defer_track_probability,
            data.defer_scattered_probability,
        ]
        kind = draw_deferral(probabilities, uniform(self.seed, self.epoch, "deferral", piece, ordinal))
        return kind.astype(np.int8), uniform(self.seed, self.epoch, "deferral level", piece, ordinal)

    def _budget(self, deferral: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Tokens that a window may have before its bars are deferred."""
        return (self.data.max_seq_len / (1 + FULL_GROWTH * deferred_share(deferral, level))).astype(np.int64)

    # --- rows ---------------------------------------------------------------------------------------------------

    def _pack(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Order of the windows, and (num_rows + 1,) where each row begins in it."""
        order = np.arange(len(windows))
        if self.augmented:
            order = key(self.seed, self.epoch, "shuffle", windows["piece"], windows["ordinal"]).argsort(kind="stable")
        rows: list[list[int]] = []
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            rows += pack(windows, block, self.data.max_seq_len, self.data.max_segments)
        if self.augmented:
            shuffled = key(self.seed, self.epoch, "row", np.arange(len(rows))).argsort(kind="stable")
            rows = [rows[i] for i in shuffled]
        sizes = np.array([len(row) for row in rows], dtype=np.int64)
        flat = np.array([window for row in rows for window in row], dtype=np.int64)
        return flat, np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)

    @property
    def num_rows(self) -> int:
        return len(self._row_offsets) - 1

    @property
    def fill(self) -> dict[str, float]:
        """Reserved share of all rows' tokens and segments."""
        rows = max(self.num_rows, 1)
        return {
            "tokens": float(self.windows["tokens"].sum() / (rows * self.data.max_seq_len)),
            "segments": float(self.windows["segments"].sum() / (rows * self.data.max_segments)),
        }

    def window_range(self, row: int) -> tuple[int, int]:
        """Which entries of `windows` a row holds."""
        return int(self._row_offsets[row]), int(self._row_offsets[row + 1])

    def document(self, window: int) -> tuple[np.ndarray, Document]:
        """The stream of one entry of `windows`, augmented, and where it comes from."""
        entry = self.windows[window]
        piece, first, last = int(entry["piece"]), int(entry["first_bar"]), int(entry["last_bar"])
        tokens = PieceTable(self.corpus.piece(piece), self.corpus.vocabulary).window(first, last)
        done = Augmentation()
        if self.augmented:
            rng = generator(self.seed, self.epoch, "augment", piece, int(entry["ordinal"]))
            kind, level = Deferral(int(entry["deferral"])), float(entry["level"])
            tokens, done = augment(tokens, self.tokenizer, self.data, rng, kind, level, int(entry["tokens"]))
        return tokens, Document(piece, first, last, done)

    def row(self, row: int) -> tuple[dict[str, np.ndarray], list[Document]]:
        """One row in hid.make_row's form, and its documents' origins in order."""
        pairs = [self.document(window) for window in range(*self.window_range(row))]
        arrays = make_row(
            [tokens for tokens, _ in pairs], self.corpus.vocabulary, self.data.max_seq_len, self.data.max_segments
        )
        return arrays, [document for _, document in pairs]

    def empty_row(self) -> dict[str, np.ndarray]:
        """A row of padding."""
        return make_row([], self.corpus.vocabulary, self.data.max_seq_len, self.data.max_segments)

    def num_targets(self, batch: dict[str, np.ndarray]) -> int:
        """What a batch of such rows is divided by."""
        return num_targets(batch)


def num_targets(batch: dict[str, np.ndarray]) -> int:
    """Tokens of a batch that carry loss."""
    return int((batch["targets"] >= 0).sum())


def pack(windows: np.ndarray, order: np.ndarray, max_tokens: int, max_segments: int) -> list[list[int]]:
    """First fit, longest first: rows of window numbers, each within both budgets.

    >>> windows = np.zeros(3, dtype=WINDOW_DTYPE)
    >>> windows["tokens"] = [3, 6, 7]
    >>> pack(windows, np.arange(3), 10, 5)
    [[2, 0], [1]]
    """
    tokens, segments = windows["tokens"][order], windows["segments"][order]
    # A window may be near either budget; the tighter one says how large it is.
    size = np.maximum(tokens / max_tokens, segments / max_segments)
    rows: list[list[int]] = []
    free_tokens = np.full(len(order), max_tokens, dtype=np.int64)
    free_segments = np.full(len(order), max_segments, dtype=np.int64)
    for i in (-size).argsort(kind="stable"):
        fits = (free_tokens[: len(rows) + 1] >= tokens[i]) & (free_segments[: len(rows) + 1] >= segments[i])
        row = int(fits.argmax())  # the first; a new row fits always
        if row == len(rows):
            rows.append([])
        rows[row].append(int(order[i]))
        free_tokens[row] -= tokens[i]
        free_segments[row] -= segments[i]
    return rows


SKIP_REASONS = {
    PIECE_TOO_LONG: "pieces with more bars than max_bars",
    BAR_TOO_LONG: "bars that alone exceed max_seq_len",
    BAR_TOO_MANY: "bars that alone exceed max_segments",
}
