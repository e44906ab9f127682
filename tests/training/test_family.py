"""A third family, made of what meloformer.training.family asks for and no more: whoever writes one starts here."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from meloformer.errors import UserError
from meloformer.evaluation.likelihood import split_batches
from meloformer.families import FAMILIES, FamilyParts, command_of, config_class, family_of_command_line
from meloformer.loop_config import LoopConfig
from meloformer.settings import Settings, option
from meloformer.training.family import ModelFamily, Preview
from meloformer.training.loop import train
from tests.conftest import ROOT


@dataclass(kw_only=True)
class CoinModel(Settings):
    dropout: float = option(0.0, "the loop reads it: without dropout no seed is drawn")


@dataclass(kw_only=True)
class CoinData(Settings):
    heads: float = option(0.9, "share of heads")


@dataclass(kw_only=True)
class CoinConfig(Settings):
    family: Literal["coin"] = option("coin")
    model: CoinModel = field(default_factory=CoinModel)
    data: CoinData = field(default_factory=CoinData)
    training: LoopConfig = field(default_factory=LoopConfig)


class CoinPlan:
    """Eight rows of sixteen coins; validation has other ones, the same in every epoch."""

    num_rows = 8

    def __init__(self, heads: float, number: int):
        self.heads, self.number = heads, number

    def row(self, row: int) -> tuple[dict[str, np.ndarray], list[str]]:
        coins = np.random.default_rng([self.number, row]).random(16) < self.heads
        return {"coins": coins, "valid": np.ones(16, dtype=bool)}, [f"toss {row}"]

    def empty_row(self) -> dict[str, np.ndarray]:
        return {"coins": np.zeros(16, dtype=bool), "valid": np.zeros(16, dtype=bool)}

    def num_targets(self, batch: dict[str, np.ndarray]) -> int:
        return int(batch["valid"].sum())


class Coin(nn.Module):
    """One logit: how likely heads are."""

    def __init__(self, config: CoinModel):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.logit = nn.Parameter(torch.zeros(1))

    @property
    def device(self) -> torch.device:
        return self.logit.device

    def num_parameters(self) -> int:
        return 1

    def prepare(self, batch):
        return torch.from_numpy(batch["coins"][batch["valid"]]).float().to(self.device)

    def training_loss(self, coins):
        nats = nn.functional.binary_cross_entropy_with_logits(self.logit.expand_as(coins), coins, reduction="sum")
        return nats, len(coins), {"heads": coins.sum().detach()}

    def save_pretrained(self, folder) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps({"family": "coin"}))


class Coins(ModelFamily):
    unit = "coins"
    hold_out_more = "toss more"

    def open_data(self, epoch):
        self.data_hash, self.data_from = f"{self.config.data.heads}", "--heads"
        self.validation = CoinPlan(self.config.data.heads, 1_000_000)
        return self.plan(epoch)

    @property
    def num_held_out(self):
        return self.validation.num_rows

    def plan(self, epoch):
        return CoinPlan(self.config.data.heads, epoch)

    def coordinates(self, step):
        return str(step.documents)

    def build(self):
        return Coin(self.config.model)

    def open_pretrained(self, path):
        model = self.build()
        model.load_state_dict(load_file(Path(path) / "model.safetensors"))
        return model

    def adopt(self, saved, where):
        self.config.model = CoinModel(**saved)

    def evaluate(self, model, precision, ranks):
        sums = np.zeros(2)
        with torch.no_grad():
            for batch in split_batches(self.validation, self.settings.batch_size, None, ranks.rank, ranks.world_size):
                nats, count, _ = model.training_loss(model.prepare(batch))
                sums += nats.item(), count
        nats, count = ranks.sum_arrays(sums)[0]
        return {"nats_per_coin": nats / count}

    def score(self, result):
        return result["nats_per_coin"]

    def score_words(self, score):
        return f"{score:.3f} nats a coin"

    def validation_line(self, result):
        return self.score_words(self.score(result))

    def preview(self, model, folder, step):
        return Preview()

    def about_model(self):
        return "a coin"

    def about_data(self, plan):
        return [("data", f"{plan.num_rows} rows")]

    def about_step(self, plan, rows):
        return f"{16 * rows} coins"


def coin_config(folder: Path, **training) -> CoinConfig:
    given = {"device": "cpu", "precision": "fp32", "batch_size": 2, "gradient_accumulation_steps": 2}
    given |= {"learning_rate": 0.1, "weight_decay": 0.0, "val_interval": 10, "save_interval": 10, "log_interval": 5}
    config = CoinConfig(training=LoopConfig(output_dir=str(folder), **{**given, **training}))
    config.validate()
    return config


def test_a_family_of_its_own_trains_saves_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FAMILIES, "coin", FamilyParts(train=(f"{__name__}:CoinConfig", f"{__name__}:Coins")))
    assert train(coin_config(tmp_path / "whole", max_steps=40)) == 0
    assert "best validation" in capsys.readouterr().out
    whole = load_file(tmp_path / "whole" / "checkpoints" / "step_00000040" / "model.safetensors")["logit"]
    assert 1.5 < whole.item() < 3.0  # heads nine times in ten: log 9 is 2.2
    kinds = Counter(json.loads(line)["kind"] for line in (tmp_path / "whole" / "metrics.jsonl").open())
    assert kinds == {"train": 8, "validation": 4}

    finished = coin_config(tmp_path / "whole", max_steps=40, resume="auto")
    assert train(finished) == 0 and "nothing to resume" in capsys.readouterr().out
    start = str(tmp_path / "whole" / "checkpoints" / "step_00000040")
    assert train(coin_config(tmp_path / "tuned", max_steps=1, init_from=start, learning_rate=1e-9, min_lr=0)) == 0
    tuned = load_file(tmp_path / "tuned" / "checkpoints" / "step_00000001" / "model.safetensors")["logit"]
    torch.testing.assert_close(tuned, whole)


@dataclass(kw_only=True)
class TossConfig(Settings):
    family: Literal["coin"] = option("coin")
    checkpoint: str = option("", "a coin")


def toss(config: TossConfig) -> None:
    print(f"tossed {config.checkpoint}")


def test_generate_and_evaluate_find_it_too(tmp_path, monkeypatch, capsys):
    here = FamilyParts(
        train=(f"{__name__}:CoinConfig", f"{__name__}:Coins"), generate=(f"{__name__}:TossConfig", f"{__name__}:toss")
    )
    (tmp_path / "config.json").write_text('{"family": "coin"}')
    words = ["generate.py", "--checkpoint", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="a model of the family 'coin'; there are meloformer, fractal"):
        family_of_command_line()
    monkeypatch.setitem(FAMILIES, "coin", here)
    runpy.run_path(str(ROOT / "generate.py"))["main"]()
    assert capsys.readouterr().out == f"tossed {tmp_path}\n"
    with pytest.raises(UserError, match=r"evaluate.py: the family coin has no such command"):
        runpy.run_path(str(ROOT / "evaluate.py"))["main"]()
    assert config_class("coin", "generate") is TossConfig and command_of("coin", "generate") is toss
