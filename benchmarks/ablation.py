"""Which parts of the attention rule earn their place: held-out nats a note of variants at equal tokens and parameters.

    python -m benchmarks.ablation --data_dir processed/ --output runs/ablation [--variants bar_sparse,full_causal]
    python -m benchmarks.ablation --midi midi/ --folders freedoom,classical --output runs/ablation --seeds 0,1,2

Every variant reads the same rows of the same pieces in the same order, at the same learning rate, with as many
parameters as the reference (d_ff makes up the difference). Train, validation and test are split by clusters of
near-duplicates. Each finished run is one file in the output folder and is not run again; the table and results.json
(mean over the seeds, spread, difference to the reference seed by seed, and how it varies over pieces) are of what is
finished.

The surprise: bars are deferred in the two variants that ask about deferring alone. The others learn and are measured
on plain streams, so that they compare. No variant is given conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import torch
from torch import nn

from benchmarks.ablation_table import picture, show, summarise
from benchmarks.bar_major import BarMajorPlan
from benchmarks.both_sides import both_sides
from meloformer.command_line import Parser
from meloformer.config import DataConfig, ModelConfig, PreprocessConfig
from meloformer.data import Corpus, RowPlan, Step, batches
from meloformer.data.preprocess import preprocess
from meloformer.device import choose_device, choose_precision
from meloformer.errors import UserError, exit_cleanly
from meloformer.evaluation.by_piece import evaluate_pieces
from meloformer.evaluation.plots import require_matplotlib
from meloformer.files import write_atomic
from meloformer.hid import Vocabulary
from meloformer.model import MeloFormer
from meloformer.training.loop import accumulate
from meloformer.training.optimizer import build_optimizers, set_learning_rate
from meloformer.training.schedule import learning_rate

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "bar_sparse"
MUSEFORMER = [0, 1, 2, 4, 8, 12, 16, 24, 32]  # arXiv 2210.10349, section 3.2, and the bar itself
PAIRS = {"T": ["T", "P"], "P": ["T", "P"], "L": [], "V": ["V"]}  # T-T, T-P, P-P, V-V of the user's document
# The token at a position predicts the next: T a P, P an L, L a V, V a T or P.
PREDICTED = {"T": PAIRS["P"], "P": PAIRS["L"], "L": PAIRS["V"], "V": ["T", "P"]}
UNTOLD = {"bare_probability": 1.0}  # no conditions
PLAIN = UNTOLD | {name: 0.0 for name in vars(DataConfig(data_dir="-")) if name.startswith("defer_")}


@dataclass(frozen=True)
class Variant:
    """What differs from the default model; `deferred` trains with deferred bars, `plan` makes the rows."""

    about: str
    model: dict = field(default_factory=dict)
    deferred: bool = False
    plan: Callable[..., RowPlan] = RowPlan


VARIANTS = {
    REFERENCE: Variant("the default rule"),
    "full_causal": Variant("everything earlier in the piece", {"pattern": "full_causal"}),
    "no_summaries": Variant("no summary tokens", {"summaries": False}),
    "no_cross_bars": Variant("no bars of other instruments", {"cross_bar_offsets": []}),
    "museformer_cross": Variant("other instruments at Museformer's distances", {"cross_bar_offsets": MUSEFORMER}),
    "museformer": Variant(
        "all instruments at Museformer's distances",
        {"cross_bar_offsets": MUSEFORMER, "same_bar_offsets": MUSEFORMER},
    ),
    "no_type_rule": Variant("every type sees every type", {"visible": None}),
    "own_type": Variant("T-T, T-P, P-P, V-V, read on the query's own type", {"visible": PAIRS}),
    "predicted_type": Variant("T-T, T-P, P-P, V-V, read on the type predicted", {"visible": PREDICTED}),
    "near_linear": Variant(
        "own instrument at 0, 1, 2 and multiples of 4", {"same_bar_offsets": [0, 1, 2, *range(4, 2048, 4)]}
    ),
    "one_rotary_axis": Variant("no rotary axis of musical time", {"rotary_axes": 1}),
    "bar_major": Variant("bar by bar, all instruments in turn", plan=BarMajorPlan),
    "cross_ahead": Variant("other instruments also one bar ahead", {"cross_bar_offsets": [-1, 0, 1, 2, 4]}),
    "shared_ff": Variant("one feed-forward for summaries and notes", {"summary_ff": "shared"}),
    "deferred": Variant("trained with deferred bars", deferred=True),
    "deferred_full_causal": Variant(
        "with deferred bars, everything earlier", {"pattern": "full_causal"}, deferred=True
    ),
}


# --- the corpus -------------------------------------------------------------------------------------------------


def prepare_corpus(arguments: argparse.Namespace, output: Path) -> Corpus:
    """`--data_dir`, or the shards of `--midi`, preprocessed once into the output folder."""
    if arguments.data_dir:
        return Corpus(arguments.data_dir)
    midi = Path(arguments.midi or os.environ.get("MELOFORMER_MIDI") or ROOT.parent / "shared" / "midi")
    folders = [midi / name for name in arguments.folders.split(",")] if arguments.folders else [midi]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give --midi, and --folders that it holds, or --data_dir")
    files = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    listing = output / "midi.txt"
    write_atomic(listing, "".join(f"{path.resolve()}\n" for path in files).encode())
    preprocess(PreprocessConfig(input=str(listing), output=str(output / "shards"), workers=max(1, arguments.workers)))
    return Corpus(output / "shards")


def held_out(
    corpus: Corpus, data: DataConfig, plan: Callable[..., RowPlan], fraction: float
) -> tuple[RowPlan, RowPlan]:
    """Plans of validation and test: of the clusters that are kept from training, one half each.

    `data.validation_fraction` holds out both. A cluster's draw below `fraction` makes it validation, so the same
    pieces are on the same side for every variant.
    """
    validation = plan(corpus, replace(data, validation_fraction=fraction), split="validation")
    test = plan(corpus, data, split="validation", without=validation.pieces)
    return validation, test


# --- one run ----------------------------------------------------------------------------------------------------


def reference_model(arguments: argparse.Namespace) -> ModelConfig:
    """The default rule at the size that is asked for; its parameters are everybody's."""
    given = {key: getattr(arguments, key) for key in ("n_layer", "n_head", "d_model", "d_ff")}
    return ModelConfig(size=arguments.model_size, dropout=arguments.dropout, **given)


def equal_parameters(config: ModelConfig, target: int, vocabulary: Vocabulary) -> ModelConfig:
    """The config with the d_ff that brings its parameters nearest to `target`."""

    def parameters(d_ff: int) -> int:
        with torch.device("meta"):
            return MeloFormer(replace(config, d_ff=d_ff), vocabulary).num_parameters()

    low, high = parameters(8), parameters(16)  # linear in d_ff
    d_ff = max(8, round(8 + (target - low) * 8 / (high - low)))
    return replace(config, d_ff=d_ff)


def steps_of(plan_of_epoch: Callable[[int], RowPlan], arguments: argparse.Namespace) -> Iterator[Step]:
    """Batches of steps, epoch after epoch, without end."""
    rows = arguments.batch_size * arguments.gradient_accumulation_steps
    for epoch in count():
        yield from batches(
            plan_of_epoch(epoch), rows_per_step=rows, micro_batch=arguments.batch_size, num_workers=arguments.workers
        )


def fit(
    model: MeloFormer,
    steps: Iterator[Step],
    arguments: argparse.Namespace,
    precision: torch.dtype,
    look: Callable[[int, float], None],
) -> dict:
    """Train for `arguments.steps`; returns the number of targets, seconds and processor seconds. `look(step, seconds)`
    is called every `curve_steps`, its time apart."""
    optimizers = build_optimizers(model, arguments.optimizer, arguments.learning_rate, 0.1, (0.9, 0.95))
    peak, warmup = arguments.learning_rate, max(1, arguments.steps // 20)
    targets, seconds, processor = 0, 0.0, 0.0
    model.train()
    with closing(steps):
        for number, step in enumerate(islice(steps, arguments.steps)):
            started, began = time.perf_counter(), time.process_time()
            set_learning_rate(optimizers, learning_rate(number, peak, peak / 10, warmup, arguments.steps))
            accumulate(model, step, precision, step.num_targets)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - started
            processor += time.process_time() - began
            targets += step.num_targets
            if (number + 1) % arguments.curve_steps == 0 and number + 1 < arguments.steps:
                look(number + 1, seconds)
    return {"targets": targets, "seconds": seconds, "processor_seconds": processor}


def run_one(name: str, seed: int, corpus: Corpus, arguments: argparse.Namespace) -> dict:
    """Train a variant with one seed and measure it; what goes into its file."""
    variant = VARIANTS[name]
    device = choose_device(arguments.device)
    precision = choose_precision(arguments.precision, device)
    reference = reference_model(arguments)
    target = MeloFormer(reference, corpus.vocabulary).num_parameters()
    config = equal_parameters(replace(reference, **variant.model), target, corpus.vocabulary)
    fraction = arguments.held_out
    data = DataConfig(
        data_dir=str(corpus.path),
        max_seq_len=arguments.max_seq_len,
        validation_fraction=2 * fraction,
        **(UNTOLD if variant.deferred else PLAIN),
    )
    config.validate()
    data.validate()
    validation, test = held_out(corpus, data, variant.plan, fraction)

    torch.manual_seed(seed)
    model = MeloFormer(config, corpus.vocabulary, data.max_seq_len).to(device)
    curve = []

    def look(step: int, seconds: float) -> None:
        part = evaluate_pieces(model, validation, arguments.batch_size, precision, arguments.curve_rows)
        curve.append({"step": step, "seconds": seconds, "nats_per_note": part["nats_per_note"]})
        print(f"    {name}, seed {seed}, step {step}: {part['nats_per_note']:.3f}", flush=True)

    def plan_of(epoch: int) -> RowPlan:
        return variant.plan(corpus, data, seed, epoch, "train")

    spent = fit(model, steps_of(plan_of, arguments), arguments, precision, look)
    measured = {
        split: evaluate_pieces(model, plan, arguments.batch_size, precision, arguments.eval_rows)
        for split, plan in (("validation", validation), ("test", test))
    }
    result = {
        "variant": name,
        "about": variant.about,
        "seed": seed,
        "parameters": model.num_parameters(),
        "model": config.to_dict(),
        **spent,
        "curve": curve,
        **measured,
    }
    if variant.deferred:
        result["sides"] = both_sides(model, corpus, data, arguments.batch_size, precision, arguments.curve_rows)
    return result


def keep_settings(arguments: argparse.Namespace, corpus: Corpus) -> dict:
    """What every finished run in --output was made with, written there; UserError where that is something else."""
    free = ("output", "variants", "runs", "seeds", "plot", "data_dir", "midi", "folders", "workers")
    settings = {key: value for key, value in vars(arguments).items() if key not in free}
    settings |= {"data_hash": corpus.hash, "data": PLAIN}
    kept = arguments.output / "settings.json"
    if kept.is_file() and json.loads(kept.read_text()) != settings:
        raise UserError(f"{kept}: the results beside it have other settings; give them again, or another --output")
    write_atomic(kept, json.dumps(settings, indent=1).encode())
    return settings


# --- all of them ------------------------------------------------------------------------------------------------


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of the corpus, the model and its training."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; finished runs are kept")
    parser.add_argument("--data_dir", help="folder that preprocess_data.py wrote, instead of --midi")
    parser.add_argument("--midi", help="folder of MIDI files (default: $MELOFORMER_MIDI, or ../shared/midi)")
    parser.add_argument(
        "--folders",
        default="freedoom,vizdoom_freedoom,midi_archive,classical,tests_multitrack",
        help="its folders to take: those with several instruments; '' takes all",
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--model_size", default="small")
    for name in ("n_layer", "n_head", "d_model", "d_ff"):
        parser.add_argument(f"--{name}", type=int, help="instead of the size's own; d_ff is the reference's")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--max_seq_len", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--batch_size", type=int, default=2, help="rows in one pass")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--held_out", type=float, default=0.05, help="share of the pieces in each of validation, test")
    parser.add_argument("--eval_rows", type=int, help="rows of validation and of test at the end (default: all)")
    parser.add_argument("--curve_steps", type=int, default=250, help="steps between two looks at validation")
    parser.add_argument("--curve_rows", type=int, default=32, help="rows of one look, and of both sides of bars")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument(
        "--workers", type=int, default=0, help="threads that build rows ahead; for preprocessing, processes"
    )


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, with commas: " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas; all variants of a seed run first")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the differences to the default rule")
    add_common(parser)
    arguments = parser.parse_args()
    if arguments.plot:
        require_matplotlib()
    names = arguments.variants.split(",")
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--variants {name}: no such variant; there are {', '.join(VARIANTS)}")
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {arguments.seeds}: numbers with commas are accepted, such as 0,1,2") from None
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    corpus = prepare_corpus(arguments, output)
    settings = keep_settings(arguments, corpus)
    for seed in seeds:
        for name in names:
            path = output / f"{name}-{seed}.json"
            if path.is_file():
                continue
            result = run_one(name, seed, corpus, arguments)
            write_atomic(path, json.dumps(result).encode())
            print(f"{name}, seed {seed}: {result['test']['nats_per_note']:.3f} nats a note held out", flush=True)
    results = [json.loads(path.read_text()) for path in sorted(output.glob("*-[0-9]*.json"))]
    table = summarise(results, {name: variant.about for name, variant in VARIANTS.items()}, REFERENCE)
    write_atomic(output / "results.json", json.dumps({"settings": settings, "variants": table}, indent=1).encode())
    print(show(table))
    if arguments.plot:
        picture(table, arguments.plot)


if __name__ == "__main__":
    exit_cleanly(main)
