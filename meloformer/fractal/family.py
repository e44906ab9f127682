"""Piano rolls, FractalMIDI's family, for the training loop: crops, model, likelihood, pictures of what it generates.

    runs/fractal/checkpoints/step_00005000-val_loss_0.0234/    named as the documents name them; the best three are kept
    runs/fractal/generation_gifs/step_0005000_sample_0.gif     how a roll comes about, with matplotlib and Pillow
    runs/fractal/samples/step_0005000_sample_0.mid, .png

>>> family = Rolls(FractalConfig(data=FractalData(train_data="train.txt")))   # doctest: +SKIP

What surprises: --resume_from_checkpoint with another crop length does not resume. It takes the weights alone and begins
a run of its own, which is how a model trained on 128 columns is fine-tuned on 256.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from meloformer.data import Step
from meloformer.errors import UserError
from meloformer.evaluation.likelihood import split_batches
from meloformer.fractal.config import FractalModel
from meloformer.fractal.dataset import RollCorpus, RollPlan
from meloformer.fractal.likelihood import evaluate_likelihood
from meloformer.fractal.model import FractalMIDI
from meloformer.fractal.pictures import can_draw, picture, write_gif, write_png
from meloformer.fractal.roll import NUM_PITCHES, write_roll
from meloformer.fractal.sampling import preview_rounds, sample
from meloformer.training import checkpoint
from meloformer.training.distributed import Ranks
from meloformer.training.family import ModelFamily, Preview, adopt_settings
from meloformer.wording import counted

STRIP = 8  # frames of a generation beside each other in TensorBoard, which shows no GIF


class Rolls(ModelFamily):
    """A run of FractalMIDI; `config` is a meloformer.fractal.config.FractalConfig."""

    unit = "cells"
    hold_out_more = "list more in --val_data"
    free: ClassVar = {
        "training": ("val_batch_size", "save_top_k", "num_images_to_log", "generation_length", "preview_num_iter_list"),
        "data": ("train_data", "val_data", "cache_in_memory"),
    }
    board_tags: ClassVar = {"validation/nats_per_cell": "val_loss", "train/lr": "lr"}

    @property
    def keep_best(self) -> int:
        return self.settings.save_top_k

    def begin(self) -> tuple[str, str | None]:
        words = self.config.model.generator_types
        if len(words) > self.config.model.num_generators and len(set(words)) > 1:  # else it chooses what it says
            last = words[-1]
            print(f"generator_types: the last word ({last}) chooses nothing, that level is the velocity head")
        resume = self.settings.resume
        if resume in ("never", "auto"):
            return super().begin()
        found = checkpoint.find(resume)
        saved = checkpoint.read_state(found).get("config", {})
        crop, theirs = self.config.data.crop_length, saved.get("data", {}).get("crop_length")
        if theirs in (None, crop):
            return super().begin()
        print(f"{found} was trained at crop_length {theirs}, not {crop}: its weights are taken, for a run of its own")
        return "never", str(found)

    # --- data -------------------------------------------------------------------------------------------------

    def open_data(self, epoch: int) -> RollPlan:
        data = self.config.data
        self.corpus = RollCorpus(data)
        self.data_hash, self.data_from = self.corpus.hash, f"--train_data {data.train_data}"
        self.validation = RollPlan(self.corpus, data, self.settings.seed, 0, "validation")
        if self.settings.patience and self.validation.num_rows == 0:
            raise UserError(f"training.patience is {self.settings.patience}, and nothing is held out; give --val_data")
        return self.plan(epoch)

    def plan(self, epoch: int) -> RollPlan:
        return RollPlan(self.corpus, self.config.data, self.settings.seed, epoch, "train")

    @property
    def num_held_out(self) -> int:
        return len(self.corpus.pieces["validation"])

    def coordinates(self, step: Step) -> str:
        return ", ".join(str(crop) for rows in step.documents for crops in rows for crop in crops)

    # --- model ------------------------------------------------------------------------------------------------

    def build(self) -> FractalMIDI:
        model = FractalMIDI(self.config.model, self.config.data.crop_length)
        model.head.begin_at(self.corpus.velocities)
        return model

    def open_pretrained(self, path: str) -> FractalMIDI:
        return FractalMIDI.from_pretrained(path)

    def adopt(self, saved: dict[str, Any], where: str) -> None:
        model = self.config.model
        kinds = FractalModel.from_dict(saved, f"{where}: model").kinds
        if model.kinds != kinds:
            raise UserError(
                f"model.generator_types is {','.join(model.kinds)}, and {where} was trained with {','.join(kinds)}: ar "
                f"and mar weights do not interchange; give --generator_types {','.join(kinds)}"
            )
        free = {"dropout", "silent_fraction", "mask_ratio_loc", "mask_ratio_scale", "generator_types", "patch_size"}
        values, wrong = adopt_settings(asdict(model), asdict(FractalModel()), saved, free)
        if wrong is not None:
            raise UserError(
                f"model.{wrong} is {getattr(model, wrong)!r}, and {where} was trained with {saved[wrong]!r}; "
                "leave it out"
            )
        self.config.model = FractalModel(**values)

    # --- what it says -----------------------------------------------------------------------------------------

    def statistics(self, metrics: dict[str, Tensor], ranks: Ranks) -> dict[str, Any]:
        """Of the step that is logged: nats per cell of silence and of what sounds, and by level how many problems were
        computed and what share of their patches was masked."""
        names = ("nats", "count", "masked", "patches", "problems")
        levels = len(self.config.model.kinds)
        zeros = [np.zeros(2)] * 2 + [np.zeros(levels)] * 3
        found = [metrics[name].cpu().double().numpy() for name in names] if metrics else zeros
        nats, count, masked, patches, problems = ranks.sum_arrays(*found)
        cells = max(count.sum(), 1)
        return {
            "nats_silent": nats[0] / cells,
            "nats_sounding": nats[1] / cells,
            "levels": {
                str(i): {"masked": masked[i] / max(patches[i], 1), "problems": problems[i]} for i in range(levels)
            },
        }

    def evaluate(self, model: FractalMIDI, precision: torch.dtype, ranks: Ranks) -> dict[str, Any]:
        settings = self.settings
        share = (ranks.rank, ranks.world_size)
        batches = split_batches(self.validation, settings.val_batch_size, settings.val_max_rows, *share)
        return evaluate_likelihood(model, batches, precision, ranks.sum_arrays)

    def score(self, result: dict[str, Any]) -> float:
        return result["nats_per_cell"]

    def score_words(self, score: float) -> str:
        return f"{score:.4f} nats a cell"

    def validation_line(self, result: dict[str, Any]) -> str:
        return (
            f"{self.score_words(result['nats_per_cell'])}, {result['of_unigram']:.3f} of the unigram entropy "
            f"{result['unigram_nats_per_cell']:.4f};  {result['silent']['share']:.0%} of it for silence;  "
            f"{counted(result['rolls'], 'roll')}"
        )

    def checkpoint_name(self, step: int, score: float | None) -> str:
        name = super().checkpoint_name(step, score)
        return name if score is None or not math.isfinite(score) else f"{name}-val_loss_{score:.4f}"

    def preview(self, model: FractalMIDI, folder: Path, step: int) -> Preview:
        """`num_images_to_log` rolls from nothing, the same random numbers every time, beside as many held-out ones."""
        settings = self.settings
        count, width = settings.num_images_to_log, settings.generation_length or self.config.data.crop_length
        frames: list[np.ndarray] = []
        nothing = np.zeros((count, NUM_PITCHES, width), dtype=np.uint8)
        rolls = sample(
            model,
            nothing,
            nothing > 0,
            settings.preview_num_iter_list or preview_rounds(len(model.levels)),
            seed=settings.seed,
            on_step=lambda roll, known: frames.append(roll),
        )
        stem = f"step_{step:07d}_sample_"
        made = Preview()
        (folder / "samples").mkdir(exist_ok=True)
        for i, roll in enumerate(rolls):
            made.files.append(folder / "samples" / f"{stem}{i}.mid")
            write_roll(roll, made.files[-1])
        if not can_draw():
            return made
        (folder / "generation_gifs").mkdir(exist_ok=True)
        for i, roll in enumerate(rolls):
            made.files.append(folder / "samples" / f"{stem}{i}.png")
            write_png(roll, made.files[-1])
            made.files.append(folder / "generation_gifs" / f"{stem}{i}.gif")
            write_gif([frame[i] for frame in frames], made.files[-1])
        shown = [frames[i][0] for i in np.linspace(0, len(frames) - 1, min(STRIP, len(frames))).astype(int)]
        real = [self.validation.row(i)[0]["roll"] for i in range(min(count, self.validation.num_rows))]
        for tag, pictures in (("ground_truth", real), ("generated", rolls), ("generation_preview", shown)):
            if len(pictures):
                made.images[f"val/{tag}"] = stacked_pictures([picture(roll) for roll in pictures])
        return made

    def about_model(self) -> str:
        m = self.config.model
        levels = zip(m.kinds, m.embed_dim_list, m.num_blocks_list, m.num_heads_list)
        words = [f"{kind} {blocks} x {width} ({heads} heads)" for kind, width, blocks, heads in levels]
        return f"{', '.join(words)}, velocity head; sizes {' '.join(map(str, m.img_size_list))}"

    def about_data(self, plan: RollPlan) -> list[tuple[str, str]]:
        corpus, length, loss = self.corpus, self.config.data.crop_length, self.corpus.loss
        pieces = {split: len(numbers) for split, numbers in corpus.pieces.items()}
        refused = f"{counted(len(corpus.refused), 'file')}; {corpus.refused[0]}" if corpus.refused else "nothing"
        return [
            (
                "data",
                f"{counted(corpus.num_pieces, 'piece')}, {int(corpus.widths.sum()):,} columns of a sixteenth note",
            ),
            (
                "training",
                f"{counted(pieces['train'], 'piece')} in {counted(plan.num_rows, 'crop')} of {length} columns an epoch",
            ),
            ("held out", f"{counted(self.num_held_out, 'piece')} in {counted(self.validation.num_rows, 'roll')}"),
            ("lost", f"{loss.lost:,} of {loss.notes:,} notes ({loss.share:.1%}), which no roll can show"),
            ("refused", refused),
        ]

    def about_step(self, plan: RollPlan, rows: int) -> str:
        return f"{rows * NUM_PITCHES * self.config.data.crop_length:,} cells"


def stacked_pictures(pictures: list[np.ndarray], gap: int = 6) -> np.ndarray:
    """Pictures (H, W, 3) of one size under one another, a white line between them."""
    line = np.full((gap, *pictures[0].shape[1:]), 255, dtype=np.uint8)
    return np.concatenate([part for image in pictures for part in (image, line)][:-1])
