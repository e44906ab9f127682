"""Every setting of `train.py --family fractal`, under the names of its own documents.

>>> config = FractalConfig(data=FractalData(train_data="train.txt"), model=FractalModel(patch_size=16))
>>> config.model.img_size_list, config.model.num_generators, config.training.learning_rate, config.data.crop_length
([128, 16, 1], 2, 0.0001, 256)

The fields of `FractalTraining` keep the names that the training loop knows (`learning_rate`), and only their flags are
others (`--lr`). The surprise: four entries of a list are three generators and the velocity head, so the last word of
`generator_types` chooses nothing; three words are as good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from meloformer.loop_config import FAMILY_HELP, LoopConfig
from meloformer.settings import Settings, option

PITCHES = 128
GENERATOR_TYPES = ("mar", "ar")
SIZES, WIDTHS, BLOCKS, HEADS = [128, 16, 4, 1], [512, 256, 128, 64], [12, 3, 2, 1], [8, 4, 2, 2]


@dataclass(kw_only=True)
class FractalModel(Settings):
    """The generators, coarse to fine, and the velocity head."""

    img_size_list: list[int] = option(
        SIZES, "side of the patches of each level in cells; the last is one cell", spaced=True
    )
    embed_dim_list: list[int] = option(WIDTHS, "width of each generator, then of the velocity head", spaced=True)
    num_blocks_list: list[int] = option(BLOCKS, "transformer blocks of each", spaced=True)
    num_heads_list: list[int] = option(HEADS, "attention heads of each", spaced=True)
    patch_size: int | None = option(
        None, "another way to choose img_size_list: the side of its smallest patches above one cell", shown="4"
    )
    generator_types: list[str] = option(
        ["mar"] * 4, "mar (masked, in rounds) or ar (one patch after the other) for each level", spaced=True
    )
    scan_order: Literal["row_major", "column_major"] = option(
        "row_major", "the order of ar levels: all time of one band of pitches, or all pitches of one stretch of time"
    )
    mask_ratio_loc: float = option(1.0, "mar: the highest share of masked patches, and the likeliest")
    mask_ratio_scale: float = option(0.5, "mar: how far below it shares are drawn (standard deviation)")
    silent_fraction: float = option(
        1.0, "share of the silent patches that a training step goes into, each weighted so that the loss is the same"
    )
    dropout: float = option(0.0, "share of activations dropped in training")

    def __post_init__(self):
        if self.patch_size is None or self.img_size_list != SIZES or not 1 < self.patch_size <= 16:
            return
        if self.patch_size == 16:
            self.img_size_list = [128, 16, 1]
            for name, default in (("embed_dim", WIDTHS), ("num_blocks", BLOCKS), ("num_heads", HEADS)):
                if getattr(self, f"{name}_list") == default:
                    setattr(self, f"{name}_list", [*default[:2], default[3]])
            if self.generator_types == ["mar"] * 4:
                self.generator_types = ["mar"] * 3
        else:
            self.img_size_list = [128, 16, self.patch_size, 1]

    @property
    def num_generators(self) -> int:
        return len(self.img_size_list) - 1

    @property
    def kinds(self) -> list[str]:
        """`mar` or `ar` of each generator."""
        return self.generator_types[: self.num_generators]

    def validate(self) -> None:
        require, sizes = self.require, self.img_size_list
        require(
            len(sizes) >= 2 and sizes[0] == PITCHES and sizes[-1] == 1 and min(sizes) >= 1,
            "model.img_size_list",
            sizes,
            "a list from 128, the pitches, to 1, a cell",
            "128,16,4,1 is the default",
        )
        for larger, smaller in pairwise(sizes):
            require(
                larger % smaller == 0 and larger > smaller,
                "model.img_size_list",
                sizes,
                "sizes that each divide the one before",
                f"{smaller} does not divide {larger}" if larger > smaller else f"{smaller} is not below {larger}",
            )
        require(
            self.patch_size is None or self.patch_size in sizes[1:-1],
            "model.patch_size",
            self.patch_size,
            f"one of img_size_list's inner sizes ({', '.join(map(str, sizes[1:-1]))})",
            "give img_size_list alone",
        )
        for name in ("embed_dim_list", "num_blocks_list", "num_heads_list"):
            values = getattr(self, name)
            good = len(values) == len(sizes) and min(values) >= 1
            require(good, f"model.{name}", values, f"{len(sizes)} numbers from 1 on", "one for each of img_size_list")
        for width, heads in zip(self.embed_dim_list, self.num_heads_list):
            require(
                width % (4 * heads) == 0,
                "model.embed_dim_list",
                self.embed_dim_list,
                "widths that are a multiple of 4 times their num_heads_list",
                f"{width} is not one of {4 * heads}",
            )
        words = self.generator_types
        require(
            len(words) in (len(sizes), len(sizes) - 1) and set(words) <= set(GENERATOR_TYPES),
            "model.generator_types",
            ",".join(words),
            f"{len(sizes) - 1} or {len(sizes)} words, each mar or ar",
            "such as " + ",".join(["mar"] * len(sizes)),
        )
        require(0 < self.mask_ratio_loc <= 1, "model.mask_ratio_loc", self.mask_ratio_loc, "above 0, at most 1")
        require(self.mask_ratio_scale > 0, "model.mask_ratio_scale", self.mask_ratio_scale, "above 0")
        fraction = self.silent_fraction
        require(0 < fraction <= 1, "model.silent_fraction", fraction, "above 0, at most 1", "1 goes into all")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "from 0 to below 1", "0 turns it off")


@dataclass(kw_only=True)
class FractalData(Settings):
    """Which files, and what is cut out of them."""

    train_data: str = option(help="text file of MIDI files to train on, one path a line")
    val_data: str | None = option(None, "text file of held-out MIDI files", shown="nothing is held out")
    crop_length: int = option(256, "columns (sixteenth notes) of a roll: a multiple of 4; 128 are 8 bars of 4/4")
    augment_factor: int = option(1, "random crops of each piece in an epoch")
    pitch_shift_min: int = option(-3, "lowest transposition of a crop, in semitones")
    pitch_shift_max: int = option(3, "highest transposition")
    cache_in_memory: bool = option(True, "keep decoded rolls in memory")

    def validate(self) -> None:
        require, crop = self.require, self.crop_length
        require(self.train_data != "", "data.train_data", "", "a text file", "give --train_data")
        nearest = max(4, (crop + 2) // 4 * 4)
        require(crop >= 4 and crop % 4 == 0, "data.crop_length", crop, "a multiple of 4", f"{nearest} is the nearest")
        require(self.augment_factor >= 1, "data.augment_factor", self.augment_factor, "at least 1")
        low, high = self.pitch_shift_min, self.pitch_shift_max
        for name, value in (("min", low), ("max", high)):
            require(-48 <= value <= 48, f"data.pitch_shift_{name}", value, "from -48 to 48 semitones")
        require(low <= high, "data.pitch_shift_min", low, f"at most pitch_shift_max ({high})", "lower it")


@dataclass(kw_only=True)
class FractalTraining(LoopConfig):
    """How long, how fast, what is kept and what is shown."""

    output_dir: str | None = option("runs/fractal", "folder of the run: checkpoints, logs, config")
    resume: str = option(
        "never",
        "go on from this checkpoint, or auto from output_dir's latest if it has one; with another crop_length only the "
        "weights are taken, for a run of its own",
        flag="resume_from_checkpoint",
        aliases=("resume",),
    )
    max_steps: int | None = option(200000, "stop after this many optimizer steps; none is all epochs")
    batch_size: int = option(8, "rolls on each GPU in one pass", flag="train_batch_size", aliases=("batch_size",))
    val_batch_size: int = option(8, "held-out rolls in one pass")
    gradient_accumulation_steps: int = option(1, "passes to an optimizer step", flag="accumulate_grad_batches")
    learning_rate: float = option(1e-4, "highest learning rate, after the warm-up", flag="lr")
    min_lr: float | None = option(1e-6, "learning rate at the end of the cosine")
    warmup_steps: int = option(2000, "steps of linear warm-up, at most a tenth of the run")
    weight_decay: float = option(0.05, "decay of matrices; norms and embeddings have none")
    max_grad_norm: float = option(3.0, "gradients are clipped to this norm", flag="grad_clip")
    precision: Literal["32", "16", "bf16", "auto"] = option(
        "32", "bf16 multiplies matrices in bfloat16; 16 (float16) is refused; auto is bf16 on hardware that has it"
    )
    device: str = option(
        "auto", "auto, cpu, or GPUs by number: 0, or 0,1 with torchrun, one process each", flag="devices"
    )
    num_workers: int = option(4, "threads that build rolls ahead of need; 0 builds them when they are needed")
    gradient_checkpointing: bool = option(
        False,
        "compute activations again in the backward pass: less memory, more time",
        flag="grad_checkpoint",
        aliases=("grad_checkpointing", "model.grad_checkpointing"),
    )
    val_interval: int = option(2000, "steps between validations", flag="val_check_interval_steps")
    save_interval: int = option(5000, "steps between checkpoints", flag="checkpoint_every_n_steps")
    keep_last: int = option(1, "checkpoints kept besides the best")
    save_top_k: int = option(3, "the best checkpoints, by validation, are kept")
    log_interval: int = option(50, "steps between lines of metrics.jsonl", flag="log_every_n_steps")
    sample_interval: int = option(
        5000, "steps between pictures and GIFs; 0 makes none", flag="log_images_every_n_steps"
    )
    num_images_to_log: int = option(4, "rolls in each of them")
    generation_length: int | None = option(None, "columns of the generated ones", shown="crop_length")
    preview_num_iter_list: list[int] | None = option(
        None, "rounds of the generated ones at each level", spaced=True, shown="8 4 2 1, as many as there are levels"
    )

    def validate(self) -> None:
        self.require(
            self.precision != "16",
            "training.precision",
            "16",
            "32, bf16 or auto",
            "float16 needs its loss scaled and overflows here; bf16 is as fast and does not",
        )
        super().validate()
        for name in ("val_batch_size", "save_top_k", "num_images_to_log"):
            value = getattr(self, name)
            self.require(value >= 1, f"training.{name}", value, "at least 1")
        width = self.generation_length
        good = width is None or (width >= 4 and width % 4 == 0)
        self.require(good, "training.generation_length", width, "a multiple of 4", "leave it out for crop_length")
        rounds = self.preview_num_iter_list
        good = rounds is None or min(rounds, default=0) >= 1
        self.require(good, "training.preview_num_iter_list", rounds, "numbers from 1 on")


@dataclass(kw_only=True)
class FractalConfig(Settings):
    """What `train.py --family fractal` takes."""

    family: Literal["meloformer", "fractal"] = option("fractal", FAMILY_HELP)
    model: FractalModel = field(default_factory=FractalModel)
    data: FractalData
    training: FractalTraining = field(default_factory=FractalTraining)

    def validate(self) -> None:
        super().validate()
        rounds, levels = self.training.preview_num_iter_list, self.model.num_generators
        self.require(
            rounds is None or len(rounds) in (levels, levels + 1),
            "training.preview_num_iter_list",
            rounds,
            f"{levels} numbers, one for each level, or {levels + 1}",
        )


@dataclass(kw_only=True)
class FractalEvaluateConfig(Settings):
    """What evaluate.py takes for a FractalMIDI checkpoint."""

    family: Literal["meloformer", "fractal"] = option("fractal", FAMILY_HELP, shown="what the checkpoint is")
    checkpoint: str = option(help="a run (its best checkpoint is taken) or one checkpoint")
    data: str | None = option(None, "text file of MIDI files, one path a line", shown="the run's val_data")
    crop_length: int | None = option(None, "columns of a roll, so more or less context", shown="the run's own")
    batch_size: int = option(8, "rolls in one pass")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    precision: Literal["32", "bf16", "auto"] = option("32", "what matrices are multiplied in")
    output: str | None = option(None, "file for the numbers", shown="evaluation.json in the run's folder")

    def validate(self) -> None:
        self.require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        crop = self.crop_length
        good = crop is None or (crop >= 4 and crop % 4 == 0)
        self.require(good, "crop_length", crop, "a multiple of 4", "leave it out for the run's own")
