"""Going on from a file: what was given stays, note for note and event for event, and what was asked for is there."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.errors import UserError
from meloformer.generation import Request, Sampling, generate
from meloformer.generation.cells import find_cells, parse_rewrite
from meloformer.generation.command import _is_new
from meloformer.generation.parts import accompaniment
from meloformer.generation.prompt import Prompt
from meloformer.generation.request import ConstrainedState
from meloformer.generation.steering import Part, Steering
from meloformer.generation.tasks import anew, continuation, named, rewriting
from meloformer.hid import Family
from meloformer.hid.controls import CONDITIONS
from meloformer.midi import DRUMS, MidiError, Score, Track, note_table, read_score, write_midi
from meloformer.midi.merge import MidiSource
from tests.generation.likeliest import decided, likeliest
from tests.generation.prompted import TOKENIZER, kept_and_new, one_sample
from tests.hid.streams import VOCABULARY
from tests.midi.real_files import readable_sample
from tests.midi.test_merge import band, timed_events
from tests.model.music import tiny_model

# --- what the model reads -----------------------------------------------------------------------------------------


def test_a_prompt_knows_its_tracks_by_the_files_numbers(prompt):
    assert [track.instrument for track in prompt.score.tracks] == [DRUMS, 33, 40, 40]
    assert prompt.track_of == [2, 1, 0, 3]
    assert prompt.find_tracks("1") == [2] and prompt.find_tracks("4") == [3]
    assert prompt.find_tracks("drums") == [0] and prompt.find_tracks("violin") == [2, 3]
    for name, message in (
        ("5", "count from 1; it has 1 Violin, 2 Electric"),
        ("0", "count from 1"),
        ("flute", "none of its tracks plays it; it has 1 Violin, 2 Electric Bass (finger), 3 Drums, 4 Violin"),
        ("kazoo", "no track kazoo: no General MIDI instrument begins so; it has 1 Violin"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            prompt.find_tracks(name)


def test_the_head_of_a_continuation(prompt):
    """Two bars read, two to come: the meter in force is restated, the silent violin has its masks behind empty bars."""
    masked = frozenset((track, bar) for track in range(4) for bar in (6, 7))
    tokens, tracks = prompt.stream(4, 8, masked)
    text = TOKENIZER.text(tokens)
    assert text.startswith("BOS CONDUCTOR BAR METER_4/4 TEMPO_150 BAR BAR BAR INSTRUMENT_DRUMS BAR T_0")
    assert "INSTRUMENT_40 BAR BAR BAR MASK BAR MASK INSTRUMENT_40 BAR T_0" in text
    assert tracks == [0, 1, 2, 3] and (tokens == VOCABULARY.MASK).sum() == 8
    # as `defer` would have written it, up to the first FILL
    whole, _ = prompt.stream(0, 6, frozenset({(1, 3), (2, 5)}))
    deferred = TOKENIZER.defer([*prompt.stream(0, 6)[0].tolist(), VOCABULARY.EOS], [(1, 3), (2, 5)])
    assert whole.tolist() == deferred[: len(whole)].tolist() and deferred[len(whole)] == VOCABULARY.FILL


def test_the_marks_of_a_pieces_ends(prompt):
    for first, last, marks in ((0, 6, 2), (0, 5, 1), (1, 6, 1), (1, 5, 0), (1, 8, 0)):
        tokens, _ = prompt.stream(first, last, frozenset({(0, last - 1)}))
        kind = VOCABULARY.family_of[tokens]
        assert ((kind == Family.PIECE_BEGIN) | (kind == Family.PIECE_END)).sum() == marks


def test_a_long_prompt_is_read_through_a_window_and_says_so(prompt):
    whole = continuation(prompt, 2, 4000)
    assert whole.first_bar == 0 and whole.note == ""
    length = len(whole.request.given)
    cut = continuation(prompt, 2, length)
    assert 0 < cut.first_bar < 5 and len(cut.request.given) < length
    assert f"last {6 - cut.first_bar} of 6 bars" in cut.note and str(length) in cut.note
    assert continuation(prompt, 2, 4000, prompt_bars=3).first_bar == 3
    with pytest.raises(UserError, match=r"song.mid: a bar of it and a new one of 4 tracks need about"):
        continuation(prompt, 2, 100)
    with pytest.raises(UserError, match="it has 6 bars, and 1000000000000000000 more make over 16384; ask for fewer"):
        continuation(prompt, 10**18, 100)  # every cell was listed first, which did not end

    cells = find_cells(prompt, [("drums", 4, 4)])
    near = rewriting(prompt, cells, len(rewriting(prompt, cells, 4000).request.given) - 20)
    assert near.first_bar <= 3 < near.end_bar and "reads bars" in near.note
    with pytest.raises(UserError, match="bar 4 of all its tracks and room to write in need about"):
        rewriting(prompt, cells, 30)
    with pytest.raises(UserError, match=r"a bar of it and 1 new parts need about .* add fewer parts"):
        accompaniment(prompt, [0], 50)
    assert accompaniment(prompt, [0], 200, prompt_bars=1).first_bar == 5


@pytest.mark.parametrize(
    "word",
    [
        "track=2",
        "bars=2-3",
        "track=2,bars=3-2",
        "track=2,bars=0",
        "track=,bars=1",
        "track=2,bars=x",
        "track=1,bars=1,x",
        "",
    ],
)
def test_what_is_no_cell_is_refused(word):
    with pytest.raises(UserError, match=r'--rewrite is .* must be like "track=2,bars=8-16"'):
        parse_rewrite([word])


def test_cells_beyond_the_piece_are_refused(prompt):
    with pytest.raises(UserError, match=r"bars=3-7, it has bars 1-6"):
        find_cells(prompt, [("1", 3, 7)])


def test_a_prompt_without_notes_or_music_is_one_line(tmp_path):
    write_midi(Score(96, [Track(0)]), tmp_path / "empty.mid")
    with pytest.raises(UserError, match=r"empty.mid: has no notes"):
        Prompt(tmp_path / "empty.mid", VOCABULARY)
    (tmp_path / "page.mid").write_text("<html>")
    with pytest.raises(MidiError, match=r"page.mid: a web page"):
        Prompt(tmp_path / "page.mid", VOCABULARY)


# --- what is written ----------------------------------------------------------------------------------------------


def test_a_continuation_begins_behind_the_last_bar(prompt, tmp_path):
    task = continuation(prompt, 2, 900)
    sample = one_sample(task)
    task.write(sample, tmp_path / "out.mid")
    lost, new = kept_and_new(prompt, task, tmp_path / "out.mid")
    assert not lost and new and {note[0] for note in new} <= {DRUMS, 33, 40}
    assert all(1920 <= onset < 2688 for _, onset, *_ in new)
    assert (sample.tokens == VOCABULARY.FILL).sum() == 8 == task.cells
    for before, after in zip(timed_events(prompt.path), timed_events(tmp_path / "out.mid")):
        assert not before - after


def test_rewritten_cells_are_new_and_others_stay(prompt, tmp_path):
    cells = find_cells(prompt, parse_rewrite(["track=2,bars=2-3", "track=4,bars=5"]))
    task = rewriting(prompt, cells, 900)
    task.write(one_sample(task), tmp_path / "out.mid")
    lost, new = kept_and_new(prompt, task, tmp_path / "out.mid")
    assert all((i == 33 and 288 <= onset < 864) or (i == 40 and onset == 1152 and pitch == 60)
               for i, onset, _, pitch, _ in lost)  # fmt: skip
    assert all((i == 33 and 288 <= onset < 864) or (i == 40 and 1152 <= onset < 1536) for i, onset, *_ in new)
    assert new and prompt.notes_in(cells)["onset"].tolist() == [288, 384, 480, 576, 672, 768, 1152]


def test_new_parts_stand_beside_the_given_ones(prompt, tmp_path):
    task = accompaniment(prompt, [0, DRUMS], 900, prompt_bars=3)
    sample = one_sample(task)
    assert sample.score.instruments.tolist() == [DRUMS, 33, 40, DRUMS, 0]
    task.write(sample, tmp_path / "out.mid")
    lost, new = kept_and_new(prompt, task, tmp_path / "out.mid")
    assert not lost and {note[0] for note in new} == {0, DRUMS}
    assert all(onset >= 864 for _, onset, *_ in new)
    task.write(sample, tmp_path / "alone.mid", only_new=True)
    alone = read_score(tmp_path / "alone.mid")
    assert set(alone.instruments.tolist()) == {0, DRUMS} and alone.num_notes >= len(new)
    assert alone.meters.tolist() == prompt.source.score.meters.tolist()


def test_what_is_new_is_told_where_a_part_shares_its_channel(tmp_path):
    """The file uses every channel, so a trumpet joins the horns' and reads as one: its notes were drawn as old ones."""
    band(tmp_path / "full.mid", channels=range(16))
    prompt = Prompt(tmp_path / "full.mid", VOCABULARY)
    for task in (
        accompaniment(prompt, [56], 900, prompt_bars=1),
        rewriting(prompt, frozenset({(2, 0), (3, 1)}), 900),
    ):
        sample = one_sample(task)
        for only_new in (False, True):
            counts = task.write(sample, tmp_path / "out.mid", only_new)
            new = task.new_notes(sample)
            written = MidiSource(tmp_path / "out.mid")
            is_new = _is_new(written, task, task.removed(sample), only_new)
            assert is_new.sum() == len(new) - counts["held_dropped"] - counts["duplicate_dropped"] > 0
            found = written.score.notes[is_new][["onset", "pitch"]].tolist()
            assert not Counter(found) - Counter(new[["onset", "pitch"]].tolist())
            assert counts["channel_shared"] == len(task.instruments) and (is_new.all() or not only_new)


def test_a_piece_anew_has_the_prompts_form_and_none_of_its_notes(song, tmp_path):
    prompt = Prompt(song, VOCABULARY, CONDITIONS)
    task = anew(prompt, 900)
    text = TOKENIZER.text(task.request.given)
    assert "INSTRUMENT" not in text and text.startswith("BOS PIECE_BEGIN PIECE_END KEY_")
    assert " DENSITY_" in text and "CHORD_" in text  # the whole piece's density still holds: no part is added to others
    assert text.count("METER_") == 2 and text.count("TEMPO_") == 2
    torch.manual_seed(0)
    model = tiny_model()
    model.conditions = list(CONDITIONS)
    (sample,) = generate(model, task.request, max_length=900)
    assert sample.score.instruments.tolist() == [DRUMS, 33, 40, 40] and sample.score.num_bars == 6
    assert TOKENIZER.text(sample.tokens).count("ROLE_") == 4
    for table in ("meters", "tempos"):
        assert getattr(sample.score, table).tolist() == getattr(prompt.score, table).tolist()
    task.write(sample, tmp_path / "new.mid")
    write_midi(named(sample.score), tmp_path / "alone.mid")
    assert read_score(tmp_path / "new.mid").tracks[0].name == "Drums"
    assert (tmp_path / "new.mid").read_bytes() == (tmp_path / "alone.mid").read_bytes()


def test_a_piece_anew_may_be_shorter(prompt):
    """By request, or by what fits; parts that are described are as described, and the others as they come."""
    task = anew(prompt, 900, bars=2)
    assert task.cells == 8 and not task.note and "PIECE_END" not in TOKENIZER.text(task.request.given)
    task = anew(prompt, 150)
    assert "writes its first" in task.note and task.cells < 24
    with pytest.raises(UserError, match="a bar of 4 new parts need about"):
        anew(prompt, 40)
    with pytest.raises(UserError, match="--bars 7, it has 6"):
        anew(prompt, 900, bars=7)
    told = anew(prompt, 900, steering=Steering(parts=[Part(33, density=9)]))
    assert list(told.request.steering.parts) == [Part(33, density=9)]


def test_a_piece_anew_takes_several_chords_and_densities(prompt):
    """The search for the bars that fit began at one bar, and there four chords were always too many."""
    four = Steering(chords="Am F C G", bar_density=[1, 2, 3])
    text = TOKENIZER.text(anew(prompt, 900, steering=four).request.given)
    assert text.count("CHORD_") == 6 and text.count("BAR_DENSITY_") == 6  # begun again until the sixth bar
    small = anew(prompt, 270, steering=four)
    assert small.cells == 16 and "first 4 of 6 bars" in small.note
    with pytest.raises(UserError, match=r"4 bars of 4 new parts need about .* fewer chords"):
        anew(prompt, 100, steering=four)
    with pytest.raises(UserError, match="chords has 4, and there are 3 bars"):
        anew(prompt, 900, bars=3, steering=four)


# --- what holds for any of them --------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_choice_keeps_what_was_given_and_fills_every_mask(data):
    """The worst model there is, on random cells, new parts and limits down to what only just closes."""
    score = Score(24, [Track(0), Track(33)], note_table([(0, 0, 9, 60, 60), (0, 200, 9, 60, 60), (1, 96, 9, 40, 64)]))
    given = TOKENIZER.encode(score)
    cells = data.draw(st.sets(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=6))
    instruments = data.draw(st.lists(st.sampled_from([0, 33, 128]), max_size=3, min_size=0 if cells else 1))
    deferred = TOKENIZER.defer(given, cells)
    fills = np.flatnonzero(deferred == VOCABULARY.FILL)
    head = deferred[: fills[0] if len(fills) else -1]
    limit = len(head) + len(cells) + 6 * len(instruments) + 1 + data.draw(st.integers(0, 60))
    start = ConstrainedState(VOCABULARY, Request(instruments=instruments or None, given=head), limit)
    assert start.forced_prefix()[: len(head)] == head.tolist()
    state = start.branch()
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    while not state.is_finished:
        state.push(int(rng.choice(np.flatnonzero(state.allowed()))))
    TOKENIZER.validate(np.array(state.tokens))
    assert len(state.tokens) <= limit and state.tokens[: len(head)] == head.tolist()
    assert state.tokens.count(VOCABULARY.FILL) == len(cells)
    kind = VOCABULARY.family_of[state.tokens[len(head) :]]
    assert (kind == Family.INSTRUMENT).sum() == len(instruments)
    assert sorted(state.state.instruments[2:]) == sorted(instruments)


def test_a_request_that_asks_for_nothing_is_refused(prompt):
    head = prompt.stream(0, 6)[0]
    with pytest.raises(UserError, match="nothing is asked for"):
        ConstrainedState(VOCABULARY, Request(given=head), 4000)
    with pytest.raises(UserError, match="those of the given music"):
        ConstrainedState(VOCABULARY, Request(given=head, bars=2), 4000)
    with pytest.raises(UserError, match="1 new parts need at least"):
        ConstrainedState(VOCABULARY, Request(given=head, instruments=[0]), len(head) + 6)


def test_batches_share_the_prompt_and_samples_do_not_notice(prompt):
    """Each sample branches off one prefilled cache; alone it is the same, in float64 to the last token."""
    torch.manual_seed(2)
    model = tiny_model().double()
    task = continuation(prompt, 2, 420, prompt_bars=2)
    pieces = [
        [s.tokens.tolist() for s in generate(model, task.request, 4, Sampling(), 5, size, 420)] for size in (1, 3, 4)
    ]
    assert pieces[0] == pieces[1] == pieces[2] and len(set(map(tuple, pieces[0]))) == 4


def test_greedy_filling_takes_the_argmax_of_the_full_forward_pass(prompt):
    torch.manual_seed(3)
    model = decided(tiny_model())
    task = rewriting(prompt, find_cells(prompt, [("2", 2, 3)]), 900)
    (sample,) = generate(model, task.request, sampling=Sampling(temperature=0), max_length=500)
    logits = model.logits(sample.tokens).numpy()
    state = ConstrainedState(VOCABULARY, task.request, 500)
    for position in range(len(state.tokens), len(sample.tokens)):
        token = int(sample.tokens[position])
        assert token == likeliest(logits[position - 1], state.allowed()), position
        state.push(token)


def test_real_files_are_gone_on_from(real_midi, tmp_path):
    rng, model, done, out = np.random.default_rng(1), tiny_model(), 0, tmp_path / "out.mid"
    for path in readable_sample(real_midi, share=0.01):
        try:
            prompt = Prompt(path, VOCABULARY)
        except UserError:
            continue
        tracks, bars = len(prompt.score.tracks), prompt.num_bars
        cells = frozenset({(int(rng.integers(tracks)), int(rng.integers(bars)))})
        try:
            tasks = [
                continuation(prompt, 1, 1200, prompt_bars=2),
                rewriting(prompt, cells, 1200),
                accompaniment(prompt, [40], 1200, prompt_bars=1),
            ]
        except UserError:  # a single bar of the piece is too much for this length
            continue
        task = tasks[done % 3]
        (sample,) = generate(model, task.request, seed=done, max_length=1200)
        TOKENIZER.validate(sample.tokens)
        counts = task.write(sample, out)
        old = len(prompt.source.score.notes) - len(prompt.notes_in(task.removed(sample)))
        dropped = counts["held_dropped"] + counts["duplicate_dropped"]
        assert read_score(out).num_notes == old + len(task.new_notes(sample)) - dropped
        done += 1
        if done == 12:
            break
    assert done >= 6
