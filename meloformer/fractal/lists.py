"""A folder of MIDI files -> the two lists that `--train_data` and `--val_data` take, near-duplicates kept together.

    python -m meloformer.fractal.lists --input midi/ --output lists/

In: a folder, or a text file with one path a line. Out: train.txt and valid.txt in `--output`, a path a line, relative
to it. Which side a piece is on is decided by its cluster of near-duplicates (meloformer.data.clusters) alone, as for
preprocessed folders: the same files and the same fraction hold out the same pieces.

The surprise: a file that cannot be read, or has too few notes to be music, is in neither list; it is named on stderr.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from meloformer.command_line import Parser
from meloformer.config import DataConfig, PreprocessConfig
from meloformer.data.clusters import cluster
from meloformer.data.encoder import Encoder, Rejected
from meloformer.data.packing import hold_out
from meloformer.data.sources import Input
from meloformer.errors import UserError, exit_cleanly
from meloformer.files import write_atomic
from meloformer.wording import counted

TRAIN, VALIDATION = "train.txt", "valid.txt"


def write_lists(
    given: str, output: Path, fraction: float = DataConfig.validation_fraction, seed: int = DataConfig.validation_seed
) -> dict[str, int]:
    """Write both lists; returns the number of files in each. UserError where nothing can be held out or written."""
    if not 0 < fraction < 1:
        raise UserError(f"--validation_fraction is {fraction}, must be above 0 and below 1")
    files = Input(given)
    encode = Encoder(PreprocessConfig(input=given, output=str(output)))
    paths, contents, shingles = [], [], []
    for source in tqdm(files, total=files.files, desc="reading", unit="file", disable=not sys.stderr.isatty()):
        result = encode(source)
        if isinstance(result, Rejected):
            print(f"left out {result.name}: {result.detail}", file=sys.stderr)
            continue
        paths.append(source.path)
        contents.append(result.content)
        shingles.append(result.shingles)
    if not paths:
        raise UserError(f"{given}: none of its {counted(files.files, 'file')} can be used")
    with tempfile.TemporaryDirectory() as work:
        clusters = cluster(np.array(contents, dtype=np.uint64), shingles, Path(work))
    held_out = hold_out(clusters, fraction, seed, given)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, chosen in ((VALIDATION, held_out), (TRAIN, ~held_out)):
            lines = [os.path.relpath(paths[i], output) + "\n" for i in np.flatnonzero(chosen)]
            write_atomic(output / name, os.fsencode("".join(lines)))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); check the folder") from None
    return {TRAIN: int((~held_out).sum()), VALIDATION: int(held_out.sum())}


def main() -> None:
    parser = Parser(
        prog="python -m meloformer.fractal.lists", description="Lists of MIDI files to train on and to hold out."
    )
    parser.add_argument("--input", required=True, help="folder of MIDI files, or a text file with one path a line")
    parser.add_argument("--output", required=True, type=Path, help=f"folder for {TRAIN} and {VALIDATION}")
    default = DataConfig.validation_fraction
    parser.add_argument("--validation_fraction", type=float, default=default, help=f"held out (default: {default})")
    parser.add_argument("--validation_seed", type=int, default=0, help="which are held out (default: 0)")
    arguments = parser.parse_args()
    sizes = write_lists(arguments.input, arguments.output, arguments.validation_fraction, arguments.validation_seed)
    print(", ".join(f"{arguments.output / name}: {counted(number, 'file')}" for name, number in sizes.items()))


if __name__ == "__main__":
    exit_cleanly(main)
