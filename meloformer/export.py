"""A trained model to pass on: `python -m meloformer.export --checkpoint runs/base --output mine [--half]`.

In: a run of either family, or one of its checkpoints. Out: a folder with config.json, model.safetensors and state.json,
which generate.py, evaluate.py and `train.py --init_from` take as they take a run; the optimizer's part, two thirds of a
checkpoint or more, stays behind. `--half` writes the weights as bfloat16, half as large; they are read as float32.
A model may write longer streams than the rows it was trained on: `evaluate.py --max_seq_len` tells how well it reads
them, `--max_seq_len` here makes that its default.

The surprise: state.json goes along, because evaluate.py takes from it which pieces were held out. `--data_dir` replaces
where it says that the data lies.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save

from meloformer.command_line import Parser
from meloformer.errors import UserError, exit_cleanly
from meloformer.files import checksum, make_folder, write_atomic
from meloformer.pretrained import CONFIG, WEIGHTS, find_pretrained
from meloformer.training.checkpoint import MODEL, STATE, compare, read_state, read_tensors, state_checksum

SHORTEST = 16  # tokens: as data.max_seq_len


def export(
    checkpoint: str,
    output: str | Path,
    half: bool = False,
    data_dir: str | None = None,
    max_seq_len: int | None = None,
) -> int:
    """Write the folder; returns the bytes of its weights. UserError where there is no checkpoint of a run, where it is
    damaged, or where the folder holds a model already."""
    if max_seq_len is not None and max_seq_len < SHORTEST:
        raise UserError(f"--max_seq_len is {max_seq_len}, must be at least {SHORTEST}; leave it out for a training row")
    source, output = find_pretrained(checkpoint), Path(output)
    state = read_state(source)
    if (output / CONFIG).exists():
        raise UserError(f"--output {output}: holds a model already; remove it first, or give another folder")
    ours = {MODEL, STATE, *({CONFIG} & state.get("sha256", {}).keys())}  # older exports have no config's
    compare(source, state, ours, "take another checkpoint")  # before the damage is given checksums of its own
    tensors = read_tensors(source / WEIGHTS)
    if half:
        tensors = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}
    if data_dir is not None:
        if "data_dir" not in state["config"]["data"]:
            raise UserError("--data_dir is of the family meloformer; this model's lists of files name its data")
        state["config"]["data"]["data_dir"] = data_dir
    for name in ("output_dir", "init_from", "resume"):  # where its run lay is of no use to others
        state["config"].get("training", {}).pop(name, None)
    config = (source / CONFIG).read_bytes()
    if max_seq_len is not None:
        about = json.loads(config)
        if "max_seq_len" not in about:
            raise UserError("--max_seq_len is of the family meloformer; this model's rolls are as wide as asked for")
        config = json.dumps({**about, "max_seq_len": max_seq_len}, indent=1).encode()
    make_folder(output)
    write_atomic(output / WEIGHTS, save(tensors))
    state["sha256"] = {MODEL: checksum(output / WEIGHTS), CONFIG: hashlib.sha256(config).hexdigest()}
    state["sha256"][STATE] = state_checksum(state)
    write_atomic(output / STATE, json.dumps(state, indent=1).encode())
    write_atomic(output / CONFIG, config)  # last: a folder with it is whole
    return (output / WEIGHTS).stat().st_size


def main() -> None:
    parser = Parser(
        prog="python -m meloformer.export", description="A trained model without what only its training needs."
    )
    parser.add_argument("--checkpoint", required=True, help="a run (its best checkpoint is taken) or one checkpoint")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--half", action="store_true", help="weights as bfloat16: half the size, a little less exact")
    parser.add_argument("--data_dir", help="where evaluate.py will find the data (default: where the run found it)")
    parser.add_argument(
        "--max_seq_len", type=int, help="tokens that generate.py writes at most, unless told (default: a training row)"
    )
    options = parser.parse_args()
    size = export(options.checkpoint, options.output, options.half, options.data_dir, options.max_seq_len)
    print(f"{options.output}: {size / 1e6:.1f} MB of weights")
    print(f"next: python generate.py --checkpoint {options.output} --output out/")


if __name__ == "__main__":
    exit_cleanly(main)
