"""What becomes of one MIDI file: its tokens with all that a corpus stores of them, or the reason why not.

>>> encode = Encoder(PreprocessConfig(input="midi", output="processed"))
>>> encode(Source("gone.mid", "gone.mid"))
Rejected(name='gone.mid', reason='unreadable', detail='cannot be read (No such file or directory); check the path')

The surprise: it never raises for what a file holds, with one exception: MemoryError, because a file that does not fit
beside others may fit alone, and only the pool knows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from meloformer.config import PreprocessConfig
from meloformer.data.clusters import bar_shingles
from meloformer.data.shards import MAX_BARS, MAX_TRACKS, NO_CONDITIONS, SHARD_DTYPES, Piece, content_hash
from meloformer.data.sources import Source
from meloformer.hid import Tokenizer, Vocabulary
from meloformer.hid.conditions import derive
from meloformer.midi import MidiError, read_score

UNREADABLE, UNENCODABLE, CRASHED = "unreadable", "unencodable", "internal_error"
FEW_NOTES, FEW_BARS, MANY_BARS, MANY_TRACKS = "few_notes", "few_bars", "many_bars", "many_tracks"


class Rejected(NamedTuple):
    name: str
    reason: str
    detail: str


class Encoded(NamedTuple):
    piece: Piece
    num_bars: int
    num_notes: int
    num_track_bars: int
    instruments: np.ndarray  # (tracks,)
    seconds: float
    content: int
    shingles: np.ndarray

    def __reduce__(self):
        # From worker to parent arrays go as bytes, which takes a fifth of the time.
        return _unpacked, tuple(_packed(value) for value in (*self.piece, *self[1:]))


def _packed(value):
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def _unpacked(*values) -> Encoded:
    values = [np.frombuffer(v[2], v[0]).reshape(v[1]) if isinstance(v, tuple) else v for v in values]
    return Encoded(Piece(*values[: len(Piece._fields)]), *values[len(Piece._fields) :])


class Encoder:
    """Turns a `Source` into `Encoded` or `Rejected`."""

    def __init__(self, config: PreprocessConfig):
        self.config = config
        self.tokenizer = Tokenizer(Vocabulary(config.resolution))

    def __call__(self, source: Source) -> Encoded | Rejected:
        try:
            return self._encode(source)
        except MemoryError:
            raise
        except Exception as error:
            # A file that no rule foresaw must not end a run of days; the line names it, so that it becomes a rule.
            return Rejected(source.name, CRASHED, f"{type(error).__name__}: {error}")

    def _encode(self, source: Source) -> Encoded | Rejected:
        name, config = source.name, self.config
        step = UNREADABLE
        try:
            score = read_score(source.path, config.sustain_pedal)
            step = UNENCODABLE
            encoding = self.tokenizer.encode_fully(score)
        except MidiError as error:
            return Rejected(name, step, str(error).removeprefix(f"{source.path}: "))
        tokens, grid = encoding.tokens, encoding.score
        num_notes, num_bars, instruments = grid.num_notes, grid.num_bars, grid.instruments
        for bad, reason, detail in (
            (num_notes < config.min_notes, FEW_NOTES, f"{num_notes} notes, min_notes is {config.min_notes}"),
            (num_bars < config.min_bars, FEW_BARS, f"{num_bars} bars, min_bars is {config.min_bars}"),
            (num_bars > config.max_bars, MANY_BARS, f"{num_bars} bars, max_bars is {config.max_bars}"),
            (num_bars > MAX_BARS, MANY_BARS, f"{num_bars} bars, a shard holds {MAX_BARS}"),
            (len(instruments) > MAX_TRACKS, MANY_TRACKS, f"{len(instruments)} tracks, a shard holds {MAX_TRACKS}"),
        ):
            if bad:
                return Rejected(name, reason, detail)
        segments = {
            "segment_offset": encoding.segment_start,
            "segment_bar": encoding.segment_bar,
            "segment_track": encoding.segment_track,
            "segment_instrument": instruments[encoding.segment_track],
        }
        # in the shard's own types here already: less to hand over, and less for the writer to do
        segments = {column: values.astype(SHARD_DTYPES[column]) for column, values in segments.items()}
        conditions = NO_CONDITIONS
        if config.conditions:
            conditions = derive(grid, source.tag, encoding.polyphony).rows(self.tokenizer.vocabulary)
        return Encoded(
            Piece(name, tokens, **segments, changes=dict(grid.counts), conditions=conditions),
            num_bars,
            num_notes,
            encoding.num_track_bars,
            instruments,
            float(score.seconds_at(score.end_tick)),
            content_hash(tokens),
            bar_shingles(encoding),
        )
