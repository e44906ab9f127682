"""A corpus and a config so small that a run of ten steps takes a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meloformer.config import Config, DataConfig, ModelConfig, PreprocessConfig, TrainingConfig
from meloformer.data.preprocess import preprocess
from meloformer.midi import write_midi
from meloformer.midi.score import Score, Track, note_table

PIECES, BARS = 12, 12


def small_score(seed: int) -> Score:
    """Drums, a bass and a lead that share a random rhythm, 12 bars of 4/4."""
    rng = np.random.default_rng(seed)
    rows = []
    for bar in range(BARS):
        for beat in range(4):
            tick = (4 * bar + beat) * 480
            rows.append((0, tick, 120, int(rng.choice([36, 38, 42])), 100))
            if rng.random() < 0.7:
                rows.append((1, tick, 400, int(rng.integers(30, 45)), 80))
                rows.append((2, tick + 240 * int(rng.integers(2)), 240, int(rng.integers(60, 80)), 90))
    tracks = [Track(program=0, is_drum=True), Track(program=33), Track(program=80)]
    return Score(480, tracks, note_table(rows))


def write_corpus(folder: Path) -> Path:
    """PIECES such scores, preprocessed."""
    (folder / "midi").mkdir()
    for seed in range(PIECES):
        write_midi(small_score(seed), folder / "midi" / f"{seed:02d}.mid")
    preprocess(PreprocessConfig(input=str(folder / "midi"), output=str(folder / "shards")))
    return folder / "shards"


def small_config(corpus: Path, run: Path, model: dict | None = None, data: dict | None = None, **training) -> Config:
    """Rows of half a piece, four a step: 4 steps an epoch. Sections by dict, fields of TrainingConfig by name."""
    model = {"n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 48, "dropout": 0.1, **(model or {})}
    data = {"max_seq_len": 384, "validation_fraction": 0.2, **(data or {})}
    given = {"device": "cpu", "precision": "fp32", "val_interval": 4, "save_interval": 100, "log_interval": 1}
    given |= {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "warmup_steps": 2}
    config = Config(
        model=ModelConfig(size="small", **model),
        data=DataConfig(data_dir=str(corpus), **data),
        training=TrainingConfig(output_dir=str(run), **{**given, "num_workers": 1, **training}),
    )
    config.validate()
    return config
