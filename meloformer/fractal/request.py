"""What generate.py takes for a FractalMIDI checkpoint.

>>> FractalGenerateConfig(checkpoint="runs/fractal", output="out", num_iter_list=[4, 2, 1, 1]).mode
'unconditional'

The surprise: columns are sixteenth notes counted from 0, and a range leaves out its last one: `--mask_start 64
--mask_end 192` are bars 5 to 12 of 4/4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from meloformer.errors import UserError
from meloformer.loop_config import FAMILY_HELP
from meloformer.settings import Settings, option

SHORTEST, LONGEST = 4, 1024  # columns; training lengths are from 64 to 1024
MODES = Literal["unconditional", "conditional", "inpainting"]


@dataclass(kw_only=True)
class FractalGenerateConfig(Settings):
    """What generate.py takes for a FractalMIDI checkpoint."""

    family: Literal["meloformer", "fractal"] = option("fractal", FAMILY_HELP, shown="what the checkpoint is")
    checkpoint: str = option(help="a run (its best checkpoint is taken) or one checkpoint")
    output: str = option(help="folder for the .mid and .png files", aliases=("output_dir",))
    mode: MODES = option(
        "unconditional",
        "unconditional: from nothing; conditional: go on from the beginning of a MIDI file; inpainting: write columns "
        "of one anew",
    )
    num_samples: int = option(4, "rolls to write")
    target_width: int | None = option(
        None, "columns (sixteenth notes) of a roll, up to 1024: a multiple of 4", shown="crop_length of the run"
    )
    prompt: str | None = option(None, "MIDI file for the modes conditional and inpainting")
    condition_length: int | None = option(
        None, "conditional: columns of the prompt that are kept", shown="half of target_width"
    )
    mask_start: int | None = option(None, "inpainting: first column that is written anew, counted from 0")
    mask_end: int | None = option(None, "inpainting: the column after the last one")
    num_iter_list: list[int] = option(
        [12, 8, 4, 1], "rounds of each mar level; 4 2 1 1 is fast, 8 4 2 1 standard, 16 8 4 1 high quality", spaced=True
    )
    temperature: float = option(1.0, "of the velocities; below 1 safer, above 1 wilder")
    sparsity_bias: float = option(0.0, "added to the logit of silence: above 0 fewer notes, below 0 more")
    velocity_threshold: int = option(0, "generated cells quieter than this (0 to 127) are silent")
    tempo: float | None = option(None, "quarter notes a minute, 20 to 320", shown="the prompt's, else 120")
    seed: int = option(0, "sample i is the same for the same seed")
    batch_size: int = option(8, "rolls generated at once")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    gif: bool = option(False, "write how each roll came about (.gif)")
    stacked: bool = option(False, "draw the second half of a roll below the first: 512 columns become a square")

    def validate(self) -> None:
        require = self.require
        for name in ("num_samples", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        width = self.target_width
        good = width is None or (SHORTEST <= width <= LONGEST and width % 4 == 0)
        nearest = min(max(SHORTEST, ((width or 0) + 2) // 4 * 4), LONGEST)
        require(
            good, "target_width", width, f"a multiple of 4 from {SHORTEST} to {LONGEST}", f"{nearest} is the nearest"
        )
        rounds = self.num_iter_list
        require(len(rounds) >= 1 and min(rounds) >= 1, "num_iter_list", rounds, "numbers from 1 on", "such as 12 8 4 1")
        good = 0 <= self.temperature < math.inf
        require(good, "temperature", self.temperature, "at least 0 and finite")
        require(math.isfinite(self.sparsity_bias), "sparsity_bias", self.sparsity_bias, "a finite number")
        threshold = self.velocity_threshold
        require(0 <= threshold <= 127, "velocity_threshold", threshold, "from 0 to 127", "0 leaves all notes in")
        tempo = self.tempo
        require(tempo is None or 20 <= tempo <= 320, "tempo", tempo, "from 20 to 320", "leave it out")
        self.require_seed("seed", self.seed)
        self._validate_mode()

    def _validate_mode(self) -> None:
        """Flags that contradict the mode."""
        belongs = {"condition_length": ("conditional",), "mask_start": ("inpainting",), "mask_end": ("inpainting",)}
        belongs["prompt"] = ("conditional", "inpainting")
        for name, modes in belongs.items():
            if getattr(self, name) is not None and self.mode not in modes:
                raise UserError(f"--{name} goes with --mode {' or '.join(modes)}, and the mode is {self.mode}")
        if self.mode != "unconditional" and self.prompt is None:
            raise UserError(f"--mode {self.mode} needs a MIDI file; give --prompt")
        if self.condition_length is not None:
            length, width = self.condition_length, self.target_width or LONGEST
            good = 1 <= length < width
            self.require(good, "condition_length", length, f"from 1 to {width - 1}, below target_width", "lower it")
        if self.mode != "inpainting":
            return
        for name in ("mask_start", "mask_end"):
            if getattr(self, name) is None:
                raise UserError(f"--mode inpainting needs --{name}, a column of the prompt")
        start, end = self.mask_start, self.mask_end
        self.require(
            0 <= start < end, "mask_start", start, f"at least 0 and below mask_end ({end})", "swap or move them"
        )
