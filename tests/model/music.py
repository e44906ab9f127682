"""Streams, rows and small models for the tests of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from meloformer.config import ModelConfig
from meloformer.hid import Family, StreamState, Tokenizer, annotate
from meloformer.hid.rows import make_row, stack_rows
from meloformer.midi import Score, read_score
from meloformer.model import MeloFormer
from tests.hid.streams import VOCABULARY, random_stream
from tests.midi.real_files import midi_files

TINY = {"backend": "dense", "size": "small", "n_layer": 3, "n_head": 2, "d_model": 32, "d_ff": 48}


def tiny_model(**config) -> MeloFormer:
    """Three small layers, as they are initialised: every branch is open, so all that a token sees moves its logits."""
    torch.manual_seed(0)
    return MeloFormer(ModelConfig(**{**TINY, **config}), VOCABULARY).eval()


def rich_stream(seed: int, max_length: int = 150) -> np.ndarray:
    """A random valid stream with two tracks, four segments and, for odd seeds, a fill, at least."""
    for attempt in range(1000 * seed, 1000 * seed + 1000):
        tokens = random_stream(attempt, max_length, tracks=True)
        a = annotate(tokens, VOCABULARY)
        if a.track.max() >= 1 and a.segment.max() >= 3 and (seed % 2 == 0 or (a.type == Family.FILL).any()):
            return tokens
    raise AssertionError(f"no such stream of {max_length} tokens")


def batch_of(*rows: list[np.ndarray], max_seq_len: int = 0, max_segments: int = 0) -> dict[str, np.ndarray]:
    """Each row a list of documents, padded to the longest or to the given size."""
    n = max_seq_len or max(sum(map(len, documents)) for documents in rows)
    m = max_segments or max(sum(int((d == VOCABULARY.BAR).sum()) for d in documents) for documents in rows)
    return stack_rows([make_row(documents, VOCABULARY, n, m) for documents in rows])


def first_bars(score: Score, num_bars: int) -> Score:
    """The beginning of a quantized score."""
    num_bars = min(num_bars, score.num_bars)
    end = score.bar_lines()[num_bars]
    notes = score.notes[score.notes["onset"] < end].copy()
    kept, notes["track"] = np.unique(notes["track"], return_inverse=True)
    return replace(
        score,
        tracks=[score.tracks[i] for i in kept],
        notes=notes,
        meters=score.meters[score.meters["tick"] < end],
        tempos=score.tempos[score.tempos["tick"] < end],
        num_bars=num_bars,
        controls=[],
    )


def real_streams(folder: Path, count: int = 2, max_length: int = 700) -> list[np.ndarray]:
    """Beginnings of real pieces in which two tracks at least share an instrument."""
    tokenizer, found = Tokenizer(VOCABULARY), []
    for path in midi_files(folder):
        if path.stat().st_size > 60_000 or "awkward" in path.parts:
            continue
        score = tokenizer.quantize(read_score(path))
        for num_bars in (8, 4, 2):
            part = first_bars(score, num_bars)
            if len(part.tracks) < 3 or len(set(part.instruments.tolist())) == len(part.tracks):
                break
            tokens = tokenizer.encode(part)
            if len(tokens) <= max_length:
                found.append(tokens)
                break
        if len(found) == count:
            break
    assert len(found) == count, "the folder of real MIDI has no pieces with two tracks of one instrument"
    return found


def with_deferred_bars(tokens: np.ndarray, rng: np.random.Generator, share: float = 0.4) -> np.ndarray:
    """The stream with a random share of its cells deferred."""
    tokenizer = Tokenizer(VOCABULARY)
    a = tokenizer.annotate(tokens)
    cells = [(t, b) for t in range(a.track.max() + 1) for b in range(a.bar.max() + 1) if rng.random() < share]
    return tokenizer.defer(tokens, cells)


def another_tail(tokens: np.ndarray, start: int, rng: np.random.Generator, max_length: int) -> np.ndarray:
    """A valid stream that agrees with `tokens` before `start`, and, where the grammar leaves a choice, not there."""
    state = StreamState(VOCABULARY)
    for token in tokens[:start].tolist():
        state.push(token)
    out = tokens[:start].tolist()
    while not state.is_finished:
        allowed = state.allowed()
        if len(out) == start and allowed.sum() > 1:
            allowed[tokens[start]] = False
        families = np.unique(VOCABULARY.family_of[allowed])
        family = rng.choice(families)
        if len(out) + state.closing_length() >= max_length - 4:
            order = "EOS FILL VELOCITY DURATION PITCH CHORD TIME TEMPO METER INSTRUMENT BAR CONDUCTOR"
            family = next(Family[name] for name in order.split() if Family[name] in families)
        choices = np.flatnonzero(allowed & (VOCABULARY.family_of == family))
        # the lower third of what may follow: times and pitches must leave room for more
        token = int(choices[rng.integers(0, len(choices) // 3 + 1)])
        state.push(token)
        out.append(token)
    return np.array(out, dtype=np.uint16)
