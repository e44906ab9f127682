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
from collections.abc import Collection
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from meloformer.config import DataConfig
from meloformer.data.augment import Augmentation, Deferral, augment, deferred_share, draw_deferral, growth_bound
from meloformer.data.corpus import Corpus
from meloformer.data.draws import generator, key, mix, uniform
from meloformer.data.shards import MAX_TRACKS, NO_CONDITIONS
from meloformer.data.windows import BAR_TOO_LONG, BAR_TOO_MANY, PieceTable, cut
from meloformer.errors import UserError
from meloformer.hid import Family, Tokenizer
from meloformer.hid.controls import CONDITIONS, TOKEN, TRACK
from meloformer.hid.rows import make_row

Split = Literal["train", "validation"]
OF_PIECE, OF_TRACKS = ("key", "tag", "density"), ("density", "polyphony", "role")  # one each, of what has conditions
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
    the training split as the validation split is given. With augmentation each condition (hid.controls.CONDITIONS) is
    given with its probability in `data`, those of a track apart from one another; without, those named in
    `conditions`, in windows that have room for all of `room`, so that plans of equal room hold the same music.
    Those of `data.predict_conditions` are targets with augmentation, and without where `predicts_them`. `without`:
    numbers of pieces to leave out.
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
        conditions: Collection[str] = (),
        room: Collection[str] = (),
        predicts_them: bool = False,
    ):
        if split not in ("train", "validation"):
            raise ValueError(f"split is {split!r}, must be train or validation")
        self.corpus, self.data, self.split = corpus, data, split
        self.augmented = split == "train" if augment is None else augment
        # Without augmentation no draw depends on seed or epoch: validation is the same music in the same rows.
        self.seed, self.epoch = (seed, epoch) if self.augmented else (0, 0)
        self.tokenizer = Tokenizer(corpus.vocabulary)
        predicted = data.predict_conditions or () if self.augmented or predicts_them else ()
        self._predicted = frozenset(CONDITIONS[name] for name in predicted)
        shares = {name: getattr(data, f"{name}_probability") for name in CONDITIONS}
        if not self.augmented:
            shares = {name: float(name in conditions) for name in CONDITIONS}
        self._given = shares if corpus.has_conditions else dict.fromkeys(CONDITIONS, 0.0)
        self._bare = data.bare_probability if self.augmented else 0.0
        self._room = {name: max(share, float(name in room)) for name, share in self._given.items()}
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
        length = index["num_tokens"][pieces] + 2 + self._most_conditions(pieces)
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
        table = self._table(piece, self._room)
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

    # --- conditions ---------------------------------------------------------------------------------------------

    def _is_given(self, share: np.ndarray | float, piece: np.ndarray | int, name: np.ndarray | int, track=-1):
        """Whether a condition is given, by the value of its family; of a track, or (-1) of the piece and its bars.

        Drawn anew each epoch, and the same for every window of a piece, so that what a window costs is known. Some
        pieces have none at all, and in half of them all tracks have a condition or none has it: alone, a coin for each
        of twenty tracks would never leave a stream bare, and bare or complete is what most streams are in use.
        """
        draw = partial(uniform, self.seed, self.epoch)
        together = draw("all tracks alike", piece, name) < 0.5
        coin = np.where((np.asarray(track) < 0) | ~together, np.asarray(track) + 1, MAX_TRACKS + 1)
        return (draw("no conditions", piece) >= self._bare) & (draw("condition", piece, name, coin) < share)

    def _most_conditions(self, piece: np.ndarray) -> np.ndarray:
        """(n,) tokens that the conditions of whole pieces take, or a few more: no piece is read for it."""
        index, room = self.corpus.index, self._room

        def given(name: str) -> np.ndarray:
            return self._is_given(room[name], piece, CONDITIONS[name])

        of_piece = sum(given(name).astype(np.int64) for name in OF_PIECE)
        of_bars = 2 * index["num_chords"][piece].astype(np.int64) * given("chords")
        of_bars += index["num_bars"][piece] * given("bar_density")
        return of_piece + of_bars + index["num_tracks"][piece] * sum(room[name] > 0 for name in OF_TRACKS)

    def _table(self, piece: int, shares: dict[str, float]) -> PieceTable:
        """The piece, with as many of its conditions as the shares give."""
        vocabulary = self.corpus.vocabulary
        conditions = NO_CONDITIONS
        if any(shares.values()):
            conditions = self.corpus.conditions(piece)
            family = vocabulary.family_of[conditions[:, TOKEN]].astype(np.int64)
            share = np.zeros(len(Family))
            share[list(CONDITIONS.values())] = [shares[name] for name in CONDITIONS]
            conditions = conditions[self._is_given(share[family], piece, family, conditions[:, TRACK])]
        return PieceTable(self.corpus.piece(piece), vocabulary, conditions)

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
        tokens = self._table(piece, self._given).window(first, last)
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
            [tokens for tokens, _ in pairs],
            self.corpus.vocabulary,
            self.data.max_seq_len,
            self.data.max_segments,
            self._predicted,
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
