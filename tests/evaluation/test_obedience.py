"""Obedience: real music keeps to what it is, other music does not, and a model that obeys nothing closes no gap."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from meloformer.command_config import EvaluateConfig
from meloformer.config import DataConfig, ModelConfig, PreprocessConfig
from meloformer.data import Corpus
from meloformer.data.preprocess import preprocess
from meloformer.errors import UserError
from meloformer.evaluation.command import run
from meloformer.evaluation.obedience import Window, compare, draw_windows, half_chords, measure, report
from meloformer.generation.request import ConstrainedState
from meloformer.hid import Tokenizer
from meloformer.hid.conditions import chord_name, derive, insert
from meloformer.hid.controls import CONDITIONS
from meloformer.hid.tokenizer import reorder_tracks
from meloformer.midi import Score, Track, note_table, write_midi
from meloformer.midi.score import DRUMS
from meloformer.model import MeloFormer
from meloformer.training.loop import train
from tests.hid.streams import VOCABULARY
from tests.training.conftest import one_thread  # noqa: F401
from tests.training.small import small_config, write_corpus

KNOWN = [name for name in CONDITIONS if name != "tag"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(
        write_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("run") / "a", max_steps=1
    )


def window(roots: list[int], ends: bool, beats: int = 4) -> Window:
    """A bar of block chords a root and a bass an octave below; the last bar is one chord where the piece ends."""
    rows = []
    for bar, root in enumerate(roots):
        times = beats if not ends or bar + 1 < len(roots) else 1
        for beat in range(times):
            rows += [(0, 96 * bar + 96 // beats * beat, 20, 60 + root + step, 80) for step in (0, 4, 7)]
            rows.append((1, 96 * bar + 96 // beats * beat, 20, 36 + root, 80))
    score = Tokenizer(VOCABULARY).quantize(Score(24, [Track(0), Track(33)], note_table(rows)))
    return Window(score, derive(score), True, ends)


def test_real_music_is_what_it_says_of_itself():
    windows = [window([0, 5, 7, 0], True), window([6, 11, 1, 6], False, beats=2), window([3, 8, 10, 3], True)]
    assert [chord_name(c) for c in half_chords(windows[0].conditions, windows[0].score)[:, 0]] == ["C", "F", "G", "C"]
    endings = {True: [windows[0].score], False: [windows[1].score]}
    table = compare([[w.score, w.score] for w in windows], windows, KNOWN, endings)
    assert set(table) == {"key", "chords", "density", "bar_density", "track_density", "polyphony", "role", "end"}
    for name in ("key", "chords", "role"):
        assert table[name]["asked"] == table[name]["real"] == 1.0
    assert table["chords"]["shuffled"] < 0.5 and table["chords"]["share_of_gap"] == 1.0
    assert table["density"]["asked"] == 0 < table["density"]["shuffled"]
    assert (table["end"]["asked"], table["end"]["shuffled"], table["end"]["real_other"]) == (1.0, 0.0, 0.0)
    # the same pieces, each asked for what another is: nothing of the gap is closed
    turned = compare([[w.score] for w in windows], windows[1:] + windows[:1], KNOWN, {})
    assert turned["chords"]["asked"] < 0.5 and turned["density"]["asked"] > 0
    # what a model was not trained with is not in the table
    assert set(compare([[w.score] for w in windows], windows, ["key"], endings)) == {"key", "end"}


def test_a_window_asks_for_what_a_musician_could_type():
    real = window([0, 5, 7, 0], True)
    request = real.request(KNOWN)
    assert request.bars == 4 and request.meter == (4, 4) and request.instruments == [0, 33]
    assert request.steering.names() == KNOWN and request.steering.end
    state = ConstrainedState(VOCABULARY, request, 400)
    tokens = np.array([*state.forced_prefix()])
    text = Tokenizer(VOCABULARY).text(tokens)
    chords = [word for word in text.split() if word.startswith("CHORD")]
    assert chords == ["CHORD_C_maj", "CHORD_F_maj", "CHORD_G_maj", "CHORD_C_maj"]
    assert real.request([]).steering.names() == []


def test_windows_are_held_out_and_every_other_one_is_an_end(config):
    corpus = Corpus(config.data.data_dir)
    windows = draw_windows(corpus, config.data, 6, 300, 0, "validation")
    assert [w.ends for w in windows] == [True, False] * 3
    assert all(2 <= w.score.num_bars <= 8 for w in windows)
    again = draw_windows(corpus, config.data, 6, 300, 0, "validation")
    assert all(a.score == b.score for a, b in zip(windows, again))


def test_a_model_that_writes_what_is_asked_for_is_not_a_bin_off(tmp_path):
    """A low guitar is a bass to the encoder and sorts before program 34, which a request cannot know: it writes the
    bass first. Part by part, the bass's polyphony was then held against the guitar's."""
    rows = []
    for beat in range(48):
        rows += [(0, 480 * beat, 400, pitch, 80) for pitch in (30, 35, 40)]
        rows += [(1, 480 * beat, 400, 33, 80), (2, 480 * beat, 200, 38, 80)] if beat % 2 else []
    (tmp_path / "midi").mkdir()
    for seed in range(2):
        write_midi(Score(480, [Track(30), Track(34), Track(0, True)], note_table(rows)), tmp_path / f"midi/{seed}.mid")
        rows.append((0, 0, 100, 50 + seed, 80))
    preprocess(PreprocessConfig(input=str(tmp_path / "midi"), output=str(tmp_path / "shards")))
    corpus = Corpus(tmp_path / "shards")
    data = DataConfig(data_dir=str(tmp_path / "shards"), validation_fraction=0.5, max_seq_len=2000)
    piece = Tokenizer(corpus.vocabulary).decode(corpus.piece(0))
    assert piece.instruments.tolist() == [DRUMS, 30, 34]  # the encoder's order: the guitar is low
    windows = draw_windows(corpus, data, 2, 2000, 0, "train")
    samples = []
    for one in windows:
        places = one.score.instruments.tolist()
        written = [places.index(instrument) for instrument in one.request(KNOWN).ordered_instruments()]
        assert [places[i] for i in written] == [DRUMS, 34, 30]
        samples.append([reorder_tracks(one.score, np.array(written))])  # the very notes, in the order of the request
    table = compare(samples, windows, KNOWN, {})
    assert table["role"]["asked"] == 1 and table["polyphony"]["asked"] == table["track_density"]["asked"] == 0


def test_a_model_that_learnt_nothing_closes_no_gap(config):
    torch.manual_seed(0)
    corpus = Corpus(config.data.data_dir)
    model = MeloFormer(ModelConfig(**{**config.model.to_dict(), "dropout": 0.0}), corpus.vocabulary, 384).eval()
    with pytest.raises(UserError, match="trained without conditions"):
        measure(model, corpus, config.data, 2)
    model.conditions = ["key", "chords"]
    found = measure(model, corpus, config.data, 3)
    assert found["samples"] == 4 and found["windows"] == 2 and set(found["measures"]) == {"key", "chords", "end"}
    for row in found["measures"].values():
        assert 0 <= row["asked"] <= 1 and 0 <= row["shuffled"] <= 1
    assert abs(found["measures"]["chords"]["asked"] - found["measures"]["chords"]["shuffled"]) < 0.2
    table = report(found)
    assert "4 pieces" in table and "chords" in table and "of the gap" in table


@pytest.mark.parametrize("reads, share", [("the mark", (1.0, 0.0)), ("the densities of the bars", (0.0, 0.0))])
def test_an_ending_is_held_against_the_same_request_without_one(config, monkeypatch, reads, share):
    """A model that thins out because its last bar is asked to be thin heeds no mark of an end. With and without
    the mark it was given different windows' requests, the densities of bars among them, and so it seemed to."""
    corpus = Corpus(config.data.data_dir)
    model = MeloFormer(ModelConfig(**{**config.model.to_dict(), "dropout": 0.0}), corpus.vocabulary, 384).eval()
    model.conditions = ["key", "bar_density"]
    asked = []

    def obedient(model, request, count, *args, **kwargs):
        asked.append(request)
        s = request.steering
        thin = s.end if reads == "the mark" else bool(s.bar_density) and s.bar_density[-1] < s.bar_density[0]
        return [SimpleNamespace(score=window([0, 5, 7, 0], thin).score)] * count

    monkeypatch.setattr("meloformer.evaluation.obedience.generate", obedient)
    row = measure(model, corpus, config.data, 8)["measures"]["end"]
    assert (row["asked"], row["shuffled"]) == share
    told, marked, unmarked = asked[:4], asked[4:6], asked[6:]
    assert [r.steering.end for r in told] == [True, False] * 2 and all(r.steering.bar_density for r in told)
    for one, other in zip(marked, unmarked, strict=True):
        assert one.steering.end and not other.steering.end and one.steering.bar_density is None
        assert repr(replace(one.steering, end=False)) == repr(other.steering)


def test_evaluate_puts_it_into_its_file(config, capsys):
    train(config)
    folder = config.training.output_dir
    known = {"checkpoint": folder, "device": "cpu", "precision": "fp32"}
    with pytest.raises(UserError, match="--guidance weighs the conditions of --obedience"):
        EvaluateConfig(checkpoint="x", guidance=2.0).validate()
    assert set(MeloFormer.from_pretrained(folder).conditions) >= set(KNOWN)
    run(EvaluateConfig(**known, obedience=2, guidance=1.5))
    found = json.loads((Path(folder) / "evaluation.json").read_text())["obedience"]
    assert found["guidance"] == 1.5 and "of the gap" in capsys.readouterr().out
    run(EvaluateConfig(**known))
    assert "obedience" not in json.loads((Path(folder) / "evaluation.json").read_text())


def test_what_is_asked_for_reads_as_it_does_in_training(config):
    """The head of a real window with its conditions, as training writes it, is the prompt that the request makes."""
    corpus = Corpus(config.data.data_dir)
    tokenizer = Tokenizer(corpus.vocabulary)
    for real in draw_windows(corpus, config.data, 6, 300, 0, "train"):
        tokens = tokenizer.encode(real.score, order="given")  # with PIECE_BEGIN and PIECE_END, where they are true
        trained = insert(tokens, real.conditions.rows(corpus.vocabulary, KNOWN), corpus.vocabulary)
        prompt = ConstrainedState(corpus.vocabulary, real.request(KNOWN), 2000).forced_prefix()
        assert prompt == trained[: len(prompt)].tolist()
        assert prompt[-1] == corpus.vocabulary.BAR
