"""Every setting of preprocess_data.py and train.py, with its type, its default and one line of help.

Those of a trained model, generate.py and evaluate.py, are in meloformer.command_config.

A config is built from defaults <- the preset of `model_size` <- `--config file.yaml` <- flags and `key=value`
(meloformer.command_line), or in Python:

>>> config = Config(data=DataConfig(data_dir="processed"), model=ModelConfig(size="small", n_layer=4))
>>> config.model.n_layer, config.model.d_model, config.data.max_segments, config.training.output_dir
(4, 256, 2048, 'runs/small')

The surprise: fields that default to None because they follow from others (n_layer, max_segments, output_dir) are
filled when the object is made, so `dataclasses.replace` keeps the old numbers unless it is given them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from meloformer.loop_config import FAMILY_HELP, LoopConfig
from meloformer.settings import Settings, option

# Two feed-forwards of width d_ff a layer, for summaries and for regular tokens (the last layer has the latter alone),
# give 17M, 85M, 200M and 450M parameters, within 3 %; with one a layer it is as much wider as keeps the count.
MODEL_SIZES = {
    "small": {"n_layer": 6, "n_head": 4, "d_model": 256, "d_ff": 1792},
    "base": {"n_layer": 12, "n_head": 8, "d_model": 512, "d_ff": 2048},
    "large": {"n_layer": 16, "n_head": 12, "d_model": 768, "d_ff": 2304},
    "xlarge": {"n_layer": 24, "n_head": 16, "d_model": 1024, "d_ff": 2432},
}
VISIBLE = {"T": ["T", "P"], "P": ["L"], "L": ["V"], "V": ["T", "P"]}
BY_SIZE = "by model_size"
MAX_SEQ_LEN = 24_576
MOST_BARS = 16_384  # what model.packed has bits for
# Names of hid.controls.CONDITIONS, again, because --help should not wait for numpy
CONDITIONS = ("key", "chords", "tag", "density", "polyphony", "role", "bar_density")


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """The network and its attention rule."""

    size: Literal["small", "base", "large", "xlarge"] = option(
        "base", "preset of n_layer, n_head, d_model and d_ff: 17M, 85M, 200M or 450M parameters", flag="model_size"
    )
    n_layer: int | None = option(None, "number of layers", shown=BY_SIZE)
    n_head: int | None = option(None, "attention heads", shown=BY_SIZE)
    d_model: int | None = option(None, "width of the residual stream, a multiple of n_head", shown=BY_SIZE)
    d_ff: int | None = option(None, "width of a feed-forward", shown=BY_SIZE)
    summaries: bool = option(True, "one summary token per bar of an instrument")
    summary_ff: Literal["separate", "shared"] = option(
        "separate", "summaries have their own feed-forward, or share one that is wider by default"
    )
    pattern: Literal["bar_sparse", "full_causal"] = option(
        "bar_sparse", "the attention rule: bars and token types, or everything earlier in the piece (the baseline)"
    )
    backend: Literal["auto", "dense", "gathered", "flex", "fused"] = option(
        "auto",
        "how attention is computed: dense everywhere, gathered (what is seen alone) on a CPU, flex (block-sparse) on "
        "CUDA, fused for full_causal alone; auto takes the fastest",
    )
    same_bar_offsets: Literal["all"] | list[int] = option(
        "all", "which earlier bars of its own instrument a token sees: all, or distances such as 0,1,2,4"
    )
    cross_bar_offsets: list[int] = option(
        [0, 1, 2, 4], "which bars of other instruments it sees, by distance: 1 is the bar before, -1 the one after"
    )
    visible: dict[str, list[str]] | None = option(
        VISIBLE,
        "which note tokens see which, the letters of keys by that of the query: T onsets, P pitches, L durations, V "
        "velocities; a letter without any sees its own onset alone; none: all see all",
    )
    rotary_axes: Literal[1, 2] = option(2, "rotary positions turn with stream order (1), or with musical time too (2)")
    dropout: float = option(0.0, "share of activations dropped in training")

    def __post_init__(self):
        preset = MODEL_SIZES.get(self.size)
        if preset is None:
            return  # validate() names the sizes
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, self._feed_forward_width(value) if name == "d_ff" else value)

    def _feed_forward_width(self, d_ff: int) -> int:
        """The default width: `d_ff`, or where a layer has one feed-forward, what holds as many parameters."""
        if self.summary_ff == "separate" and self.summaries and self.pattern == "bar_sparse":
            return d_ff
        return round(d_ff * (2 - 1 / max(self.n_layer, 1)) / 64) * 64

    def validate(self) -> None:
        require = self.require
        require(self.size in MODEL_SIZES, "model.size", self.size, ", ".join(MODEL_SIZES), "see --model_size")
        for name in ("n_layer", "n_head", "d_model", "d_ff"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}", value, "at least 1", "leave it out to take it from model_size")
        head = self.d_model / self.n_head
        # Two rotary axes split a head in halves, and each axis turns pairs.
        unit = 2 * self.rotary_axes
        remedy = f"try --d_model {max(1, round(head / unit)) * unit * self.n_head} or another --n_head"
        require(
            head % unit == 0, "model.d_model", self.d_model, f"n_head ({self.n_head}) x a multiple of {unit}", remedy
        )
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "from 0 to below 1", "0 turns it off")
        good = self.backend != "fused" or self.pattern == "full_causal"
        require(
            good,
            "model.backend",
            "fused",
            "auto, dense, gathered or flex",
            "fused computes --pattern full_causal alone",
        )
        offsets = self.same_bar_offsets
        require(
            offsets == "all" or 0 in offsets,
            "model.same_bar_offsets",
            offsets,
            "all or a list with 0 in it",
            "without 0 a token does not see its own bar",
        )
        for name in ("same_bar_offsets", "cross_bar_offsets"):
            given = getattr(self, name)
            good = given == "all" or all(abs(offset) <= MOST_BARS for offset in given)
            require(good, f"model.{name}", given, f"distances of -{MOST_BARS} to {MOST_BARS}", "no piece has more bars")
        for query, keys in (self.visible or {}).items():
            good = query in VISIBLE and all(key in VISIBLE for key in keys)
            require(good, f"model.visible.{query}", keys, "letters of T, P, L, V", "such as T: [T, P]")


@dataclass(kw_only=True)
class DataConfig(Settings):
    """What is read, how it is cut and packed into rows, and how it is varied."""

    data_dir: str = option(help="folder that preprocess_data.py wrote")
    max_seq_len: int | None = option(
        None,
        "tokens in a row of a batch; a longer piece is cut along bars",
        shown=f"{MAX_SEQ_LEN}; with init_from what that was trained on",
    )
    max_segments: int | None = option(None, "summaries in a row", shown="max_seq_len / 12, rounded up to 128s")
    max_bars: int = option(2048, "a piece with more bars than this is skipped")
    max_samples: int | None = option(None, "use only this many pieces", shown="all")
    validation_fraction: float = option(0.05, "share of the pieces held out, near-duplicates together")
    validation_seed: int = option(0, "which pieces are held out")
    transpose_probability: float = option(0.5, "how often a piece is transposed, drums never")
    transpose_max: int = option(5, "by at most this many semitones, up or down")
    velocity_probability: float = option(0.5, "how often a piece is made louder or softer")
    velocity_max: float = option(0.2, "by at most this share")
    drop_track_probability: float = option(0.1, "how often some whole tracks are left out")
    shuffle_tracks_probability: float = option(0.25, "how often the tracks come in a random order")
    defer_rectangle_probability: float = option(
        0.30,
        "how often rectangles of tracks and bars are deferred (moved to the end of the stream, where they are written "
        "with all the rest known: infilling)",
    )
    defer_continuation_probability: float = option(0.25, "how often all tracks are deferred from a random bar on")
    defer_track_probability: float = option(0.10, "how often whole tracks are deferred")
    defer_scattered_probability: float = option(0.10, "how often scattered cells are deferred")
    bare_probability: float = option(0.4, "how often a piece is given no condition at all; the next are of the rest")
    key_probability: float = option(0.8, "how often a piece's key is given")
    chords_probability: float = option(0.8, "how often its chords are given")
    tag_probability: float = option(0.8, "how often its tag is given")
    density_probability: float = option(0.8, "how often its notes per quarter are given, and each track's")
    polyphony_probability: float = option(0.8, "how often a track's notes at once are given")
    role_probability: float = option(0.8, "how often a track's role is given")
    bar_density_probability: float = option(0.8, "how often the notes per quarter of every bar are given")
    predict_conditions: list[str] | None = option(
        None,
        "conditions that the model learns to write itself, such as key,chords; generate.py lets it where none is given",
        shown="none",
    )

    def __post_init__(self):
        # What --init_from may decide (meloformer.training.streams)
        self.left_open = [name for name in ("max_seq_len", "max_segments") if getattr(self, name) is None]
        if self.max_seq_len is None:
            self.max_seq_len = MAX_SEQ_LEN
        if self.max_segments is None:
            self.max_segments = -(-self.max_seq_len // (12 * 128)) * 128

    def given_conditions(self) -> list[str]:
        """Names of the conditions that are given at all."""
        if self.bare_probability == 1:
            return []
        return [name for name in CONDITIONS if getattr(self, f"{name}_probability") > 0]

    def validate(self) -> None:
        require = self.require
        for name in self.predict_conditions or ():
            require(name in CONDITIONS, "data.predict_conditions", name, ", ".join(CONDITIONS), "leave the others out")
            remedy = f"raise --{name}_probability" if self.bare_probability < 1 else "lower --bare_probability"
            require(name in self.given_conditions(), "data.predict_conditions", name, "one that is ever given", remedy)
        require(self.data_dir != "", "data.data_dir", "", "a folder", "give --data_dir")
        rows = self.max_seq_len
        require(rows >= 16, "data.max_seq_len", rows, "at least 16", f"{MAX_SEQ_LEN} is the default")
        require(self.max_segments >= 1, "data.max_segments", self.max_segments, "at least 1", "leave it out")
        require(
            1 <= self.max_bars <= MOST_BARS,
            "data.max_bars",
            self.max_bars,
            f"1 to {MOST_BARS}",
            "2048 is the default; nine hours of music have no more",
        )
        samples = self.max_samples
        require(samples is None or samples >= 1, "data.max_samples", samples, "at least 1", "leave it out to use all")
        fraction = self.validation_fraction
        require(0 <= fraction < 1, "data.validation_fraction", fraction, "from 0 to below 1", "0.05 is the default")
        for name in vars(self):
            if name.endswith("_probability"):
                value = getattr(self, name)
                require(0 <= value <= 1, f"data.{name}", value, "from 0 to 1", "0 turns it off")
        deferred = sum(value for name, value in vars(self).items() if name.startswith("defer_"))
        require(
            deferred <= 1 + 1e-9,
            "data.defer_*_probability",
            deferred,
            "at most 1 together",
            "the rest has nothing deferred",
        )
        require(0 <= self.transpose_max <= 12, "data.transpose_max", self.transpose_max, "0 to 12", "5 is the default")
        require(
            0 <= self.velocity_max < 1, "data.velocity_max", self.velocity_max, "0 to below 1", "0.2 is the default"
        )


@dataclass(kw_only=True)
class TrainingConfig(LoopConfig):
    """What MeloFormer's runs take beside what all runs do."""

    compile: bool = option(False, "fuse the model's operations with torch.compile")
    val_task_rows: int = option(
        32, "held-out rows for each way of deferring bars (infilling), and for predicted conditions; 0 leaves both out"
    )

    def validate(self) -> None:
        super().validate()
        rows = self.val_task_rows
        self.require(rows >= 0, "training.val_task_rows", rows, "at least 0")


@dataclass(kw_only=True)
class Config(Settings):
    """What train.py takes."""

    family: Literal["meloformer", "fractal"] = option("meloformer", FAMILY_HELP)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        if self.training.output_dir is None:
            self.training.output_dir = f"runs/{self.model.size}"


@dataclass(kw_only=True)
class PreprocessConfig(Settings):
    """What preprocess_data.py takes."""

    input: str = option(help="a folder of MIDI files, or a text file with one path a line")
    output: str = option(help="folder for the shards")
    workers: int | None = option(
        None, "processes that read and encode; the output is the same for any number", shown="one for each core"
    )
    shard_size: int = option(10000, "pieces in a shard")
    limit: int | None = option(None, "read only this many files", shown="all")
    min_notes: int = option(16, "a piece with fewer notes is rejected")
    min_bars: int = option(2, "a piece with fewer bars is rejected")
    max_bars: int = option(2048, "a piece with more bars is rejected")
    resolution: int = option(24, "ticks of the token grid in a quarter note, a multiple of 4")
    sustain_pedal: Literal["ignore", "extend"] = option(
        "ignore", "extend lets a note sound until the pedal that holds it is lifted"
    )
    conditions: bool = option(True, "derive key, chords, densities, roles and tags, for a model that takes them")
    dedup: bool = option(True, "keep one of several pieces with the same content")
    part: str | None = option(
        None, "i/n: only the i-th of n shares of the input; meloformer.data.merge joins them", shown="all of it"
    )
    file_timeout: float = option(60.0, "seconds for one file; one that takes longer, twice, is rejected")
    file_memory: int = option(2048, "megabytes for one file; one that needs more, twice, is rejected")

    def validate(self) -> None:
        for name in ("workers", "shard_size", "limit", "min_notes", "min_bars", "max_bars"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, value, "at least 1")
        bars = f"at least min_bars ({self.min_bars})"
        self.require(self.max_bars >= self.min_bars, "max_bars", self.max_bars, bars, "lower --min_bars")
        good = self.resolution % 4 == 0 and 4 <= self.resolution <= 96
        self.require(good, "resolution", self.resolution, "a multiple of 4 from 4 to 96", "24 is the default")
        self.require(self.file_timeout > 0, "file_timeout", self.file_timeout, "above 0", "60 is the default")
        self.require(self.file_memory >= 64, "file_memory", self.file_memory, "at least 64", "2048 is the default")
        i, n = self.share
        self.require(1 <= i <= n, "part", self.part, "i/n with i from 1 to n, such as 2/4", "leave it out for all")

    @property
    def share(self) -> tuple[int, int]:
        """(i, n) of `part`; (1, 1) for the whole input, (0, 0) for what is no part."""
        i, slash, n = (self.part or "1/1").partition("/")
        return (int(i), int(n)) if slash and i.isdecimal() and n.isdecimal() else (0, 0)
