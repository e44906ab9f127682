"""generate.py for a FractalMIDI checkpoint: what stays, what is written, and what is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meloformer.command_line import load
from meloformer.errors import UserError
from meloformer.fractal import pictures
from meloformer.fractal.command import plan, run
from meloformer.fractal.pictures import BOTTOM, LEFT, RIGHT, TOP
from meloformer.fractal.request import FractalGenerateConfig
from meloformer.fractal.roll import read_roll, write_roll
from meloformer.midi import Score, Track, note_table, read_score, write_midi
from tests.fractal.small import random_roll, small_model

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model = small_model("mar", "mar", "mar")
    model.crop_length = 64
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def song(tmp_path_factory) -> Path:
    """102 columns, with drums, a resolution of 96, 3/4 and two tempos."""
    path = tmp_path_factory.mktemp("song") / "song.mid"
    rng = np.random.default_rng(1)
    rows = [(0, 24 * int(c), 24, int(p), int(v)) for c, p, v in rng.integers((0, 40, 1), (100, 90, 128), (80, 3))]
    rows += [(0, 24 * 101, 24, 60, 80), (1, 0, 24, 38, 100)]
    tracks = [Track(33), Track(0, is_drum=True)]
    write_midi(Score(96, tracks, note_table(rows), [(0, 3, 4)], [(0, 90), (288, 150)]), path)
    return path


@pytest.fixture
def config(checkpoint, tmp_path) -> FractalGenerateConfig:
    return FractalGenerateConfig(
        checkpoint=checkpoint,
        output=str(tmp_path / "out"),
        num_samples=3,
        batch_size=2,
        num_iter_list=[2, 1, 1, 1],
        sparsity_bias=2.0,
        device="cpu",
    )


def read(config: FractalGenerateConfig, name: str, width: int) -> np.ndarray:
    """A written roll with the silence at its end."""
    roll = read_roll(Path(config.output) / name)[0]
    return np.pad(roll, ((0, 0), (0, width - roll.shape[1])))


def test_rolls_from_nothing(config, capsys):
    run(config)
    out = Path(config.output)
    names = [f"unconditional_seed0_{i:03d}" for i in range(3)]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["generation.json", *(f"{name}{suffix}" for name in names for suffix in (".mid", ".png"))]
    )
    (record,) = json.loads((out / "generation.json").read_text())["runs"]
    assert record["settings"]["num_iter_list"] == [2, 1, 1, 1]
    for name, entry in zip(names, record["samples"]):
        roll = read(config, f"{name}.mid", 64)
        assert roll.any() and entry["file"] == f"{name}.mid" and entry["columns"] == 64
        assert entry["sounding_share"] == pytest.approx((roll > 0).mean(), abs=1e-5)
        score = read_score(out / f"{name}.mid")
        assert score.meters.tolist() == [(0, 4, 4)] and score.tempos["qpm"].tolist() == [120]
    said = capsys.readouterr().out
    assert "3 rolls in" in said and f"{out / names[2]}.mid: 4 bars" in said


def test_rounds_of_ar_levels_are_said_to_choose_nothing(config, tmp_path, capsys):
    model = small_model("ar", "mar", "ar")
    model.crop_length = 16
    model.save_pretrained(tmp_path / "ar")
    mixed = replace(config, checkpoint=str(tmp_path / "ar"), target_width=4, num_samples=1)
    run(mixed)
    said = capsys.readouterr().out
    assert "--num_iter_list 2 1 1 1: numbers 1, 3 choose nothing, ar levels go patch by patch" in said
    run(replace(mixed, num_iter_list=[12, 8, 4, 1], output=str(tmp_path / "default")))
    run(replace(config, target_width=4, num_samples=1, output=str(tmp_path / "mar")))
    assert "nothing" not in capsys.readouterr().out


def test_what_was_written_is_framed(config, song):
    """Only there, and nowhere in a roll that is new throughout."""
    image = pytest.importorskip("PIL.Image")
    run(replace(config, mode="conditional", prompt=str(song), condition_length=32, target_width=48, num_samples=1))
    run(replace(config, seed=1, num_samples=1))

    def framed(name: str) -> list[int]:
        with image.open(Path(config.output) / name) as png:
            return sorted(set(np.nonzero((np.array(png) == pictures.FRAME).all(axis=-1))[1].tolist()))

    seen = framed("song_conditional_32_seed0_000.png")
    assert (seen[0], seen[-1]) == (pictures.LEFT + 32 * pictures.SCALE, pictures.LEFT + 48 * pictures.SCALE - 1)
    assert not framed("unconditional_seed1_000.png")


def test_a_sample_does_not_depend_on_its_batch_and_the_seed_moves_it(config, tmp_path):
    run(config)
    run(replace(config, output=str(tmp_path / "other"), batch_size=3))
    run(replace(config, seed=1))
    first = (Path(config.output) / "unconditional_seed0_002.mid").read_bytes()
    assert first == (tmp_path / "other" / "unconditional_seed0_002.mid").read_bytes()
    assert first != (Path(config.output) / "unconditional_seed1_002.mid").read_bytes()


def test_a_continuation_keeps_the_beginning_and_the_tempo(config, song):
    run(replace(config, mode="conditional", prompt=str(song), condition_length=50, target_width=96))
    piece = read_roll(song)[0]
    rolls = [read(config, f"song_conditional_50_seed0_{i:03d}.mid", 96) for i in range(3)]
    for roll in rolls:
        assert np.array_equal(roll[:, :50], piece[:, :50])
        assert roll[:, 50:].any()
    assert not np.array_equal(rolls[0], rolls[1])
    score = read_score(Path(config.output) / "song_conditional_50_seed0_000.mid")
    assert score.meters.tolist() == [(0, 3, 4)] and score.tempos["qpm"].round(3).tolist() == [90, 150]
    assert score.tempos["tick"].tolist() == [0, 288]


def test_a_given_tempo_is_the_whole_roll_s(config, song):
    run(replace(config, mode="conditional", prompt=str(song), tempo=100.0, num_samples=1))
    score = read_score(Path(config.output) / "song_conditional_32_seed0_000.mid")
    assert score.tempos["qpm"].tolist() == [100]


def test_inpainting_keeps_every_other_cell_of_the_whole_piece(config, song):
    """102 columns, of which the model sees 64 around the mask."""
    run(replace(config, mode="inpainting", prompt=str(song), mask_start=60, mask_end=75, gif=True))
    piece = np.pad(read_roll(song)[0], ((0, 0), (0, 2)))
    for i in range(3):
        roll = read(config, f"song_inpainting_60-75_seed0_{i:03d}.mid", 104)
        assert np.array_equal(roll[:, :60], piece[:, :60]) and np.array_equal(roll[:, 75:], piece[:, 75:])
        assert not np.array_equal(roll[:, 60:75], piece[:, 60:75])
    from PIL import Image

    with Image.open(Path(config.output) / "song_inpainting_60-75_seed0_000.gif") as gif:
        assert gif.n_frames == 3  # before, and after each of two rounds; the finished roll is the last one again
        assert gif.size == (64 * 3, 128 * 3)


@pytest.mark.parametrize(
    ("start", "end", "first", "width"),
    [(0, 10, 0, 64), (40, 60, 18, 64), (100, 104, 40, 64), (0, 104, 0, 104), (150, 160, 0, 160)],
)
def test_the_model_s_window_lies_around_the_mask_inside_the_roll(config, song, start, end, first, width):
    config = replace(config, mode="inpainting", prompt=str(song), mask_start=start, mask_end=end)
    task = plan(config, width)
    assert task.first == first and len(task.keep) == width
    assert np.flatnonzero(~task.keep).tolist() == list(range(start - first, end - first))


def test_quiet_cells_are_silenced_but_not_the_prompt_s(config, song):
    run(replace(config, mode="conditional", prompt=str(song), velocity_threshold=100, num_samples=1))
    roll, piece = read(config, "song_conditional_32_seed0_000.mid", 64), read_roll(song)[0]
    assert np.array_equal(roll[:, :32], piece[:, :32]) and (piece[:, :32][piece[:, :32] > 0] < 100).any()
    assert roll[:, 32:].any() and roll[:, 32:][roll[:, 32:] > 0].min() >= 100


def test_the_square_picture(config):
    from PIL import Image

    run(replace(config, num_samples=1, stacked=True))
    with Image.open(Path(config.output) / "unconditional_seed0_000.png") as image:
        around = (LEFT + RIGHT, 2 * (TOP + BOTTOM))
        assert image.size == (32 * 3 + around[0], 256 * 3 + around[1])


def test_what_an_earlier_run_wrote_is_not_written_over(config):
    run(config)
    with pytest.raises(UserError, match=r"unconditional_seed0_000.mid is there already: choose another --seed"):
        run(config)


# --- refusals: one line, and nothing written --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_width": 130}, r"target_width is 130, must be a multiple of 4 from 4 to 1024; 132 is the nearest"),
        ({"target_width": 2048}, r"target_width is 2048, .*; 1024 is the nearest"),
        ({"num_iter_list": [0, 1, 1]}, r"num_iter_list is \[0, 1, 1\], must be numbers from 1 on"),
        ({"num_iter_list": [4]}, r"--num_iter_list 4: 1 numbers, and .* has 3 levels; give 3, or 4"),
        ({"temperature": -1.0}, r"temperature is -1.0, must be at least 0"),
        ({"temperature": float("inf")}, r"temperature is inf, must be at least 0 and finite"),
        ({"sparsity_bias": float("inf")}, r"sparsity_bias is inf, must be a finite number"),
        ({"seed": 2**63}, r"seed is 9223372036854775808, must be from 0 to 2\*\*63 - 1"),
        ({"velocity_threshold": 128}, r"velocity_threshold is 128, must be from 0 to 127"),
        ({"mode": "conditional"}, r"--mode conditional needs a MIDI file; give --prompt"),
        ({"prompt": "SONG"}, r"--prompt goes with --mode conditional or inpainting, and the mode is unconditional"),
        ({"mask_end": 5}, r"--mask_end goes with --mode inpainting"),
        ({"mode": "inpainting", "prompt": "SONG"}, r"--mode inpainting needs --mask_start"),
        (
            {"mode": "inpainting", "prompt": "SONG", "mask_start": 9, "mask_end": 9},
            r"mask_start is 9, .*below mask_end",
        ),
        ({"mode": "inpainting", "prompt": "SONG", "mask_start": -1, "mask_end": 9}, r"mask_start is -1"),
        ({"mode": "inpainting", "prompt": "SONG", "mask_start": 90, "mask_end": 120}, r"--mask_end is 120, and .* 104"),
        (
            {"mode": "inpainting", "prompt": "SONG", "mask_start": 1, "mask_end": 99},
            r"98 columns, .*raise --target_width",
        ),
        ({"mode": "conditional", "prompt": "SONG", "condition_length": 64}, r"--condition_length is 64, must be below"),
        ({"mode": "conditional", "prompt": "SONG", "condition_length": 0}, r"condition_length is 0"),
        (
            {"mode": "conditional", "prompt": "SONG", "condition_length": 110, "target_width": 128},
            r"--condition_length is 110, and .*song.mid has 102 columns",
        ),
        ({"mode": "conditional", "prompt": "nowhere.mid"}, r"nowhere.mid: cannot be read"),
        ({"checkpoint": "nowhere"}, r"nowhere: no model there"),
        ({"device": "tpu"}, r"device is 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(config, song, changes, message):
    changes = {name: str(song) if value == "SONG" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        run(replace(config, **changes))
    assert "\n" not in str(caught.value)
    assert not Path(config.output).exists()


def test_a_prompt_of_drums_alone_is_refused(config, tmp_path):
    write_midi(Score(96, [Track(0, is_drum=True)], note_table([(0, 0, 96, 38, 90)])), tmp_path / "drums.mid")
    with pytest.raises(UserError, match=r"drums.mid: no pitched notes"):
        run(replace(config, mode="conditional", prompt=str(tmp_path / "drums.mid")))


def test_the_documented_command_lines(song):
    words = (
        "--checkpoint runs/fractal --mode inpainting --prompt a.mid --mask_start 64 --mask_end 192 --output out/ --gif"
    )
    config = load(FractalGenerateConfig, words.split())
    assert (config.mode, config.mask_start, config.mask_end, config.gif) == ("inpainting", 64, 192, True)
    words = (
        "--checkpoint runs/fractal --mode unconditional --target_width 256 --num_samples 10 --num_iter_list 12 8 4 1"
    )
    config = load(FractalGenerateConfig, [*words.split(), "--output_dir", "out/"])
    assert config.num_iter_list == [12, 8, 4, 1] and config.output == "out/"


def test_generate_knows_the_family_by_the_checkpoint(config, tmp_path):
    words = ["generate.py", "--checkpoint", config.checkpoint, "--output", str(tmp_path / "out")]
    flags = ["--num_samples", "1", "--num_iter_list", "1", "1", "1", "--device", "cpu"]
    done = subprocess.run([sys.executable, *words, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "out" / "unconditional_seed0_000.mid").is_file()
    wrong = subprocess.run(
        [sys.executable, *words, "--bars", "4"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert wrong.returncode == 2 and wrong.stderr.strip() == (
        "error: --bars: no such flag; --help lists those of the family fractal"
    )


def test_random_rolls_are_kept_cell_for_cell(config, tmp_path):
    """A prompt as dense as noise: nothing of it may move, whatever the model writes beside it."""
    roll = random_roll(64, share=0.6)[0]
    roll[64, -1] = 127  # so that the file is as wide
    write_roll(roll, tmp_path / "noise.mid")
    run(replace(config, mode="inpainting", prompt=str(tmp_path / "noise.mid"), mask_start=20, mask_end=30))
    again = read(config, "noise_inpainting_20-30_seed0_000.mid", 64)
    kept = np.r_[0:20, 30:64]
    assert np.array_equal(again[:, kept], roll[:, kept])
