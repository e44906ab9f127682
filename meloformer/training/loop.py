"""The training loop: `train(config)` reads top to bottom, whatever model it trains (meloformer.training.family).

In: a family's config. Out: the run's folder (meloformer.training.run), whose checkpoints the model's `from_pretrained`
opens.

>>> train(Config(data=DataConfig(data_dir="processed"), model=ModelConfig(size="small")))   # doctest: +SKIP

A step is one update: on each of the run's processes (meloformer.training.distributed) `gradient_accumulation_steps`
micro-steps of `batch_size` rows. The loss is the sum of nats over the step, divided by its number of targets on
all processes, which is known before the first backward pass; gradients are summed over processes once, after the last.
So however a step is divided into processes and micro-steps, it is the same step.

What surprises: nothing random is saved in a checkpoint. Rows come from (data, seed, epoch, step), dropout from (seed,
step, rank), and that is why a resumed run has the same losses, bit for bit on as many processes and threads of a CPU.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from meloformer.data import Step, batches, steps_in
from meloformer.device import autocast, choose_precision
from meloformer.errors import UserError
from meloformer.families import open_family
from meloformer.settings import Settings
from meloformer.training import checkpoint, run
from meloformer.training.describe import describe, last_words
from meloformer.training.distributed import Ranks, joined
from meloformer.training.family import ModelFamily
from meloformer.training.logging import RunLog, SilentLog
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


def train(config: Settings) -> int:
    """Train to max_steps, or until a signal; either way the last step is saved.

    Returns 0 for a finished run, else the number of the signal that ended it early, which a script must not take for
    a finished one.
    """
    with joined(config.training.device) as ranks, ExitStack() as held:
        if config.training.fast_dev_run and ranks.is_main:
            config.training.output_dir = tempfile.mkdtemp(prefix="fast_dev_run_")
            held.callback(shutil.rmtree, config.training.output_dir, ignore_errors=True)
        try:
            return train_rank(config, ranks, held)
        except OSError as error:  # a disk that is full or gone; checkpoints and logs have said so in their own words
            raise TrainingError(
                f"{error.filename or config.training.output_dir}: {error.strerror or error}; checkpoints that were "
                "finished are whole: put it right and go on with --resume auto"
            ) from error


def train_rank(config: Settings, ranks: Ranks, held: ExitStack) -> int:
    """`train` in one of the run's processes. `held` keeps the lock of the run's folder, once it is taken."""
    settings, family = config.training, open_family(config)
    device = ranks.device
    folder = Path(settings.output_dir)
    checkpoints = folder / "checkpoints"
    rows_per_step = ranks.world_size * settings.batch_size * settings.gradient_accumulation_steps

    # --- from the start, or from where it stopped: only the main rank need see the run's folder

    locked_first = ranks.is_main and settings.resume != "never" and run.holds_a_run(folder)
    if locked_first:  # before the start is chosen; a new run makes its folder later, once nothing can be refused
        held.enter_context(run.locked(folder))
    settings.resume, settings.init_from = ranks.broadcast(family.begin() if ranks.is_main else None)
    start = run.find_start(folder, settings.resume) if ranks.is_main else None
    found = ranks.broadcast({"folder": str(start), **checkpoint.read_state(start)} if start else None)
    progress = Progress()
    if found is not None:
        start = Path(found["folder"])
        fixed, progress, saved = run.parse_state(start, found)
        if settings.init_from:
            family.adopt(saved["model"], str(start))
            family.adopt_data(saved["data"], str(start))
        run.refuse_changes(start, fixed, saved, config, rows_per_step, family.free)
        if progress.is_finished(fixed) or 0 < settings.patience <= progress.waited:
            if ranks.is_main:
                print(f"{folder}: finished, at step {progress.step} of {fixed.max_steps}; nothing to resume")
            return 0

    # --- data, model, optimizer

    if start is None and settings.init_from:
        theirs = ranks.broadcast(run.saved_config(settings.init_from) if ranks.is_main else None)
        family.adopt_data(theirs.get("data", {}), settings.init_from)
    plan = family.open_data(progress.epoch)
    if start is None:
        precision = choose_precision(settings.precision, device)
        fixed = Fixed(
            max_steps=settings.max_steps or settings.epochs * steps_in(plan, rows_per_step),
            rows_per_step=rows_per_step,
            precision="bf16" if precision == torch.bfloat16 else "fp32",
            data_hash=family.data_hash,
        )
        fixed = Fixed(**ranks.broadcast(asdict(fixed)))
    run.refuse_other_data(start or f"{folder} on the first process", fixed, family.data_hash, family.data_from)
    precision = choose_precision(fixed.precision, device)

    torch.manual_seed(settings.seed)
    pretrained = None
    if start is None and settings.init_from:
        pretrained = family.open_pretrained(settings.init_from) if ranks.is_main else None
        theirs = ranks.broadcast(pretrained.config.to_dict() if ranks.is_main else None)
        family.adopt(theirs, settings.init_from)
    model = family.build().to(device)
    optimizers = build_optimizers(
        model, settings.optimizer, settings.learning_rate, settings.weight_decay, (settings.beta1, settings.beta2)
    )
    if ranks.is_main and not locked_first:
        held.enter_context(run.locked(folder))
        run.refuse_a_run(folder)  # one may have come, and gone, since
    if start is None:
        if ranks.is_main:
            config.save(folder / run.CONFIG)
        weights = pretrained.state_dict() if pretrained else model.state_dict()
        load_weights(model, ranks.broadcast_tensors(weights), settings.init_from)
    else:
        load_weights(model, ranks.broadcast_tensors(read(ranks, start, checkpoint.MODEL)), start / checkpoint.MODEL)
        tensors = ranks.broadcast_tensors(read(ranks, start, checkpoint.OPTIMIZER))
        load_optimizer_tensors(model, optimizers, tensors, str(start / checkpoint.OPTIMIZER))
    family.ready(model)
    if ranks.is_main:
        if start is not None:
            run.enter(folder, start, progress)
            print(f"resuming {start}")
        print(describe(settings, family, plan, model, fixed, ranks), flush=True)

    # --- the loop

    warmup_steps = min(settings.warmup_steps, fixed.max_steps // 10)
    parameters = [p for p in model.parameters() if p.requires_grad]
    train_seconds, train_targets = 0.0, 0  # since the last line of the log; validation and saving apart
    steps = endless_steps(family, plan, progress, rows_per_step, ranks)
    log = SilentLog()
    if ranks.is_main:
        about = {"unit": family.unit, "tags": family.board_tags, "validation_due": progress.validation_due}
        log = RunLog(folder, progress.step, fixed.max_steps, **about)

    def settle(stopping: int) -> bool:
        """What is due behind a step: validation, a sample, a checkpoint; returns whether patience is at its end.

        A run that is stopping saves at once, and its resumption begins with the validation that was due.
        """
        is_last, score, improved, waited_long = progress.step == fixed.max_steps, None, False, False
        if progress.validation_due and not stopping:
            with log.busy("validating"):
                result = family.evaluate(model, precision, ranks)
            log.validation({"step": progress.step, **result}, family.validation_line(result))
            score = family.score(result)
            score = score if math.isfinite(score) else math.inf  # nothing is below nan, so it could not be beaten
            improved = progress.best_score is None or score < progress.best_score
            progress.waited = 0 if improved else progress.waited + 1
            progress.validation_due = False
            waited_long = 0 < settings.patience <= progress.waited

        due = settings.sample_interval and progress.step % settings.sample_interval == 0
        if due and ranks.is_main and not stopping:
            with log.busy("sampling"):
                preview = family.preview(model, folder, progress.step)
            log.preview(progress.step, preview.files, preview.images)

        save_due = progress.step % settings.save_interval == 0
        to_save = improved or is_last or stopping or waited_long or save_due
        if to_save and score is not None:
            progress.rank(score, family.keep_best)
        if to_save and ranks.is_main:
            log.sync()
            checkpoint.save(
                checkpoints,
                family.checkpoint_name(progress.step, score),
                model.save_pretrained,
                optimizer_tensors(model, optimizers),
                run.state_dict(fixed, progress, config),
                settings.keep_last,
                [step for _, step in progress.ranking],
            )
        return waited_long

    model.train()
    with StopSignals(ranks.world_size > 1, not ranks.is_main) as stop, closing(log), closing(steps):
        stopping, waited_long = 0, progress.validation_due and settle(0)
        while progress.step < fixed.max_steps and not stopping and not waited_long:
            started = time.perf_counter()
            epoch, is_last_of_epoch, step = next(steps)

            lr = learning_rate(progress.step, settings.learning_rate, settings.min_lr, warmup_steps, fixed.max_steps)
            set_learning_rate(optimizers, lr)
            if config.model.dropout:
                torch.manual_seed(dropout_seed(settings.seed, progress.step, ranks.rank))
            num_targets = ranks.sum(step.num_targets)
            metrics: dict[str, torch.Tensor] = {}
            loss = ranks.sum_tensor(accumulate(model, step, precision, num_targets, metrics))
            ranks.sum_gradients(parameters)
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
                progress.nats += loss * num_targets
                progress.targets += num_targets
                progress.skipped_in_a_row = 0
            else:
                progress.skipped += 1
                progress.skipped_in_a_row += 1
                log.say(f"step {progress.step}: loss {loss}, gradient norm {grad_norm}; the update is skipped")
                if progress.skipped_in_a_row >= settings.max_nonfinite_steps:
                    rows = ", ".join(filter(None, ranks.gather(family.coordinates(step))))
                    raise TrainingError(
                        f"step {progress.step}, epoch {epoch}: {progress.skipped_in_a_row} updates in a row had a "
                        f"loss or gradient that is not finite; the last rows were {rows}; "
                        f"lower --{config.flag('training.learning_rate')}, or go back with --resume"
                    )
            train_seconds += time.perf_counter() - started
            train_targets += num_targets
            log.advance()

            is_last = progress.step == fixed.max_steps
            if progress.step % settings.log_interval == 0 or is_last:
                statistics = family.statistics(metrics, ranks)
                log.train(
                    {
                        "step": progress.step,
                        "epoch": epoch,
                        "loss": progress.nats / progress.targets if progress.targets else None,
                        "lr": lr,
                        "grad_norm": grad_norm if finite else None,
                        "skipped": progress.skipped,
                        f"{family.unit}_per_second": train_targets / train_seconds,
                        **statistics,
                    }
                )
                progress.nats, progress.targets = 0.0, 0
                train_seconds, train_targets = 0.0, 0

            # Asked once a step, and of all ranks: what comes later, or to another rank, waits for the next step.
            stopping = ranks.highest(stop.requested)
            # Where checkpoints are ranked, each needs a validation of its own.
            due = is_last or progress.step % settings.val_interval == 0
            due = due or (family.keep_best > 1 and progress.step % settings.save_interval == 0)
            progress.validation_due = bool(due and family.validation.num_rows)
            waited_long = settle(stopping)
        # A signal that torchrun passes on late would end a process behind this block, and the main one may be saving.
        ranks.wait()

    if ranks.is_main:
        print(last_words(folder, family, fixed, progress, stopping), flush=True)
    return 0 if progress.is_finished(fixed) else stopping


# --- a step -----------------------------------------------------------------------------------------------------


def accumulate(
    model: nn.Module,
    step: Step,
    precision: torch.dtype,
    num_targets: int,
    metrics: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Backward passes of a rank's micro-batches; returns its part of the step's loss, nats per target, a 0-d tensor.

    `num_targets` is the number of targets of all ranks. A rank may have nothing but padding, at the end of an epoch.
    What the model says beside its loss is added up in `metrics`.
    """
    num_targets = max(num_targets, 1)
    loss = torch.zeros((), device=model.device)
    for batch, targets in zip(step.micro_batches, step.targets):
        if not targets:
            continue
        inputs = model.prepare(batch)
        with autocast(model.device, precision):
            nats, _, parts = model.training_loss(inputs)
        nats = nats / num_targets
        nats.backward()
        loss += nats.detach()
        if metrics is not None:
            for name, value in parts.items():
                metrics[name] = metrics[name] + value if name in metrics else value
    return loss


def endless_steps(
    family: ModelFamily, plan, progress: Progress, rows_per_step: int, ranks: Ranks
) -> Iterator[tuple[int, bool, Step]]:
    """(epoch, whether it is the epoch's last, step), from where `progress` stands on. `plan` is that epoch's."""
    settings = family.settings
    epoch, first_step = progress.epoch, progress.step_in_epoch
    while True:
        last = steps_in(plan, rows_per_step) - 1
        of_epoch = batches(
            plan,
            first_step,
            rows_per_step,
            ranks.rank,
            ranks.world_size,
            micro_batch=settings.batch_size,
            num_workers=settings.num_workers,
        )
        with closing(of_epoch):
            for step in of_epoch:
                yield epoch, step.index == last, step
        epoch, first_step = epoch + 1, 0
        plan = family.plan(epoch)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch's generator that belongs to a rank's step, so that resuming needs no generator's state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def read(ranks: Ranks, start: Path, name: str) -> dict[str, torch.Tensor] | None:
    """The tensors of one of a checkpoint's files, on the main rank; the others are sent them."""
    return checkpoint.read_tensors(start / name) if ranks.is_main else None


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], where: object) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise checkpoint.CheckpointError(f"{where}: not this model's weights ({reason})") from None
