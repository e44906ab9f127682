"""The training loop: `train(config)` reads top to bottom.

In: a `Config`. Out: the run's folder (meloformer.training.run), whose checkpoints `MeloFormer.from_pretrained` opens.

>>> train(Config(data=DataConfig(data_dir="processed"), model=ModelConfig(size="small")))   # doctest: +SKIP

A step is one update: `gradient_accumulation_steps` micro-steps of `batch_size` rows. The loss is the sum of nats over
the step, divided by the step's number of target tokens, which is known before the first backward pass;
so however a step is divided into micro-steps, it is the same step.

What surprises: nothing random is saved in a checkpoint. Rows come from (data, seed, epoch, step), dropout from
(seed, step), and that is why a resumed run has the same losses, bit for bit on a CPU with the same threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from meloformer.config import Config
from meloformer.data import Corpus, RowPlan, Step, batches, steps_in
from meloformer.data.packing import SKIP_REASONS
from meloformer.device import autocast, choose_device, choose_precision
from meloformer.errors import UserError
from meloformer.evaluation.likelihood import evaluate_likelihood, split_batches
from meloformer.model import MeloFormer
from meloformer.training import checkpoint, run
from meloformer.training.logging import RunLog, table
from meloformer.training.optimizer import (
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from meloformer.training.run import Fixed, Progress
from meloformer.training.schedule import learning_rate
from meloformer.training.signals import StopSignals


class TrainingError(UserError):
    """A run that cannot go on."""


def train(config: Config) -> None:
    """Train to max_steps, or until a signal; either way the last step is saved."""
    settings = config.training
    folder = Path(settings.output_dir)
    checkpoints = folder / "checkpoints"
    rows_per_step = settings.batch_size * settings.gradient_accumulation_steps

    # --- from the start, or from where it stopped

    start = run.find_start(folder, settings.resume)
    progress = Progress()
    if start is not None:
        fixed, progress, saved = run.read_start(start)
        run.refuse_changes(start, fixed, saved, config, rows_per_step)
        if progress.step >= fixed.max_steps:
            print(f"{folder}: finished, at step {progress.step} of {fixed.max_steps}; nothing to resume")
            return

    # --- data, model, optimizer

    corpus = Corpus(config.data.data_dir)
    plan = RowPlan(corpus, config.data, settings.seed, progress.epoch, "train")
    validation = RowPlan(corpus, config.data, settings.seed, 0, "validation")
    if plan.num_rows == 0:
        raise UserError(f"{config.data.data_dir}: no music is left to train on; see data.max_bars and data.max_samples")

    device = choose_device(settings.device)
    if start is None:
        precision = choose_precision(settings.precision, device)
        fixed = Fixed(
            max_steps=settings.max_steps or settings.epochs * steps_in(plan, rows_per_step),
            rows_per_step=rows_per_step,
            precision="bf16" if precision == torch.bfloat16 else "fp32",
            data_hash=corpus.hash,
        )
    else:
        run.refuse_other_data(start, fixed, corpus.hash, config.data.data_dir)
        precision = choose_precision(fixed.precision, device)

    torch.manual_seed(settings.seed)
    model = MeloFormer(config.model, corpus.vocabulary, config.data.max_seq_len).to(device)
    optimizers = build_optimizers(
        model, settings.optimizer, settings.learning_rate, settings.weight_decay, (settings.beta1, settings.beta2)
    )
    if start is None:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / run.CONFIG)
    else:
        load_weights(model, start)
        tensors = checkpoint.read_tensors(start / checkpoint.OPTIMIZER)
        load_optimizer_tensors(model, optimizers, tensors, str(start / checkpoint.OPTIMIZER))
        run.enter(folder, start, progress)
        print(f"resuming {start}")
    print(describe(config, corpus, plan, validation, model, fixed, device), flush=True)

    # --- the loop

    warmup_steps = min(settings.warmup_steps, fixed.max_steps // 10)
    parameters = [p for p in model.parameters() if p.requires_grad]
    train_seconds, train_targets = 0.0, 0  # since the last line of the log; validation and saving apart
    steps = endless_steps(corpus, config, plan, progress, rows_per_step)
    model.train()
    with StopSignals() as stop, closing(RunLog(folder, progress.step, fixed.max_steps)) as log, closing(steps):
        stopping = False
        while progress.step < fixed.max_steps and not stopping:
            started = time.perf_counter()
            epoch, is_last_of_epoch, step = next(steps)

            lr = learning_rate(progress.step, settings.learning_rate, settings.min_lr, warmup_steps, fixed.max_steps)
            set_learning_rate(optimizers, lr)
            if config.model.dropout:
                torch.manual_seed(dropout_seed(settings.seed, progress.step))
            loss = accumulate(model, step, precision)
            grad_norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the step's only wait for the device
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite:
                for optimizer in optimizers:
                    optimizer.step()
            for parameter in parameters:
                parameter.grad = None

            progress.step += 1
            progress.epoch, progress.step_in_epoch = (epoch + 1, 0) if is_last_of_epoch else (epoch, step.index + 1)
            if finite:
                progress.nats += loss * step.num_targets
                progress.targets += step.num_targets
                progress.skipped_in_a_row = 0
            else:
                progress.skipped += 1
                progress.skipped_in_a_row += 1
                log.say(f"step {progress.step}: loss {loss}, gradient norm {grad_norm}; the update is skipped")
                if progress.skipped_in_a_row >= settings.max_nonfinite_steps:
                    raise TrainingError(
                        f"step {progress.step}, epoch {epoch}: {progress.skipped_in_a_row} updates in a row had a "
                        f"loss or gradient that is not finite; the last rows were {coordinates(corpus, step)}; "
                        "lower --learning_rate, or go back with --resume"
                    )
            train_seconds += time.perf_counter() - started
            train_targets += step.num_targets
            log.advance()

            is_last = progress.step == fixed.max_steps
            if progress.step % settings.log_interval == 0 or is_last:
                log.train(
                    {
                        "step": progress.step,
                        "epoch": epoch,
                        "loss": progress.nats / progress.targets if progress.targets else None,
                        "lr": lr,
                        "grad_norm": grad_norm if finite else None,
                        "skipped": progress.skipped,
                        "tokens_per_second": train_targets / train_seconds,
                    }
                )
                progress.nats, progress.targets = 0.0, 0
                train_seconds, train_targets = 0.0, 0

            stopping = stop.requested is not None  # read once: what comes later waits for the next step
            improved = False
            if (progress.step % settings.val_interval == 0 or is_last) and validation.num_rows and not stopping:
                held_out = split_batches(validation, settings.batch_size, settings.val_max_rows)
                likelihood = evaluate_likelihood(model, held_out, precision)
                log.validation({"step": progress.step, **likelihood})
                best = progress.best_nats_per_note
                improved = best is None or likelihood["nats_per_note"] < best
                if improved:
                    progress.best_step, progress.best_nats_per_note = progress.step, likelihood["nats_per_note"]

            if improved or progress.step % settings.save_interval == 0 or is_last or stopping:
                log.sync()
                checkpoint.save(
                    checkpoints,
                    progress.step,
                    model.save_pretrained,
                    optimizer_tensors(model, optimizers),
                    run.state_dict(fixed, progress, config),
                    settings.keep_last,
                    progress.best_step,
                )

    print(last_words(folder, fixed, progress, stop.requested), flush=True)


# --- a step -----------------------------------------------------------------------------------------------------


def accumulate(model: MeloFormer, step: Step, precision: torch.dtype) -> torch.Tensor:
    """Backward passes of all of a step's micro-batches; returns the step's loss, nats per target, as a 0-d tensor."""
    num_targets = max(step.num_targets, 1)
    loss = torch.zeros((), device=model.device)
    for batch in step.micro_batches:
        if not (batch["document"] >= 0).any():  # the end of an epoch: nothing but padding
            continue
        inputs = model.prepare(batch)
        with autocast(model.device, precision):
            nats, _, _ = model.training_loss(inputs)
        nats = nats / num_targets
        nats.backward()
        loss += nats.detach()
    return loss


def endless_steps(
    corpus: Corpus, config: Config, plan: RowPlan, progress: Progress, rows_per_step: int
) -> Iterator[tuple[int, bool, Step]]:
    """(epoch, whether it is the epoch's last, step), from where `progress` stands on. `plan` is that epoch's."""
    settings = config.training
    epoch, first_step = progress.epoch, progress.step_in_epoch
    while True:
        last = steps_in(plan, rows_per_step) - 1
        of_epoch = batches(
            plan,
            first_step,
            rows_per_step,
            micro_batch=settings.batch_size,
            num_workers=settings.num_workers,
        )
        with closing(of_epoch):
            for step in of_epoch:
                yield epoch, step.index == last, step
        epoch, first_step = epoch + 1, 0
        plan = RowPlan(corpus, config.data, settings.seed, epoch, "train")


def dropout_seed(seed: int, step: int) -> int:
    """A seed for torch's generator that belongs to one step, so that resuming needs no generator's state."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def coordinates(corpus: Corpus, step: Step) -> str:
    """Pieces and bars of a step's rows, in words."""
    return ", ".join(
        f"{corpus.name(d.piece)} bars {d.first_bar}-{d.last_bar}"
        for rows in step.documents
        for documents in rows
        for d in documents
    )


def load_weights(model: MeloFormer, folder: Path) -> None:
    path = folder / checkpoint.MODEL
    try:
        model.load_state_dict(checkpoint.read_tensors(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise checkpoint.CheckpointError(f"{path}: not this model's weights ({reason})") from None


# --- words ------------------------------------------------------------------------------------------------------


def describe(
    config: Config,
    corpus: Corpus,
    plan: RowPlan,
    validation: RowPlan,
    model: MeloFormer,
    fixed: Fixed,
    device: torch.device,
) -> str:
    """The table before the first step."""
    m, t, d = config.model, config.training, config.data
    tokens = corpus.index["num_tokens"]
    per_epoch = steps_in(plan, fixed.rows_per_step)
    used = int(fixed.rows_per_step * d.max_seq_len * plan.fill["tokens"])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    skipped = [f"{count:,} {SKIP_REASONS[reason]}" for reason, count in sorted(plan.skipped.items())]
    notes = int(corpus.index["num_notes"].sum())
    return table(
        [
            ("model", f"{m.size}: {m.n_layer} layers, d_model {m.d_model}, {m.n_head} heads, d_ff {m.d_ff}"),
            ("parameters", f"{model.num_parameters():,}"),
            ("data", f"{corpus.num_pieces:,} pieces, {notes:,} notes, {int(tokens.sum()):,} tokens in {d.data_dir}"),
            ("training", f"{len(plan.pieces):,} pieces in {plan.num_rows:,} rows of {d.max_seq_len:,} tokens"),
            ("held out", f"{len(validation.pieces):,} pieces in {validation.num_rows:,} rows"),
            ("skipped", "; ".join(skipped) or "nothing"),
            ("a step", f"{t.batch_size} x {t.gradient_accumulation_steps} rows, about {used:,} tokens"),
            ("steps", f"{fixed.max_steps:,}, about {per_epoch:,} an epoch"),
            ("optimizer", f"{t.optimizer}, learning rate {t.learning_rate:g} to {t.min_lr:g}"),
            ("device", f"{device}, {where}, {fixed.precision}"),
            ("run", str(t.output_dir)),
        ]
    )


def last_words(folder: Path, fixed: Fixed, progress: Progress, signal_name: str | None) -> str:
    if progress.step < fixed.max_steps:
        return f"{signal_name}: saved at step {progress.step} of {fixed.max_steps}; go on with --resume auto"
    best = ""
    if progress.best_step is not None:
        best = f"; best validation {progress.best_nats_per_note:.3f} nats a note, at step {progress.best_step}"
    return f"finished {progress.step} steps{best}\npython generate.py --checkpoint {folder} --output out"
