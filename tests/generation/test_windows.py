"""Where the context ends: what does not fit at once goes through the song window by window, and nothing is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from meloformer.errors import UserError
from meloformer.generation import generate
from meloformer.generation.cells import find_bars, parse_bars
from meloformer.generation.parts import accompaniment, go_on
from meloformer.generation.prompt import Prompt
from meloformer.generation.steering import Part, Steering
from meloformer.generation.tasks import Window, as_task, continuation, rewriting
from meloformer.hid.controls import CONDITIONS
from meloformer.midi import Score, Track, note_table, read_score, write_midi
from meloformer.midi.merge import MidiSource
from tests.generation.prompted import TOKENIZER, kept_and_new, one_sample, terse
from tests.hid.streams import VOCABULARY
from tests.model.music import tiny_model


def test_a_window_leaves_room_for_what_the_rewritten_bars_hold(tmp_path):
    """A bar as full as eight others: room was kept for an average one, and music went when that ran out."""
    rows = [(0, 96 * bar, 20, 60, 80) for bar in range(9)] + [(0, 384 + 3 * i, 3, 40 + i, 80) for i in range(32)]
    write_midi(Score(24, [Track(0)], note_table(rows)), tmp_path / "full.mid")
    prompt = Prompt(tmp_path / "full.mid", VOCABULARY)
    cells = frozenset({(0, 4)})
    assert prompt.tokens_for(cells) == 1 + 1.5 * 4 * 32 + 1.5 * 3 + 0.5  # a chord of two notes has one T
    for limit in (240, 260):
        task = rewriting(prompt, cells, limit)
        assert limit - len(task.request.given) > 1.5 * 4 * 32 and task.first_bar <= 4 < task.last_bar
    assert rewriting(prompt, cells, 260).first_bar < rewriting(prompt, cells, 240).first_bar
    with pytest.raises(UserError, match="bar 5 of all its tracks and room to write in need about"):
        rewriting(prompt, cells, 190)


def test_what_the_limit_cut_keeps_its_old_notes(prompt, tmp_path):
    """Bars that were to be rewritten and were not reached lost their music, and the exit status was 0."""
    cells = frozenset((track, bar) for track in (0, 1, 3) for bar in range(6))
    window, model, seen = Window(0, 6, cells), tiny_model(), set()
    given = len(as_task(prompt, window, [], Steering(), "", 4000).request.given)
    for room in (30, 45, 60):
        task = as_task(prompt, window, [], Steering(), "", given + room)
        sample = terse(task)
        left = task.unfinished(sample)
        assert sample.hit_limit and left and left == sorted(cells)[-len(left) :]
        seen.add(len(left))
        task.write(sample, tmp_path / "out.mid")
        lost, new = kept_and_new(prompt, task, tmp_path / "out.mid")
        written = MidiSource(tmp_path / "out.mid")
        found = Counter(written.places(written.score.notes))
        lines = prompt.file_ticks(prompt.score.bar_lines())
        for track, bar in left:
            old = prompt.source.places(prompt.notes_in(frozenset({(track, bar)})))
            part = prompt.source.parts[prompt.track_of[track]][:2]
            here = {place for place in found if place[:2] == part and lines[bar] <= place[2] < lines[bar + 1]}
            assert here == set(old)
        assert bool(lost or new) == (len(left) < len(cells))
    assert len(seen) > 1
    (whole,) = generate(model, rewriting(prompt, frozenset({(0, 1)}), 4000).request, max_length=4000)
    assert not whole.hit_limit and rewriting(prompt, frozenset({(0, 1)}), 4000).unfinished(whole) == []


def test_new_parts_go_through_the_whole_song_window_by_window(prompt, tmp_path):
    """Where it did not fit at once, only its last bars could have one; each window reads what the one before wrote."""
    steps = []
    task = accompaniment(prompt, [0, 73], 250, steering=Steering(parts=[Part(73, density=4)]))
    assert task.last_bar < task.until == 6 and task.cells == 12 and "then goes on from there" in task.note

    def write(step, number):
        steps.append(step)
        return terse(step, number)

    added = go_on(task, terse(task), write)
    assert steps and not added.unfinished and set(added.notes["track"].tolist()) == {4, 5}
    for step in steps:
        text = TOKENIZER.text(step.request.given)
        assert "INSTRUMENT_73 DENSITY_4 BAR" in text and "MASK" in text and len(step.request.given) < 250
        assert {cell[0] for cell in step.masked} == {4, 5}
        heard = step.prompt.score.notes
        assert (heard["track"] >= 4).any() and steps[-1].last_bar == 6
    counts = task.merge(added.notes, frozenset(), tmp_path / "out.mid")
    lost, new = kept_and_new(prompt, task, tmp_path / "out.mid")
    assert not lost and {note[0] for note in new} <= {0, 73}
    assert (
        read_score(tmp_path / "out.mid").num_notes
        == prompt.source.score.num_notes + len(added.notes) - counts["duplicate_dropped"]
    )


def test_a_progression_goes_on_in_the_next_window(song):
    prompt = Prompt(song, VOCABULARY, CONDITIONS)
    steps = []
    task = accompaniment(prompt, [0], 260, steering=Steering(chords="Am F C G Dm E", key="A minor"))
    assert 0 < task.last_bar < 6

    def write(step, number):
        steps.append(TOKENIZER.text(step.request.given))
        return terse(step, number)

    assert not go_on(task, terse(task), write).unfinished
    assert all("KEY_A_minor" in text for text in steps) and "CHORD_E_maj" in steps[-1]
    with pytest.raises(UserError, match="bar_density needs all new bars in 260 tokens"):
        accompaniment(prompt, [0], 260, steering=Steering(bar_density=[1, 2]))


def test_bars_far_apart_are_rewritten_in_several_windows(prompt, tmp_path):
    """What lies between them did not fit, so both were refused."""
    cells, steps = frozenset({(0, 0), (1, 0), (0, 5), (2, 1)}), []
    whole = rewriting(prompt, cells, 4000)
    limit = len(whole.request.given) - 100
    task = rewriting(prompt, cells, limit)
    assert task.later and set(task.to_write) == cells and task.cells == 4 and "then goes on" in task.note

    def write(step, number):
        steps.append(step)
        return terse(step, number)

    added = go_on(task, terse(task), write)
    assert steps and added.gone == cells and not added.unfinished
    task.merge(added.notes, added.gone, tmp_path / "out.mid")
    lost, new = kept_and_new(prompt, task, tmp_path / "out.mid")
    assert new and lost <= {
        (*(prompt.source.score.instruments[n[0]],), *n[1:]) for n in prompt.notes_in(cells).tolist()
    }
    first = go_on(task, terse(task), lambda step, number: steps.append(step) or terse(step, number))
    assert first.notes.tolist() == added.notes.tolist()
    # a window that is cut is gone on from, too
    cut = Window(0, 6, frozenset((1, bar) for bar in range(6)))
    long = len(as_task(prompt, cut, [], Steering(), "", 4000).request.given) + 17
    task = as_task(prompt, cut, [], Steering(), "", long)
    sample = terse(task)
    assert sample.hit_limit and 0 < len(task.unfinished(sample)) < 6
    assert not go_on(task, sample, write).unfinished


def test_new_parts_in_chosen_bars_only(prompt):
    task = accompaniment(prompt, [0], 900, bars=range(1, 3))
    notes = task.new_notes(one_sample(task))
    assert len(notes) and notes["onset"].min() >= 288 and notes["onset"].max() < 864
    assert (task.first_bar, task.last_bar, task.end_bar, task.cells) == (1, 3, 6, 2)
    assert parse_bars("2-3") == (2, 3) and parse_bars("9") == (9, 9)
    for word in ("0-3", "3-2", "x", "", "1-"):
        with pytest.raises(UserError, match=r"--add_bars is .* must be like 9-16"):
            parse_bars(word)
    with pytest.raises(UserError, match=r"--add_bars 3-7, it has bars 1-6"):
        find_bars(prompt, 3, 7, "--add_bars ")


@pytest.mark.parametrize("prompt_bars", [None, 2])
def test_a_continuation_goes_on_as_long_as_is_asked(prompt, tmp_path, prompt_bars):
    """More bars than the context holds were refused; just so many were written with a single bar in view."""
    limit, steps, number = 420, [], prompt.score.num_bars
    task = continuation(prompt, 40, limit, prompt_bars)
    assert task.cells == 160 and task.end_bar == 46 and not task.replaced
    assert f"reads bars {task.first_bar + 1}-6, writes 7-{task.last_bar} and goes on from there" in task.note

    def write(step, window):
        steps.append(step)
        return terse(step, window)

    added = go_on(task, terse(task), write)
    assert not added.unfinished and not added.gone and len(steps) > 3
    lines = added.notes["onset"].min(), prompt.file_ticks(prompt.score.bar_lines()[-1:])[0]
    assert lines[0] >= lines[1]
    for step in [task, *steps]:
        text, first_new = TOKENIZER.text(step.request.given), min(bar for _, bar in step.masked)
        assert len(step.request.given) < limit and "PIECE_END" not in text and "METER_4/4" in text
        assert first_new - step.first_bar >= min(step.last_bar - first_new, first_new - step.prompt.first_read)
        assert step.first_bar >= number - (prompt_bars or number) and step.prompt.first_read in (0, 4)
    assert steps[-1].last_bar == 46 and steps[0].first_bar > task.first_bar
    task.merge(added.notes, added.gone, tmp_path / "out.mid")
    lost, new = kept_and_new(prompt, task, tmp_path / "out.mid")
    assert not lost and new and Prompt(tmp_path / "out.mid", VOCABULARY).num_bars == 46
    heard = {cell for cell in steps[-1].prompt.cells_of(steps[-1].prompt.score.notes) if cell[1] >= 6}
    assert {track for track, _ in heard} == {0, 1, 2, 3} and max(bar for _, bar in heard) >= steps[-2].last_bar - 2


def test_the_end_and_the_chords_of_a_long_continuation(song):
    """Chords stand where they would in one window, and the piece ends in the last one."""
    prompt, steps = Prompt(song, VOCABULARY, CONDITIONS), []
    task = continuation(prompt, 16, 430, steering=Steering(chords="Am F C G", key="A minor", end=True))

    def write(step, window):
        steps.append(step)
        return terse(step, window)

    assert task.last_bar < 22 and not go_on(task, terse(task), write).unfinished
    for step in [task, *steps]:
        words = TOKENIZER.text(step.request.given).split()
        assert ("PIECE_END" in words) == (step.last_bar == 22) and "KEY_A_minor" in words
        bars = " ".join(words[words.index("CONDUCTOR") + 1 : words.index("INSTRUMENT_DRUMS")]).split("BAR")[1:]
        for number, bar in enumerate(bars, step.first_bar - 6):
            if number >= 0:
                assert f"CHORD_{'AFCG'[number % 4]}_m" in bar
    with pytest.raises(UserError, match="a bar of it and 40 new ones of 4 tracks need about"):
        continuation(prompt, 40, 430, steering=Steering(bar_density=[3]))
