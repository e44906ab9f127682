"""Token streams, MeloFormer's family, for the training loop: corpus and rows, model, likelihood, pieces to listen to.

>>> family = Streams(Config(data=DataConfig(data_dir="processed")))   # doctest: +SKIP

What surprises: `config.model` and the length of a row may change after a run's start, where the model is taken over
from another run: what the user left at its default follows that run.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from meloformer.config import DataConfig, ModelConfig
from meloformer.data import Corpus, RowPlan, Step
from meloformer.data.packing import SKIP_REASONS
from meloformer.errors import UserError
from meloformer.evaluation.likelihood import evaluate_likelihood, split_batches
from meloformer.evaluation.predicted import Predicted
from meloformer.evaluation.tasks import Tasks
from meloformer.model import MeloFormer
from meloformer.training.distributed import Ranks
from meloformer.training.family import ModelFamily, Preview, adopt_settings
from meloformer.training.preview import write_preview
from meloformer.wording import counted, type_word


class Streams(ModelFamily):
    """A run of MeloFormer; `config` is a meloformer.config.Config."""

    unit = "tokens"
    hold_out_more = "raise --validation_fraction"
    rows_from = ""  # whose rows these are, in words, where --init_from was asked
    free: ClassVar = {
        "training": ("compile", "val_task_rows"),
        "data": ("data_dir",),
        "model": ("backend",),
    }

    def open_data(self, epoch: int) -> RowPlan:
        data = self.config.data
        self.corpus = Corpus(data.data_dir)
        self.data_hash, self.data_from = self.corpus.hash, f"--data_dir {data.data_dir}"
        if data.predict_conditions and not self.corpus.has_conditions:
            raise UserError(
                f"data.predict_conditions is {','.join(data.predict_conditions)}, and {data.data_dir} was preprocessed "
                "with --no-conditions; leave it out, or preprocess again without that flag"
            )
        plan = self.plan(epoch)
        if plan.num_rows == 0:
            raise UserError(f"{data.data_dir}: no music is left to train on: {skipped(plan)} are skipped; raise that")
        self.validation = RowPlan(self.corpus, data, self.settings.seed, 0, "validation")
        if self.settings.patience and self.validation.num_rows == 0:
            raise UserError(
                f"training.patience is {self.settings.patience}, and nothing is held out; {self.hold_out_more}"
            )
        self.tasks, self.predicted = Tasks(self.corpus, data), Predicted(self.corpus, data)
        return plan

    def plan(self, epoch: int) -> RowPlan:
        return RowPlan(self.corpus, self.config.data, self.settings.seed, epoch, "train")

    @property
    def num_held_out(self) -> int:
        return len(self.validation.pieces)

    def coordinates(self, step: Step) -> str:
        return ", ".join(
            f"{self.corpus.name(d.piece)} bars {d.first_bar}-{d.last_bar}"
            for rows in step.documents
            for documents in rows
            for d in documents
        )

    # --- model ------------------------------------------------------------------------------------------------

    def build(self) -> MeloFormer:
        model = MeloFormer(self.config.model, self.corpus.vocabulary, self.config.data.max_seq_len)
        model.tags = self.corpus.tags
        model.conditions = self.config.data.given_conditions() if self.corpus.has_conditions else []
        model.predicted = self.config.data.predict_conditions or []
        return model

    def open_pretrained(self, path: str) -> MeloFormer:
        model = MeloFormer.from_pretrained(path, self.corpus.vocabulary)
        other = [f"{new} was {old}" for old, new in zip(model.tags, self.corpus.tags) if old != new]
        if other and "tag" in self.config.data.given_conditions():  # they are told apart by their numbers alone
            print(f"{path}: its tags are others ({', '.join(other[:3])}), and what these mean has to be learnt anew")
        return model

    def adopt(self, saved: dict[str, Any], where: str) -> None:
        self.config.model = adopt(self.config.model, saved, where)

    def adopt_data(self, saved: dict[str, Any], where: str) -> None:
        data = self.config.data
        if "max_seq_len" not in data.left_open:
            return
        if not saved.get("max_seq_len"):
            self.rows_from = f", the default: {where} does not say what it was trained on"
            return
        rows = {name: saved.get(name) for name in data.left_open}
        self.config.data = DataConfig.from_dict({**asdict(data), **rows}, f"{where}: data")
        self.rows_from = f", as {where} was trained on"

    def ready(self, model: MeloFormer) -> None:
        super().ready(model)
        if self.settings.compile:
            model.compile_layers()

    # --- what it says -----------------------------------------------------------------------------------------

    def evaluate(self, model: MeloFormer, precision: torch.dtype, ranks: Ranks) -> dict[str, Any]:
        settings, share = self.settings, (ranks.rank, ranks.world_size)
        held_out = split_batches(self.validation, settings.batch_size, settings.val_max_rows, *share)
        likelihood = evaluate_likelihood(model, held_out, precision, ranks.sum_arrays)
        by_task = {}
        if settings.val_task_rows:
            rows = (settings.batch_size, settings.val_task_rows)
            by_task = self.tasks.evaluate(model, *rows, precision, *share, ranks.sum_arrays)
            likelihood["by_type"] |= self.predicted.evaluate(model, *rows, precision, *share, ranks.sum_arrays)
        return {**likelihood, "by_task": by_task}

    def score(self, result: dict[str, Any]) -> float:
        return result["nats_per_note"]

    def score_words(self, score: float) -> str:
        return f"{score:.3f} nats a note"

    def validation_line(self, result: dict[str, Any]) -> str:
        types = result["by_type"].items()
        by_type = "  ".join(f"{type_word(name)} {entry['nats_per_token']:.2f}" for name, entry in types)
        by_task = "  ".join(f"{name} {nats:.2f}" for name, nats in result["by_task"].items())
        return (
            f"{self.score_words(result['nats_per_note'])}, {result['nats_per_bar']:.1f} a bar;  a token: {by_type}"
            + (f";  a note to fill in: {by_task}" if by_task else "")
        )

    def preview(self, model: MeloFormer, folder: Path, step: int) -> Preview:
        return write_preview(model, folder / "samples", step, self.settings.seed)

    def about_model(self) -> str:
        m = self.config.model
        return f"{m.size}: {m.n_layer} layers, d_model {m.d_model}, {m.n_head} heads, d_ff {m.d_ff}"

    def about_data(self, plan: RowPlan) -> list[tuple[str, str]]:
        d, index = self.config.data, self.corpus.index
        notes, tokens = int(index["num_notes"].sum()), int(index["num_tokens"].sum())
        held_out = self.validation
        length = f"{d.max_seq_len:,} tokens{self.rows_from}"
        return [
            ("data", f"{counted(self.corpus.num_pieces, 'piece')}, {notes:,} notes, {tokens:,} tokens in {d.data_dir}"),
            ("training", f"{counted(len(plan.pieces), 'piece')} in {counted(plan.num_rows, 'row')} of {length}"),
            ("held out", f"{counted(self.num_held_out, 'piece')} in {counted(held_out.num_rows, 'row')}"),
            ("skipped", skipped(plan) or "nothing"),
        ]

    def about_step(self, plan: RowPlan, rows: int) -> str:
        return f"about {int(rows * self.config.data.max_seq_len * plan.fill['tokens']):,} tokens"


def skipped(plan: RowPlan) -> str:
    """How much a plan leaves out, and why."""
    return "; ".join(f"{count:,} {SKIP_REASONS[reason]}" for reason, count in sorted(plan.skipped.items()))


def adopt(model: ModelConfig, saved: dict, where: str) -> ModelConfig:
    """The settings of a model whose weights are taken over; dropout and the backend stay as they are given."""
    default = {**asdict(ModelConfig(size=model.size)), "size": ModelConfig().size}
    default["d_ff"] = replace(model, d_ff=None).d_ff  # its default depends on other settings
    values, wrong = adopt_settings(asdict(model), default, saved, {"dropout", "backend"})
    if wrong is not None:
        raise UserError(
            f"model.{wrong} is {getattr(model, wrong)!r}, and {where} was trained with {saved[wrong]!r}; leave it out"
        )
    return ModelConfig(**values)
