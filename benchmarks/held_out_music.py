"""A hundred new pieces on the conductors and instruments of held-out music, measured beside that music.

    python -m benchmarks.held_out_music --checkpoint runs/base --output runs/held_out [--pieces 100 --bars 32]

In: a trained model and its run's own data. Held-out pieces are cut into windows of `--bars` bars; every window gives
its bars, meters, tempos, instruments and what is derived from it (`generate.py --anew`; `--no_derive`: no conditions),
and none of its notes. Every window is asked equally often, so there may be more pieces than `--pieces`; where there are
more windows than that, as many are drawn. Out: `real/` and `generated/` as MIDI, and what `evaluate.py --generated`
writes, report.json and report.html, with real/ as the reference and the run's training music to find copies of.

The surprise: the reference is the windows that were asked, not the whole pieces (a piece of 32 bars repeats less than a
song) and not the other windows (a band repeats more than a chorale).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meloformer.command_config import EvaluateConfig, GenerateConfig
from meloformer.command_line import Parser
from meloformer.config import DataConfig
from meloformer.data import Corpus
from meloformer.data.packing import split_pieces
from meloformer.data.windows import PieceTable
from meloformer.errors import UserError, exit_cleanly
from meloformer.evaluation.compare import compare
from meloformer.files import write_atomic
from meloformer.generation.command import run as generate
from meloformer.hid import Tokenizer
from meloformer.midi import write_midi
from meloformer.pretrained import find_pretrained
from meloformer.training.checkpoint import read_state

LEAST_BARS = 8  # a shorter rest of a piece is left out


def write_windows(checkpoint: str, folder: Path, bars: int, most: int, seed: int) -> list[Path]:
    """MIDI files of the windows of the run's held-out pieces, one piece after the other; of more than `most`, as many
    are drawn."""
    saved = read_state(find_pretrained(checkpoint))["config"]["data"]
    data = DataConfig.from_dict(saved, f"{checkpoint}: data")
    corpus = Corpus(data.data_dir)
    tokenizer, windows = Tokenizer(corpus.vocabulary), {}
    for number in split_pieces(corpus, data)[0]["validation"].tolist():
        table = PieceTable(corpus.piece(number), corpus.vocabulary)
        for first in range(0, table.num_bars, bars):
            last = min(first + bars, table.num_bars)
            score = tokenizer.decode(table.window(first, last))
            if score.num_bars >= LEAST_BARS and score.num_notes:
                windows[folder / f"{number:05d}_{first + 1:03d}.mid"] = score
    if not windows:
        raise UserError(f"{checkpoint}: no held-out piece has {LEAST_BARS} bars; give more music")
    paths = list(windows)
    if len(paths) > most:
        paths = [paths[i] for i in sorted(np.random.default_rng(seed).permutation(len(paths))[:most])]
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        write_midi(windows[path], path)
    return paths


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a run")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=100, help="new pieces, at least: the same number on every window")
    parser.add_argument("--bars", type=int, default=32, help="bars in a window")
    parser.add_argument("--max_length", type=int, default=8192, help="tokens in a piece at most")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_derive", action="store_true", help="tell the model no conditions")
    options = parser.parse_args()
    real, generated = options.output / "real", options.output / "generated"
    if any(real.glob("*.mid")) or any(generated.glob("*.mid")):
        raise UserError(f"{options.output}: holds pieces of an earlier run; give another --output")
    windows = write_windows(options.checkpoint, real, options.bars, options.pieces, options.seed)
    each = -(-options.pieces // len(windows))
    prompts = options.output / "windows.txt"
    write_atomic(prompts, "".join(f"{path}\n" for path in windows).encode())
    print(f"{each} new pieces on each of {len(windows)} windows of held-out music")
    generate(
        GenerateConfig(
            checkpoint=options.checkpoint,
            output=str(generated),
            prompts_file=str(prompts),
            anew=True,
            num_samples=each,
            max_length=options.max_length,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            derive=not options.no_derive,
        )
    )
    compare(
        EvaluateConfig(
            generated=str(generated), reference=str(real), training=options.checkpoint, output=str(options.output)
        )
    )


if __name__ == "__main__":
    exit_cleanly(main)
