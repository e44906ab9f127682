"""A prompt tells the model what it is, and what is asked for beside it takes that place; the command's flags too."""

from __future__ import annotations

import json

import numpy as np
import pytest

from meloformer.command_config import GenerateConfig
from meloformer.errors import UserError
from meloformer.generation import Part, Steering, generate
from meloformer.generation.command import read_request, run
from meloformer.generation.guidance import without_conditions
from meloformer.generation.parts import accompaniment
from meloformer.generation.prompt import Prompt
from meloformer.generation.request import ConstrainedState
from meloformer.generation.tasks import continuation, rewriting
from meloformer.hid.controls import CONDITIONS
from meloformer.midi import DRUMS, Score, Track, note_table, write_midi
from tests.generation.steered import TAGS, TOKENIZER, steerable
from tests.hid.streams import VOCABULARY

# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def song(tmp_path):
    """Six bars, C F G C C G in whole notes, a bass and drums below."""
    roots = [0, 5, 7, 0, 0, 7]
    rows = [(0, 96 * bar, 96, 60 + root + step, 80) for bar, root in enumerate(roots) for step in (0, 4, 7)]
    rows += [(1, 96 * bar + 48 * half, 40, 36 + root, 90) for bar, root in enumerate(roots) for half in (0, 1)]
    rows += [(2, 24 * beat, 6, 42, 90) for beat in range(24)]
    score = Score(24, [Track(48), Track(33), Track(0, True)], note_table(rows))
    write_midi(score, tmp_path / "song.mid")
    return tmp_path / "song.mid"


def text_of(task) -> str:
    return TOKENIZER.text(task.request.given)


def test_a_prompt_is_told_by_what_it_is(song):
    prompt = Prompt(song, VOCABULARY, list(CONDITIONS), TAGS)
    whole = rewriting(prompt, frozenset({(1, 2)}), 900)
    text = text_of(whole)
    assert text.startswith("BOS PIECE_BEGIN PIECE_END KEY_C_major DENSITY_")
    chords = [word for word in text.split() if word.startswith("CHORD")]
    assert chords == [f"CHORD_{root}_maj" for root in ("C", "F", "G", "C", "G")]
    assert "INSTRUMENT_DRUMS ROLE_drums DENSITY" in text and "INSTRUMENT_48 ROLE_pad DENSITY" in text
    assert "BAR_DENSITY" not in text
    assert whole.told.startswith("C major, density ") and whole.told.endswith(", 5 chords, 3 roles")
    # the bars to come have no chords yet, so none are said; the end is not where it was
    text = text_of(continuation(prompt, 2, 900, 3))
    assert text.startswith("BOS KEY_C_major DENSITY_") and "CHORD" not in text and "ROLE_bass" in text
    # a piece with one part more has another density
    text = text_of(accompaniment(prompt, [0], 900))
    assert text.startswith("BOS PIECE_BEGIN PIECE_END KEY_C_major CONDUCTOR") and "CHORD_F_maj" in text
    # a model that knows nothing is told nothing
    text = text_of(rewriting(Prompt(song, VOCABULARY), frozenset({(1, 2)}), 900))
    assert text.startswith("BOS PIECE_BEGIN PIECE_END CONDUCTOR BAR METER_4/4 TEMPO_120 BAR BAR BAR BAR BAR INSTR")


def test_what_is_asked_for_takes_the_place_of_what_is_derived(song):
    prompt = Prompt(song, VOCABULARY, list(CONDITIONS), TAGS)
    steering = Steering(key="A minor", chords="Am Dm", tag="jazz", end=True, parts=[Part(33, density=9)])
    text = text_of(continuation(prompt, 3, 900, 2, steering))
    assert text.startswith("BOS PIECE_END KEY_A_minor TAG_0 DENSITY_")
    head = text.split(" INSTRUMENT")[0]
    assert head.endswith(
        "BAR METER_4/4 TEMPO_120 T_0 CHORD_C_maj BAR T_0 CHORD_G_maj "
        "BAR T_0 CHORD_A_min BAR T_0 CHORD_D_min BAR T_0 CHORD_A_min"
    )
    assert "INSTRUMENT_33 ROLE_bass DENSITY_9 POLYPHONY_1 BAR" in text
    # a chord that only goes on is not said again
    text = text_of(continuation(prompt, 2, 900, 1, Steering(chords="G C")))
    assert "T_0 CHORD_G_maj BAR BAR T_0 CHORD_C_maj INSTRUMENT" in text
    # over rewritten bars, and behind them what was there goes on
    steering = Steering(chords="Am Dm", bar_density=[7], begin=False, end=False)
    text = text_of(rewriting(prompt, frozenset({(0, 2), (1, 3)}), 900, steering))
    assert text.startswith("BOS KEY_C_major DENSITY_")
    assert [word for word in text.split() if word.startswith("CHORD")] == [
        *("CHORD_C_maj", "CHORD_F_maj", "CHORD_A_min", "CHORD_D_min", "CHORD_C_maj", "CHORD_G_maj"),
    ]
    densities = [word for word in text.split() if word.startswith("BAR_")]
    assert len(densities) == 6 and densities[2:4] == ["BAR_DENSITY_7"] * 2 != densities[:2]
    # new parts are described in the request, not in what is given
    task = accompaniment(prompt, [33, 0], 900, steering=Steering(parts=[Part(33, density=2)]))
    state = ConstrainedState(VOCABULARY, task.request, 900)
    assert [[VOCABULARY.name(due.start) for due in part] for part in state.parts] == [["DENSITY_2"], []]
    with pytest.raises(UserError, match="chords has 3, and there are 2 bars"):
        continuation(prompt, 2, 900, None, Steering(chords="Am F C"))
    with pytest.raises(UserError, match=r"begin: the model reads .* from bar 5 on"):
        continuation(prompt, 2, 900, 2, Steering(begin=True))
    assert text_of(continuation(prompt, 2, 900, None, Steering(begin=True))).startswith("BOS PIECE_BEGIN KEY")
    with pytest.raises(UserError, match="a track of Violin is described"):
        continuation(prompt, 2, 900, 2, Steering(parts=[Part(40, density=2)]))


def test_every_task_with_random_conditions_writes_valid_streams(song, tmp_path):
    model, rng = steerable(), np.random.default_rng(1)
    for trial in range(9):
        known = [name for name in CONDITIONS if rng.random() < 0.6]
        prompt = Prompt(song, VOCABULARY, known, TAGS)
        steering = Steering(
            key="A minor" if rng.random() < 0.5 else None,
            chords="Am" if rng.random() < 0.5 else None,
            bar_density=[int(rng.integers(8))] if rng.random() < 0.5 else None,
            density=4 if rng.random() < 0.3 else None,
            end=[None, True, False][rng.integers(3)],
        )
        cells = frozenset({(int(rng.integers(3)), int(rng.integers(6)))})
        task = (
            continuation(prompt, 1, 900, 3, steering),
            rewriting(prompt, cells, 900, steering),
            accompaniment(prompt, [0], 900, 2, steering),
        )[trial % 3]
        guided = len(without_conditions(task.request.given, VOCABULARY)) < len(task.request.given)
        (sample,) = generate(model, task.request, seed=trial, max_length=900, guidance=1.5 if guided else 1)
        TOKENIZER.validate(sample.tokens)
        task.write(sample, tmp_path / "out.mid")


# --- the command ----------------------------------------------------------------------------------------------------


def test_flags_become_conditions(tmp_path):
    flags = GenerateConfig(
        checkpoint="x",
        output="y",
        key="A minor",
        chords="Am F",
        density=4,
        tag="rock",
        end=True,
        track=["program=33,role=bass,density=4", "program=drums"],
    )
    flags.validate()
    steering = read_request(flags).steering
    assert steering.names() == ["key", "chords", "tag", "density", "role"]
    assert steering.parts == (Part(33, "bass", 4), Part(DRUMS)) and steering.end and steering.begin is None
    for settings_, message in (
        ({"track": ["role=bass"]}, "--track is 'role=bass', must be like"),
        ({"track": ["program=33,density=few"]}, "must be like"),
        ({"track": ["program=33,density=2,density=3"]}, "density is given twice"),
        ({"chord_bars": 2.0}, "--chord_bars is how long each of --chords lasts"),
        ({"guidance": -1.0}, "guidance is -1.0, must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            flags = GenerateConfig(checkpoint="x", output="y", **settings_)
            flags.validate()
            read_request(flags)


def test_bars_between_rewritten_ones_keep_their_chords(song):
    """Bars 1 and 4 anew: what is asked for goes on from one to the other, and bars 2 and 3 are as they were."""
    prompt = Prompt(song, VOCABULARY, CONDITIONS)
    cells = frozenset({(0, 0), (1, 3)})
    whole = text_of(rewriting(prompt, cells, 900))
    asked = text_of(rewriting(prompt, cells, 900, Steering(chords="F# B")))
    bars = [text.split(" BAR")[1:] for text in (part.split("INSTRUMENT")[0] for part in (whole, asked))]
    assert "CHORD_F#_maj" in bars[1][0] and "CHORD_B_maj" in bars[1][3]
    assert "CHORD" in bars[1][1] and "F#" not in bars[1][1]
    assert [bar.split() for bar in bars[1][1:3]] == [bar.split() for bar in bars[0][1:3]]


def test_a_description_finds_its_track_where_another_is_silent(tmp_path):
    """Only the tracks that sound in the window were looked through: the bass of bars 1 and 2 was not there for a piano
    rewritten in bar 3, and what was said of the first violin went to the second."""
    rows = [(track, 96 * bar, 90, 50 + track, 80) for track in (0, 3) for bar in range(3)]
    rows += [(track, 96 * bar, 90, 20 * track + 20, 80) for track in (1, 2) for bar in range(2)]
    write_midi(Score(24, [Track(0), Track(33), Track(40), Track(40)], note_table(rows)), tmp_path / "song.mid")
    prompt = Prompt(tmp_path / "song.mid", VOCABULARY)
    assert prompt.score.instruments.tolist() == [33, 0, 40, 40] and prompt.track_of == [1, 0, 2, 3]
    steering = Steering(parts=[Part(33, density=4), Part(40, density=7), Part(0, density=2)])
    near, tracks = prompt.stream(2, 3, frozenset({(1, 2)}), steering)
    assert tracks == [1, 3] and "INSTRUMENT_0 DENSITY_2 BAR MASK INSTRUMENT_40 BAR" in TOKENIZER.text(near)
    text = text_of(rewriting(prompt, frozenset({(1, 2)}), 900, steering))
    assert "INSTRUMENT_33 DENSITY_4 BAR" in text and "INSTRUMENT_40 DENSITY_7 BAR" in text
    assert text.count("INSTRUMENT_40") == 2 and text.count("DENSITY_7") == 1
    with pytest.raises(UserError, match="a track of Flute is described"):
        rewriting(prompt, frozenset({(1, 2)}), 900, Steering(parts=[Part(73, density=4)]))


def test_an_end_is_not_asked_for_where_the_piece_goes_on(song):
    prompt = Prompt(song, VOCABULARY)
    with pytest.raises(UserError, match=f"end: the model reads .* of {prompt.num_bars}; leave it out"):
        rewriting(prompt, frozenset({(0, 0)}), 90, Steering(end=True))


def test_the_command_steers_and_reports(song, tmp_path, capsys):
    model = steerable()
    model.save_pretrained(tmp_path / "checkpoint")
    known = {"checkpoint": str(tmp_path / "checkpoint"), "output": str(tmp_path / "out"), "device": "cpu"}
    run(GenerateConfig(**known, num_samples=2, bars=2, chords="Am F", key="Am", guidance=2.0, max_length=120))
    run(GenerateConfig(**known, num_samples=1, prompt=str(song), continue_bars=1, chords="Am", max_length=700))
    first, second = json.loads((tmp_path / "out" / "generation.json").read_text())["runs"]
    assert first["settings"]["chords"] == "Am F" and first["settings"]["guidance"] == 2.0
    assert len(first["samples"]) == 2 and second["prompt"] == str(song)
    assert (
        second["told"].startswith("C major, density")
        and f"the model is told {second['told']}" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="tag 'polka': the model knows jazz, rock"):
        run(GenerateConfig(**known, seed=5, tag="polka"))
    assert len(list((tmp_path / "out").glob("*.mid"))) == 3
