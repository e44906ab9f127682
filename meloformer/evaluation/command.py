"""evaluate.py: held-out likelihood of a checkpoint beside what guessing without a network reaches.

With `--generated` in the place of `--checkpoint` it measures music instead (meloformer.evaluation.compare).

In: an `EvaluateConfig`. The rows are cut and packed as they were in training, by the data settings saved with the
checkpoint, or into rows of `max_seq_len`, and each is read once. Out: a table, and evaluation.json in the run's folder
(or `output`), whole or absent:

    {"nats_per_note": 3.6, "nats_per_bar": 31.0, "by_type": {...}, ..., "baselines": {"unigram": {..}, ..},
     "obedience": {...} (with `--obedience 32`, see evaluation.obedience),
     "checkpoint": "runs/base/checkpoints/step_00004000", "step": 4000, "split": "validation", "data_hash": ".."}

>>> run(EvaluateConfig(checkpoint="runs/base"))   # doctest: +SKIP

What surprises: which pieces are held out is decided by their content, so on another corpus than the one
trained on, a piece that both hold is held out in both.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from meloformer.command_config import EvaluateConfig
from meloformer.config import DataConfig
from meloformer.data import Corpus, RowPlan
from meloformer.device import choose_device, choose_precision
from meloformer.errors import UserError
from meloformer.evaluation import conditions, obedience
from meloformer.evaluation.baselines import evaluate_baselines
from meloformer.evaluation.by_piece import evaluate_pieces
from meloformer.evaluation.compare import compare
from meloformer.evaluation.predicted import Predicted
from meloformer.files import require_file, write_atomic
from meloformer.hid.controls import CONDITIONS
from meloformer.model import MeloFormer
from meloformer.pretrained import find_pretrained
from meloformer.training.checkpoint import read_state
from meloformer.wording import counted, type_word

EVALUATION = "evaluation.json"


def run(config: EvaluateConfig) -> dict:
    """Evaluate, print the table, write the file; returns what was written."""
    if config.generated:
        return compare(config)
    folder = find_pretrained(config.checkpoint)
    state = read_state(folder)
    output = Path(config.output) if config.output else run_folder(folder) / EVALUATION
    require_file(output)

    saved = {**state["config"]["data"], **({"data_dir": config.data_dir} if config.data_dir else {})}
    if config.max_seq_len:
        saved |= {"max_seq_len": config.max_seq_len, "max_segments": None}
    data = DataConfig.from_dict(saved, f"{folder}: data")
    corpus = Corpus(data.data_dir)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    model = MeloFormer.from_pretrained(folder, corpus.vocabulary).to(device)
    given = conditions.subsets(config.conditions, model.conditions) if config.conditions else {}
    plan = RowPlan(corpus, data, split=config.split, augment=False)
    if plan.num_rows == 0:
        raise UserError(
            f"{data.data_dir}: the {config.split} split holds no piece; it was trained with "
            f"validation_fraction {data.validation_fraction}; try --split train"
        )
    if corpus.hash != state["fixed"]["data_hash"]:
        print(f"note: {data.data_dir} is not the corpus that {folder} was trained on")

    kept = None
    if config.obedience:
        asked = {"num_samples": config.obedience, "guidance": config.guidance, "split": config.split}
        kept = obedience.measure(model, corpus, data, **asked)
    progress = partial(
        tqdm,
        total=-(-plan.num_rows // config.batch_size),
        unit="batch",
        desc=config.split,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
    likelihood = evaluate_pieces(model, plan, config.batch_size, precision, progress=progress)
    likelihood["by_type"] |= Predicted(corpus, data, config.split).evaluate(
        model, config.batch_size, precision=precision
    )
    by_piece = likelihood["by_piece"]
    by_piece["name"] = [corpus.name(piece) for piece in by_piece.pop("piece")]
    worth = {}
    if given:
        worth = conditions.worth_of(model, corpus, data, config.split, given, config.batch_size, precision)
    evaluation = {
        **likelihood,
        **({"conditions": worth} if worth else {}),
        **({"obedience": kept} if kept else {}),
        "baselines": evaluate_baselines(corpus, data) if config.split == "validation" else {},
        "checkpoint": str(folder),
        "step": state["progress"]["step"],
        "split": config.split,
        "max_seq_len": data.max_seq_len,
        "pieces": len(plan.pieces),
        "data_dir": data.data_dir,
        "data_hash": corpus.hash,
    }
    write_atomic(output, json.dumps(evaluation, indent=1).encode())
    print(report(evaluation))
    if worth:
        print(f"\n{conditions.report(worth)}")
    if kept:
        print(f"\n{obedience.report(kept)}")
    print(f"written to {output}")
    return evaluation


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to; a checkpoint that was copied elsewhere is its own."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def report(evaluation: dict) -> str:
    """The numbers as text: the model and the baselines, then the model by token type, by bar, and how sure it is."""
    lines = [
        f"{evaluation['checkpoint']}, step {evaluation['step']}: {evaluation['split']} split, "
        f"{counted(evaluation['pieces'], 'piece')}, {evaluation['notes']:,} notes, {evaluation['bars']:,} bars, "
        f"in rows of {evaluation['max_seq_len']:,} tokens",
        "",
        f"{'':14}{'nats a note':>12}{'a bar':>10}{'a token':>10}{'perplexity':>12}",
    ]
    compared = {"this model": evaluation, **evaluation["baselines"]}
    for name, result in sorted(compared.items(), key=lambda item: item[1]["nats_per_note"]):
        lines.append(
            f"{name.replace('_', ' '):14}{result['nats_per_note']:12.3f}{result['nats_per_bar']:10.1f}"
            f"{result['nats_per_token']:10.3f}{result['perplexity']:12.2f}"
        )
    lines += ["", f"{'by type':14}{'tokens':>12}{'share':>10}{'a token':>10}"]
    for name, entry in evaluation["by_type"].items():
        share = entry["nats"] / evaluation["nats"] if evaluation["nats"] else 0.0
        shown, word = "apart" if name in CONDITIONS else f"{share:.1%}", type_word(name)
        lines.append(f"{word:14}{entry['tokens']:12,}{shown:>10}{entry['nats_per_token']:10.3f}")
    lines += ["", f"{'bars':14}{'notes':>12}{'nats a note':>14}"]
    for entry in evaluation["by_bar"]:
        lines.append(f"{entry['bars']:14}{entry['notes']:12,}{entry['nats_per_note']:14.3f}")
    lines += ["", f"{'first tokens':14}{'pieces':>12}{'perplexity':>18}"]
    for limit, entry in evaluation["first_tokens"].items():
        value = "rows too short" if entry["perplexity"] is None else f"{entry['perplexity']:.3f}"
        lines.append(f"{int(limit):<14,}{entry['pieces']:12,}{value:>18}")
    interval = evaluation["nats_per_note_interval"]
    if interval:
        lines += ["", f"95 % of bootstrap samples of the pieces: {interval[0]:.3f} to {interval[1]:.3f} nats a note"]
    lines.append(f"{evaluation['tokens_per_second']:,.0f} tokens/s")
    return "\n".join(lines)
