"""The ablation's own parts: bar-major rows, both sides of a bar, equal parameters, the table; and one run, resumed."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import ablation
from benchmarks.ablation import PREDICTED, REFERENCE, VARIANTS, equal_parameters
from benchmarks.ablation_table import show, summarise
from benchmarks.bar_major import BarMajorPlan, bar_major
from benchmarks.both_sides import inner_cells, only_cells
from benchmarks.remi import batched, cut, remi_steps, rows_of
from meloformer.config import VISIBLE, DataConfig, ModelConfig
from meloformer.data import Corpus, RowPlan
from meloformer.errors import UserError
from meloformer.evaluation.by_piece import evaluate_pieces
from meloformer.evaluation.likelihood import evaluate_likelihood
from meloformer.hid import Family, Vocabulary, annotate
from meloformer.hid.controls import CONDITIONS
from meloformer.hid.deferral import defer
from meloformer.hid.rows import make_row
from meloformer.model import MeloFormer
from tests.training.small import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    torch.set_num_threads(1)
    return Corpus(write_corpus(tmp_path_factory.mktemp("corpus")))


def data_of(corpus) -> DataConfig:
    return DataConfig(data_dir=str(corpus.path), max_seq_len=384, validation_fraction=0.3)


def test_bar_major_rows_hold_the_same_music_in_bar_order(corpus):
    v, data = corpus.vocabulary, data_of(corpus)
    plain, moved = RowPlan(corpus, data, split="validation"), BarMajorPlan(corpus, data, split="validation")
    assert plain.num_rows == moved.num_rows and moved.length % 128 == 0
    notes = 0
    for number in range(plain.num_rows):
        (one, documents), (row, same) = plain.row(number), moved.row(number)
        assert [d[:3] for d in documents] == [d[:3] for d in same]
        assert len(row["tokens"]) == moved.length == len(moved.empty_row()["tokens"])
        for document in range(len(documents)):
            here, there = one["document"] == document, row["document"] == document
            tokens = row["tokens"][there]
            # Bars rise, and in a bar tracks rise: the order alone says whose each BAR is.
            inside = row["bar"][there] * 1000 + row["track"][there]
            body = np.flatnonzero((row["track"][there] >= 0) & (row["bar"][there] >= 0))
            assert (np.diff(inside[body]) >= 0).all()
            tracks = int((v.family_of[tokens] == Family.INSTRUMENT).sum())
            bars = int(((row["type"] == Family.BAR) & (row["track"] < 0))[there].sum())
            assert int(((row["type"] == Family.BAR) & (row["track"] >= 0))[there].sum()) == tracks * bars
            # Not a note is lost or changed, and each keeps its annotations.
            for name in ("tokens", "time", "instrument", "bar", "track"):
                pitches = (row["type"] == Family.PITCH) & there
                theirs = (one["type"] == Family.PITCH) & here
                order = np.lexsort((row["time"][pitches], row["track"][pitches]))
                assert sorted(row[name][pitches][order].tolist()) == sorted(one[name][theirs].tolist())
            notes += int(pitches.sum())
            # Targets are what comes next.
            assert row["targets"][there][2:-1].tolist() == tokens[3:].tolist()
            assert row["position"][there].tolist() == list(range(len(tokens)))
        # A segment is where its tokens are.
        for segment in np.flatnonzero(row["segment_document"] >= 0):
            start, end = row["segment_start"][segment], row["segment_end"][segment]
            mine = (row["document"] == row["segment_document"][segment]) & (row["position"] >= start)
            mine &= row["position"] <= end
            assert (row["segment"][mine] == segment).all() and mine.sum() == (row["segment"] == segment).sum()
            assert set(row["bar"][mine]) == {row["segment_bar"][segment]}
            assert set(row["track"][mine]) == {row["segment_track"][segment]}
    torch.manual_seed(0)
    model = MeloFormer(ModelConfig(size="small", n_layer=2, n_head=2, d_model=32, d_ff=48), v)
    assert evaluate_pieces(model, moved, 2)["notes"] == notes == evaluate_pieces(model, plain, 2)["notes"]


def test_bar_major_leaks_nothing(corpus):
    """Summaries and bars of other instruments are where leaks were; here the order of the stream is another one."""
    v = corpus.vocabulary
    plan = BarMajorPlan(corpus, data_of(corpus), split="validation")
    row, _ = plan.row(0)
    model = MeloFormer(ModelConfig(size="small", n_layer=2, n_head=2, d_model=32, d_ff=48), v).eval()
    batch = {name: values[None] for name, values in row.items()}
    with torch.no_grad():
        before = model(model.prepare(batch))[0]
        for at in (60, 150, 300):
            if row["type"][at] != Family.PITCH:
                at = int(np.flatnonzero(row["type"][at:] == Family.PITCH)[0]) + at
            changed = {name: values.copy() for name, values in batch.items()}
            changed["tokens"][0, at] += 1 if row["tokens"][at] < v.start(Family.PITCH) + 127 else -1
            after = model(model.prepare(changed))[0]
            first = int(np.flatnonzero(row["document"] == row["document"][at])[0])
            assert torch.equal(before[first:at], after[first:at]) and not torch.equal(before[at], after[at])


def test_trailing_bars_come_back_and_a_stream_without_tracks_stays():
    v = Vocabulary()
    empty = np.array([v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.EOS])
    full, order = bar_major(empty, v)
    assert np.array_equal(full[order], empty)


def test_both_sides_ask_for_the_same_notes(corpus):
    v, plan = corpus.vocabulary, RowPlan(corpus, data_of(corpus), split="validation")
    asked = 0
    for window in range(len(plan.windows)):
        tokens, _ = plan.document(window)
        cells = inner_cells(tokens, plan, np.random.default_rng(window))
        if not cells:
            continue
        asked += len(cells)
        wanted = []
        for in_fills, stream in ((False, tokens), (True, defer(tokens, cells, v))):
            row = only_cells(make_row([stream], v, 600, 80), cells, in_fills)
            targets = row["targets"][row["targets"] >= 0]
            if in_fills:  # targets of the fills alone: what stands behind the first FILL
                first = int(np.flatnonzero(row["type"] == Family.FILL)[0])
                assert np.flatnonzero(row["targets"] >= 0).min() >= first
            wanted.append(targets.tolist())
        assert wanted[0] == wanted[1] and len(wanted[0]) > 0
        a = annotate(tokens, v)
        for track, bar in cells:
            sounding = {int(b) for b in a.bar[(a.track == track) & (a.type == Family.PITCH)]}
            assert bar in sounding and min(sounding) < bar < max(sounding)
    assert asked > 5


def test_every_variant_has_the_reference_s_parameters():
    """Within one unit of d_ff: a few hundred of a million."""
    vocabulary = Vocabulary()
    reference = ModelConfig(size="small", n_layer=3, n_head=2, d_model=64, d_ff=200)
    target = MeloFormer(reference, vocabulary).num_parameters()
    for name, variant in VARIANTS.items():
        config = ModelConfig(size="small", n_layer=3, n_head=2, d_model=64, d_ff=200, **variant.model)
        config = equal_parameters(config, target, vocabulary)
        config.validate()
        assert abs(MeloFormer(config, vocabulary).num_parameters() / target - 1) < 2e-3, name


def test_pairs_read_on_what_is_predicted_are_the_default_but_for_durations():
    assert {**PREDICTED, "P": ["L"]} == VISIBLE


def test_the_table_says_means_spreads_and_differences_seed_by_seed():
    def run(variant, seed, value, **more):
        return {
            "variant": variant,
            "seed": seed,
            "test": {"nats_per_note": value, "by_piece": {"nats": [30 * value, 10 * value], "notes": [30, 10]}},
            "parameters": 7,
            "seconds": 1.0,
            "processor_seconds": 2.0,
            **more,
        }

    sides = {"in_place": 3.0, "both_sides": 2.0}
    results = [run(REFERENCE, 0, 5.0), run(REFERENCE, 1, 6.0), run("no_summaries", 0, 5.5), run("no_summaries", 1, 6.1)]
    results += [run("deferred", 0, 4.0, sides=sides), run("full_causal", 2, 9.0)]
    table = summarise(results, {name: variant.about for name, variant in VARIANTS.items()}, REFERENCE)
    assert table["no_summaries"]["mean"] == pytest.approx(5.8)
    assert table["no_summaries"]["difference"] == pytest.approx(0.3)
    assert table["no_summaries"]["difference_spread"] == pytest.approx(0.2 * 2**0.5)
    assert table["no_summaries"]["difference_interval"] == pytest.approx([0.3, 0.3]), "every piece differs by as much"
    assert table["full_causal"]["difference_interval"] is None
    assert table["full_causal"]["difference"] is None and table["deferred"]["spread"] is None
    text = show(table)
    assert "both sides 2.000" in text and text.splitlines()[1].startswith("deferred")


def test_a_finished_run_is_not_run_again(corpus, tmp_path, monkeypatch, capsys):
    def run(*more):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        ablation.main()
        return capsys.readouterr().out

    words = ["ablation", "--data_dir", str(corpus.path), "--output", str(tmp_path)]
    words += ["--variants", "full_causal,bar_major", "--seeds", "0", "--steps", "2", "--n_layer", "1", "--n_head", "2"]
    words += ["--d_model", "32", "--d_ff", "48", "--max_seq_len", "384", "--held_out", "0.2", "--eval_rows", "2"]
    words += ["--device", "cpu", "--precision", "fp32"]
    assert "full_causal, seed 0:" in run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["variants"]) == {"full_causal", "bar_major"}
    (tmp_path / "bar_major-0.json").unlink()
    planted = json.loads((tmp_path / "full_causal-0.json").read_text())
    planted["test"]["nats_per_note"] = 1.25
    (tmp_path / "full_causal-0.json").write_text(json.dumps(planted))
    again = run()
    assert "full_causal, seed 0:" not in again and "bar_major, seed 0:" in again
    table = json.loads((tmp_path / "results.json").read_text())["variants"]
    assert table["full_causal"]["mean"] == 1.25
    assert table["bar_major"]["mean"] == pytest.approx(results["variants"]["bar_major"]["mean"])
    with pytest.raises(UserError, match="other settings"):
        run("--learning_rate", "1e-3")
    with pytest.raises(UserError, match="no such variant"):
        run("--variants", "bar_spars")


def test_rows_of_another_tokenizer_ask_for_every_token_once():
    stream = np.arange(100, 123, dtype=np.int32)
    rows = list(rows_of(stream, 10))
    asked = np.concatenate([row["targets"][row["targets"] >= 0] for row in rows])
    assert asked.tolist() == stream[1:].tolist()
    for row in rows:
        inside = row["document"] == 0
        assert inside[row["targets"] >= 0].all(), "padding asks for nothing"
        assert row["position"][inside].tolist() == list(range(inside.sum()))
    v = Vocabulary()
    config = ModelConfig(size="small", n_layer=1, n_head=2, d_model=32, d_ff=48, pattern="full_causal", rotary_axes=1)
    result = evaluate_likelihood(MeloFormer(config, v).eval(), batched(rows, 2))
    assert result["tokens"] == 22


@pytest.mark.parametrize("start", [0, 1, 7, 13])
def test_wherever_a_stream_is_cut_its_beginning_is_learnt_too(start):
    """It was left out, and the beginnings of pieces, which tests ask for, were hardly ever trained."""
    stream = np.arange(100, 123, dtype=np.int32)
    asked = [row["targets"][row["targets"] >= 0] for row in cut(stream, start, 10)]
    assert np.concatenate(asked).tolist() == stream[1:].tolist()


def test_a_step_of_another_tokenizer_counts_its_targets():
    """The loop divides by what a step says that it has; such a step once could not be made at all."""
    streams = [np.arange(50, dtype=np.int32), np.arange(30, dtype=np.int32)]
    arguments = SimpleNamespace(batch_size=2, gradient_accumulation_steps=2)
    step = next(remi_steps(streams, 16, 0, arguments))
    assert [batch["tokens"].shape for batch in step.micro_batches] == [(2, 16), (2, 16)]
    assert step.targets == [int((batch["targets"] >= 0).sum()) for batch in step.micro_batches]
    assert 0 < step.num_targets <= 64


@pytest.mark.parametrize("name", [REFERENCE, "deferred"])
def test_no_variant_is_given_conditions(corpus, name, monkeypatch):
    """REMI has no such tokens, and rows that hold them hold less music."""
    seen = []
    monkeypatch.setattr(ablation, "fit", lambda model, steps, *rest: seen.extend(islice(steps, 20)) or {})
    arguments = ["--n_layer", "1", "--n_head", "1", "--d_model", "16", "--d_ff", "16", "--max_seq_len", "384"]
    arguments += ["--held_out", "0.2"]
    parser = argparse.ArgumentParser()
    ablation.add_common(parser)
    options = parser.parse_args(
        ["--output", "-", "--device", "cpu", "--eval_rows", "1", "--held_out", "0.2", *arguments]
    )
    ablation.run_one(name, 0, corpus, options)
    tokens = np.concatenate([batch["tokens"].ravel() for step in seen for batch in step.micro_batches])
    kind = corpus.vocabulary.family_of[tokens]
    assert not np.isin(kind, list(CONDITIONS.values())).any()
    assert (kind == Family.MASK).any() == (name == "deferred")
