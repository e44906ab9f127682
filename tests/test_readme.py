"""README's Python runs as it stands there; what it says of a rule of one's own is true."""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from meloformer.config import ModelConfig
from meloformer.generation import Request, generate
from meloformer.hid import Annotations, StreamState, Vocabulary
from meloformer.hid.controls import CONDITIONS
from meloformer.midi import read_score, write_midi
from meloformer.model import DecodingSession, MeloFormer
from tests.data.music import make_score
from tests.model.music import TINY, batch_of, rich_stream

README = Path(__file__).resolve().parent.parent / "README.md"


def python_blocks() -> list[str]:
    lines = README.read_text(encoding="utf-8").splitlines()
    indented = [
        textwrap.dedent("\n".join(block))
        for is_code, block in groupby(lines, key=lambda line: not line or line.startswith("    "))
        if is_code
    ]
    return [block.strip() for block in indented if block.strip().startswith("from meloformer")]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a model of every condition and a song."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MeloFormer(ModelConfig(**TINY), Vocabulary(), max_seq_len=600)
    model.conditions = list(CONDITIONS)
    model.save_pretrained(tmp_path / "runs" / "base")
    write_midi(make_score(0), tmp_path / "song.mid")
    return tmp_path


def test_the_python_of_the_readme_runs(here, capsys):
    generation, reading, pattern = python_blocks()
    exec(generation, {})
    assert read_score(here / "new.mid").num_notes

    names: dict = {}
    exec(reading, names)
    assert names["logits"].shape == (len(names["tokens"]), names["model"].vocabulary.size)
    assert capsys.readouterr().out.startswith("BOS CONDUCTOR BAR METER")
    tokenizer = names["tokenizer"]
    assert tokenizer.encode(read_score("same.mid"), "given").tolist() == names["tokens"].tolist()

    exec(pattern, names)
    assert names["AloneFormer"].from_pretrained("runs/base").logits(names["tokens"]).isfinite().all()


def test_a_rule_of_ones_own_holds_in_training_and_in_decoding(here):
    names: dict = {}
    exec(python_blocks()[2], names)
    alone, usual = (kind.from_pretrained("runs/base") for kind in (names["AloneFormer"], MeloFormer))
    tokens = rich_stream(1)
    with torch.no_grad():
        full, other = alone.logits(tokens), usual.logits(tokens)
        assert (full - other).abs().max() > 1e-3
        nats = [model.training_loss(batch_of([tokens]))[0].item() for model in (alone, usual)]
    assert nats[0] != nats[1]
    session, state = DecodingSession(alone, 1, len(tokens), len(tokens)), StreamState(alone.vocabulary)
    for i, token in enumerate(tokens.tolist()):
        logits = session.step(np.array([token]), Annotations(*np.array([state.push(token)]).T))
        torch.testing.assert_close(logits[0], full[i], atol=1e-4, rtol=0)
    assert generate(alone, Request(bars=1, instruments=[33]), max_length=60)[0].score.num_bars == 1
