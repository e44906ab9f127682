"""Every sample is valid and honours the request, from a model that has learnt nothing and so tries everything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import symusic
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miditoolkit import MidiFile

from meloformer.command_config import GenerateConfig
from meloformer.errors import UserError
from meloformer.generated import earlier_runs
from meloformer.generation import Request, Sampling, generate
from meloformer.generation.command import _names, read_request, run
from meloformer.generation.request import ConstrainedState
from meloformer.generation.sampling import choose, choose_batch
from meloformer.generation.sound import Synthesizer
from meloformer.hid import Tokenizer
from meloformer.midi import Score, Track, note_table, read_score, write_midi
from meloformer.midi.chunks import split
from meloformer.wording import counted
from tests.generation.likeliest import decided, likeliest
from tests.hid.streams import VOCABULARY
from tests.model.music import tiny_model
from tests.training.small import small_score

TOKENIZER = Tokenizer(VOCABULARY)

requests = st.builds(
    Request,
    bars=st.none() | st.integers(1, 12),
    meter=st.none() | st.sampled_from([(4, 4), (3, 4), (6, 8), (1, 16), (4, 2)]),
    tempo=st.none() | st.integers(20, 320),
    instruments=st.none() | st.lists(st.sampled_from([0, 0, 33, 48, 128]), min_size=1, max_size=5),
)


def check(tokens: np.ndarray, request: Request, max_length: int) -> None:
    TOKENIZER.validate(tokens)
    assert len(tokens) <= max_length
    score = TOKENIZER.decode(tokens)
    assert len(score.tracks) >= 1
    if request.bars is not None:
        assert score.num_bars == request.bars
    if request.tempo is not None:
        assert score.tempos["qpm"].tolist() == [request.tempo]
    if request.meter is not None:
        assert score.meters[["numerator", "denominator"]].tolist() == [request.meter]
    if request.instruments is not None:
        assert sorted(score.instruments.tolist()) == sorted(request.instruments)


@given(requests, st.integers(0, 2**32 - 1), st.integers(0, 150))
@settings(max_examples=200, deadline=None)
def test_any_choice_among_the_allowed_tokens_is_a_valid_piece_that_honours_the_request(request, seed, spare):
    """The worst model there is: it picks at random, with limits down to the shortest piece there can be."""
    rng = np.random.default_rng(seed)
    shortest = 7 + (request.bars or 1) + 6 * len(request.instruments or [0])
    state = ConstrainedState(VOCABULARY, request, shortest + spare)
    while not state.is_finished:
        choices = np.flatnonzero(state.allowed())
        state.push(int(rng.choice(choices)))
    check(np.array(state.tokens), request, shortest + spare)


def test_untrained_models_write_midi_that_opens_everywhere(tmp_path):
    torch.manual_seed(0)
    model = tiny_model()
    request = Request(bars=3, instruments=[128, 33, 0, 0])
    for sampling in (Sampling(), Sampling(temperature=3.0, top_p=1.0), Sampling(temperature=0), Sampling(top_k=5)):
        for sample in generate(model, request, num_samples=3, sampling=sampling, batch_size=2, max_length=200):
            check(sample.tokens, request, 200)
            assert sample.score == TOKENIZER.decode(sample.tokens)


def test_greedy_decoding_takes_the_argmax_of_the_full_forward_pass():
    torch.manual_seed(1)
    model = decided(tiny_model())
    (sample,) = generate(model, Request(bars=2), sampling=Sampling(temperature=0), max_length=150)
    logits = model.logits(sample.tokens).numpy()
    state = ConstrainedState(VOCABULARY, Request(bars=2), 150)
    for position, token in enumerate(sample.tokens.tolist()):
        allowed = state.allowed()
        if position:
            assert token == likeliest(logits[position - 1], allowed), position
        state.push(token)


def test_a_sample_does_not_depend_on_its_batch_mates():
    torch.manual_seed(2)
    model = tiny_model().double()
    request = Request(bars=2, instruments=[128, 33])
    pieces = {
        size: [s.tokens.tolist() for s in generate(model, request, 16, seed=7, batch_size=size, max_length=90)]
        for size in (1, 3, 16)
    }
    assert pieces[1] == pieces[3] == pieces[16]
    assert len({tuple(p) for p in pieces[1]}) == 16
    other = generate(model, request, 1, seed=8, max_length=90)[0].tokens.tolist()
    assert other != pieces[1][0]


def test_sampling_follows_the_filtered_distribution():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    everything = np.ones(4, dtype=bool)

    def shares(sampling: Sampling, allowed=everything) -> list[float]:
        draws = [choose(logits, allowed, u, sampling) for u in (np.arange(2000) + 0.5) / 2000]
        return [round(draws.count(i) / 2000, 2) for i in range(4)]

    assert shares(Sampling(top_p=1.0)) == [0.4, 0.3, 0.2, 0.1]
    assert shares(Sampling(top_p=1.0, top_k=2)) == [0.57, 0.43, 0, 0]
    assert shares(Sampling(top_p=0.65)) == [0.57, 0.43, 0, 0]
    assert shares(Sampling(top_p=1.0, min_p=0.4)) == [0.44, 0.33, 0.22, 0]
    assert shares(Sampling(top_p=1.0, temperature=0)) == [1, 0, 0, 0]
    assert shares(Sampling(top_p=1.0, temperature=0.5)) == [0.53, 0.3, 0.13, 0.03]
    assert shares(Sampling(top_p=1.0), np.array([False, True, False, True])) == [0, 0.75, 0, 0.25]
    with pytest.raises(ValueError, match="finite"):
        choose(np.array([np.nan, 0.0]), np.ones(2, dtype=bool), 0.5, Sampling())


def test_what_ends_a_bar_counts_as_one_event():
    """A model that knows that a bass part is over and expects a guitar, where a violin was asked for, wrote a burst of
    the least unlikely notes, up to 127, at the end of the bass."""
    v = VOCABULARY
    expected = {
        v.instrument(30): 0.9,
        v.instrument(40): 0.01,
        v.EOS: 0.02,
        v.BAR: 0.03,
        v.pitch(60): 0.03,
        v.time(90): 0.01,
    }
    logits = np.full(v.size, -40.0)
    logits[list(expected)] = np.log(list(expected.values()))

    def shares(*allowed: int) -> dict[int, float]:
        mask = np.isin(np.arange(v.size), allowed)
        uniform = (np.arange(1000) + 0.5) / 1000
        host = [choose(logits, mask, u, Sampling(top_p=1.0), v.family_of) for u in uniform]
        many = (
            torch.from_numpy(logits).expand(1000, -1),
            torch.from_numpy(mask).expand(1000, -1),
            torch.from_numpy(uniform),
        )
        device = choose_batch(*many, Sampling(top_p=1.0), torch.from_numpy(v.family_of))[0].tolist()
        assert host == device
        return {token: host.count(token) / 1000 for token in allowed}

    notes = (v.pitch(60), v.time(90))
    assert shares(v.instrument(40), *notes) == {v.instrument(40): 0.96, v.pitch(60): 0.03, v.time(90): 0.01}
    # where the part goes on, a bar line has that share; where several may end the bar, each its part of it
    assert shares(v.BAR, *notes) == {v.BAR: 0.96, v.pitch(60): 0.03, v.time(90): 0.01}
    assert shares(v.instrument(40), v.EOS, *notes)[v.EOS] == 0.64
    assert shares(*notes) == {v.pitch(60): 0.75, v.time(90): 0.25}
    greedy = choose(
        logits, np.isin(np.arange(v.size), [v.instrument(40), *notes]), 0.5, Sampling(temperature=0), v.family_of
    )
    assert greedy == v.instrument(40)


def test_a_family_has_its_own_temperature_and_its_share_stays():
    logits = np.log(np.array([0.4, 0.2, 0.3, 0.1]))
    families, everything = np.array([0, 0, 1, 1]), np.ones(4, dtype=bool)

    def shares(sampling: Sampling) -> list[float]:
        draws = [choose(logits, everything, u, sampling, families) for u in (np.arange(2000) + 0.5) / 2000]
        return [round(draws.count(i) / 2000, 2) for i in range(4)]

    assert shares(Sampling(top_p=1.0, by_family={0: 1.0, 1: 1.0})) == [0.4, 0.2, 0.3, 0.1]
    assert shares(Sampling(top_p=1.0, by_family={0: 0.5})) == [0.48, 0.12, 0.3, 0.1]
    assert shares(Sampling(top_p=1.0, by_family={1: 0})) == [0.4, 0.2, 0.4, 0.0]
    assert shares(Sampling(temperature=0, top_p=1.0, by_family={0: 1.0})) == [0.67, 0.33, 0, 0]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(3)
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def config(checkpoint, tmp_path, **settings) -> GenerateConfig:
    given = {"num_samples": 2, "bars": 2, "max_length": 120, "device": "cpu"}
    return GenerateConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out"), **{**given, **settings})


def test_the_command_writes_midi_pictures_and_a_report(checkpoint, tmp_path, capsys):
    run(config(checkpoint, tmp_path, plot=True, instruments=["drums", "Acoustic Bass"], time_signature="3/4"))
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "generation.json",
        "seed0_000.mid",
        "seed0_000.png",
        "seed0_001.mid",
        "seed0_001.png",
    ]
    report = json.loads((out / "generation.json").read_text())["runs"][0]
    assert [track.name for track in read_score(out / "seed0_000.mid").tracks] == ["Drums", "Acoustic Bass"]
    for sample in report["samples"]:
        notes = sum(len(track.notes) for track in symusic.Score(out / sample["file"]).tracks)
        again = sum(len(track.notes) for track in MidiFile(str(out / sample["file"])).instruments)
        assert notes == again == sample["notes"] > 0
    # another seed joins, the same one is refused and nothing is written over
    run(config(checkpoint, tmp_path, seed=1))
    assert len(json.loads((out / "generation.json").read_text())["runs"]) == 2
    before = (out / "seed0_000.mid").read_bytes()
    with pytest.raises(UserError, match="there already"):
        run(config(checkpoint, tmp_path))
    assert (out / "seed0_000.mid").read_bytes() == before


@pytest.mark.parametrize(
    "runs", ["3", "{}", '{"runs": {}}', '{"runs": [{}]}', '{"runs": [{"samples": [{"file": 1}]}]}']
)
def test_a_report_of_another_program_is_refused(tmp_path, runs):
    """A run without samples was a KeyError."""
    (tmp_path / "generation.json").write_text(runs)
    with pytest.raises(UserError, match=r"generation.json is not this program's: choose another --output"):
        earlier_runs(tmp_path)
    (tmp_path / "generation.json").unlink()
    assert earlier_runs(tmp_path) == []
    (tmp_path / "generation.json").mkdir()
    with pytest.raises(UserError, match=r"generation.json: cannot be read"):
        earlier_runs(tmp_path)


def test_prompts_of_one_name_do_not_write_over_each_other():
    """song.mid twice and a song_2.mid: the number of the second song made it the third one's namesake."""
    settings = GenerateConfig(checkpoint="-", output="-", num_samples=1)
    names = _names(settings, ["a/song.mid", "b/song_2.mid", "c/song.mid", "d/song.mid"])
    assert names == [["song_seed0_000"], ["song_2_seed0_000"], ["song_3_seed0_000"], ["song_4_seed0_000"]]
    assert _names(settings, []) == [["seed0_000"]]


def test_a_bad_task_in_a_list_costs_nothing(checkpoint, tmp_path):
    """The second prompt has no bass to describe; the first one's piece was written before that was said."""
    paths = [tmp_path / "with.mid", tmp_path / "without.mid"]
    for path, instruments in zip(paths, ([0, 33], [0, 40])):
        notes = note_table([(track, 0, 9, 60, 60) for track in range(2)])
        write_midi(Score(24, [Track(i) for i in instruments], notes), path)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    asked = {"prompts_file": str(tmp_path / "list.txt"), "anew": True, "bars": None, "derive": False}
    with pytest.raises(UserError, match="Electric Bass"):
        run(config(checkpoint, tmp_path, track=["program=33"], **asked))
    with pytest.raises(UserError, match="guidance needs a condition"):
        run(config(checkpoint, tmp_path, guidance=2.0, **asked))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="no folder can be made there"):
        run(config(checkpoint, tmp_path, **asked))


def test_a_request_without_a_choice_left_needs_no_model():
    """One bar to fill and just the room to close it: that was called a damaged checkpoint."""
    tokenizer = Tokenizer(VOCABULARY)
    score = Score(24, [Track(0)], note_table([(0, 0, 9, 60, 60), (0, 96, 9, 60, 60)]))
    deferred = tokenizer.defer(tokenizer.encode(score), [(0, 1)])
    head = deferred[: np.flatnonzero(deferred == VOCABULARY.FILL)[0]]
    (sample,) = generate(tiny_model(), Request(given=head), max_length=len(head) + 2)
    assert sample.tokens.tolist() == [*head.tolist(), VOCABULARY.FILL, VOCABULARY.EOS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instruments": ["kazoo"]}, "kazoo"),
        ({"time_signature": "four"}, "time_signature is 'four'"),
        ({"time_signature": "9/2"}, "time_signature is 9/2"),
        ({"bars": 200}, "need at least"),
    ],
)
def test_what_cannot_be_honoured_is_said_before_anything_is_written(checkpoint, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(config(checkpoint, tmp_path, **settings))
    assert not list((tmp_path / "out").glob("*"))


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run(config(tmp_path / "nowhere", tmp_path))
    assert not (tmp_path / "out").exists()


def test_instruments_come_in_the_order_of_the_encoder():
    flags = GenerateConfig(checkpoint="x", output="y", instruments=["violin", "33", "drums", "0"], time_signature="6/8")
    request = read_request(flags)
    assert request.ordered_instruments() == [128, 33, 40, 0]
    assert request.meter == (6, 8)


# --- prompts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def song(tmp_path):
    write_midi(small_score(1), tmp_path / "song.mid")
    return tmp_path / "song.mid"


def test_many_prompts_each_with_its_record(checkpoint, tmp_path, song, capsys):
    (tmp_path / "again").mkdir()
    write_midi(small_score(2), tmp_path / "again" / "song.mid")
    (tmp_path / "list.txt").write_text(f"{song}\n\n{tmp_path / 'again' / 'song.mid'}\n")
    settings = {"bars": None, "prompts_file": str(tmp_path / "list.txt"), "continue_bars": 1, "max_length": 700}
    run(config(checkpoint, tmp_path, **settings, plot=True, prompt_bars=2))
    out = tmp_path / "out"
    assert sorted(p.stem for p in out.glob("*.mid")) == [
        *("song_2_seed0_000", "song_2_seed0_001", "song_seed0_000", "song_seed0_001"),
    ]
    assert len(list(out.glob("*.png"))) == 4
    runs = json.loads((out / "generation.json").read_text())["runs"]
    assert [Path(r["prompt"]).parent.name for r in runs] == [tmp_path.name, "again"]
    for record, source in zip(runs, (small_score(1), small_score(2))):
        for sample in record["samples"]:
            written = read_score(out / sample["file"]).num_notes
            assert written == source.num_notes + sample["notes"]
    said = capsys.readouterr().out
    assert f"in 1 bar of {len(small_score(1).tracks)} tracks" in said and "2 pieces, " in said


def test_the_record_counts_the_notes_that_a_reader_finds(checkpoint, tmp_path, song, capsys):
    """It counted what the model wrote, also where writing the file had dropped some: here every second pitch is held
    into the bar that is rewritten. And a track beyond the stated number was lost without a word."""
    held = [(0, 0, 768, pitch, 80) for pitch in range(0, 128, 2)]
    write_midi(Score(96, [Track(0)], note_table([*held, (0, 400, 48, 61, 80)])), song)
    song.write_bytes(song.read_bytes() + split(song).tracks[-1])
    run(
        config(
            checkpoint, tmp_path, bars=None, prompt=str(song), rewrite=["track=1,bars=2"], max_length=900, num_samples=4
        )
    )
    said = capsys.readouterr().out
    (record,) = json.loads((tmp_path / "out" / "generation.json").read_text())["runs"]
    for sample in record["samples"]:
        assert sample["changes"]["leftover_tracks"] == 1
        assert sample["notes"] == read_score(tmp_path / "out" / sample["file"]).num_notes - len(held)
        assert f"{sample['file']}: {counted(sample['notes'], 'new note')} in 1 bar of 1 track" in said
    assert any("held_dropped" in s["changes"] for s in record["samples"]) and any(s["notes"] for s in record["samples"])
    assert "song.mid: not copied are tracks beyond the stated number: 1" in said


def test_a_bad_prompt_in_the_list_stops_the_run_before_it_begins(checkpoint, tmp_path, song):
    (tmp_path / "letter.mid").write_text("Dear Sir or Madam")
    (tmp_path / "list.txt").write_text(f"# the songs\n{song}\n{tmp_path / 'letter.mid'}\n")
    settings = {"bars": None, "continue_bars": 1, "max_length": 700}
    with pytest.raises(UserError, match=r"list.txt, line 3: .*letter.mid: not a MIDI file .* or export it as MIDI"):
        run(config(checkpoint, tmp_path, **settings, prompts_file=str(tmp_path / "list.txt")))
    with pytest.raises(UserError, match=r"song.mid: is no text file"):
        run(config(checkpoint, tmp_path, **settings, prompts_file=str(song)))
    with pytest.raises(UserError, match=r"nowhere: No such file"):
        run(config(checkpoint, tmp_path, **settings, prompts_file="nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_part_in_chosen_bars_by_the_command(checkpoint, tmp_path, song, capsys):
    settings = {"bars": None, "prompt": str(song), "num_samples": 1, "max_length": 700}
    run(config(checkpoint, tmp_path, **settings, add_instruments=["73"], add_bars="2", only_new=True))
    assert "in 1 bar of 1 track" in capsys.readouterr().out
    (written,) = (tmp_path / "out").glob("*.mid")
    score = read_score(written)
    lines = TOKENIZER.quantize(small_score(1)).bar_lines() / VOCABULARY.resolution * score.ticks_per_quarter
    assert score.num_notes and lines[1] <= score.notes["onset"].min() and score.notes["onset"].max() < lines[2]
    for wrong in ({"add_bars": "2"}, {"add_instruments": ["73"], "add_bars": "2", "prompt_bars": 1}):
        asked = {"continue_bars": 1} if "add_instruments" not in wrong else {}
        with pytest.raises(UserError, match="--add_bars says where --add_instruments play"):
            config(checkpoint, tmp_path, **settings, **asked, **wrong).validate()


def test_an_interrupted_command_leaves_no_empty_folder(checkpoint, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("meloformer.generation.command.generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config(checkpoint, tmp_path))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(config(checkpoint, tmp_path))
    assert (tmp_path / "out").is_dir()  # it was there before


# --- sound --------------------------------------------------------------------------------------------------------


def test_sound_is_whole_or_absent_and_what_is_missing_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install fluidsynth"):
        run(config(checkpoint, tmp_path, wav=True))
    assert not (tmp_path / "out").exists()
    program, font, midi = tmp_path / "fluidsynth", tmp_path / "a.sf2", tmp_path / "a.mid"
    program.write_text(
        '#!/bin/sh\nfor last; do :; done\n[ -s "$last" ] || { echo no music >&2; exit 1; }\n: > "${8}"\n'
    )
    program.chmod(0o755)
    with pytest.raises(UserError, match=r"a.sf2: no such file"):
        Synthesizer(font)
    font.touch()
    midi.touch()
    with pytest.raises(UserError, match=r"a.mid: FluidSynth made no sound of it \(no music\)"):
        Synthesizer(font).render(midi, tmp_path / "a.wav")
    midi.write_text("music")
    Synthesizer(font).render(midi, tmp_path / "a.wav")
    assert sorted(path.name for path in tmp_path.glob("*a.*")) == ["a.mid", "a.sf2", "a.wav"]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -1}, "temperature is -1, must be at least 0"),
        ({"by_family": {8: -0.5}}, "temperature is -0.5"),
        ({"top_p": 0}, "top_p is 0, must be above 0, at most 1"),
        ({"top_k": -3}, "top_k is -3"),
        ({"min_p": 2}, "min_p is 2"),
    ],
)
def test_sampling_that_means_nothing_is_refused_in_python_too(sampling, message):
    """The command refused it; from Python a temperature of -1 wrote what is least likely."""
    with pytest.raises(UserError, match=message):
        Sampling(**sampling)


def test_a_request_that_cannot_be_honoured_is_refused_in_python_too():
    """Half a beat a minute was dropped, and no tokens at all meant as many as there may be."""
    with pytest.raises(UserError, match=r"tempo is 90.5, must be a whole number"):
        generate(tiny_model(), Request(bars=1, tempo=90.5))
    with pytest.raises(UserError, match="max_length is 0"):
        generate(tiny_model(), Request(bars=1), max_length=0)
