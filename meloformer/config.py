"""Every setting of every command, with its type, its default and one line of help.

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

from meloformer.errors import UserError
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
# Names of hid.controls.CONDITIONS, again, because --help should not wait for numpy
CONDITIONS = ("key", "chords", "tag", "density", "polyphony", "role", "bar_density")
BY_MODEL = "the model decides"


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
    cross_bar_offsets: list[int] = option([0, 1, 2, 4], "which bars of other instruments it sees, by distance")
    visible: dict[str, list[str]] | None = option(
        VISIBLE, "which note tokens see which: query letter to key letters of T, P, L, V; none sees all"
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
        for query, keys in (self.visible or {}).items():
            good = query in VISIBLE and all(key in VISIBLE for key in keys)
            require(good, f"model.visible.{query}", keys, "letters of T, P, L, V", "such as T: [T, P]")


@dataclass(kw_only=True)
class DataConfig(Settings):
    """What is read, how it is cut and packed into rows, and how it is varied."""

    data_dir: str = option(help="folder that preprocess_data.py wrote")
    max_seq_len: int = option(24576, "tokens in a row of a batch; a longer piece is cut along bars")
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
        0.30, "how often rectangles of tracks and bars are deferred (infilling)"
    )
    defer_continuation_probability: float = option(0.25, "how often all tracks are deferred from a random bar on")
    defer_track_probability: float = option(0.10, "how often whole tracks are deferred")
    defer_scattered_probability: float = option(0.10, "how often scattered cells are deferred")
    bare_probability: float = option(0.2, "how often a piece is given no condition at all; the next are of the rest")
    key_probability: float = option(0.6, "how often a piece's key is given")
    chords_probability: float = option(0.6, "how often its chords are given")
    tag_probability: float = option(0.6, "how often its tag is given")
    density_probability: float = option(0.6, "how often its notes per quarter are given, and each track's")
    polyphony_probability: float = option(0.6, "how often a track's notes at once are given")
    role_probability: float = option(0.6, "how often a track's role is given")
    bar_density_probability: float = option(0.6, "how often the notes per quarter of every bar are given")
    predict_conditions: list[str] | None = option(
        None, "conditions that the model learns to write itself where they stand, such as key,chords", shown="none"
    )

    def __post_init__(self):
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
        require(self.data_dir != "", "data.data_dir", "", "a folder", "give --data_dir")
        require(self.max_seq_len >= 16, "data.max_seq_len", self.max_seq_len, "at least 16", "24576 is the default")
        require(self.max_segments >= 1, "data.max_segments", self.max_segments, "at least 1", "leave it out")
        require(self.max_bars >= 1, "data.max_bars", self.max_bars, "at least 1", "2048 is the default")
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
    val_task_rows: int = option(32, "held-out rows for each way of deferring bars (infilling); 0 leaves it out")

    def validate(self) -> None:
        super().validate()
        rows = self.val_task_rows
        self.require(rows >= 0, "training.val_task_rows", rows, "at least 0", "see --help for the default")


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
            self.require(value is None or value >= 1, name, value, "at least 1", "see --help for the default")
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


@dataclass(kw_only=True)
class GenerateConfig(Settings):
    """What generate.py takes."""

    family: Literal["meloformer", "fractal"] = option("meloformer", FAMILY_HELP, shown="what the checkpoint is")
    checkpoint: str = option(help="a run (its best checkpoint is taken) or one checkpoint")
    output: str = option(help="folder for the MIDI files")
    num_samples: int = option(4, "pieces to write, for each prompt if there are any")
    prompt: str | None = option(None, "MIDI file to go on from; say how with one of the next three tasks")
    prompts_file: str | None = option(None, "text file of such MIDI files, one path a line")
    continue_bars: int | None = option(None, "write so many bars more of every track of the prompt")
    rewrite: list[str] | None = option(
        None,
        "write bars of a track of the prompt anew: track=2,bars=8-16 or track=drums,bars=1; tracks and bars count from "
        "1; may be given again",
    )
    add_instruments: list[str] | None = option(None, "write new parts beside the prompt's, such as 33,drums")
    prompt_bars: int | None = option(
        None, "with continue_bars and add_instruments, read only the last so many bars", shown="as many as fit"
    )
    only_new: bool = option(False, "write the new notes alone, not the prompt's")
    bars: int | None = option(None, "bars in each piece", shown=BY_MODEL)
    tempo: int | None = option(None, "quarter notes a minute, 20 to 320", shown=BY_MODEL)
    time_signature: str | None = option(None, "such as 4/4 or 6/8", shown=BY_MODEL)
    instruments: list[str] | None = option(
        None, "General MIDI programs (0 to 127), names, or drums, such as drums,33,violin", shown=BY_MODEL
    )
    key: str | None = option(None, 'such as "A minor" or Bb', shown=BY_MODEL)
    chords: str | None = option(None, 'such as "Am F C G", begun again until the last bar', shown=BY_MODEL)
    chord_bars: float = option(1.0, "bars that each chord lasts, a multiple of 0.5")
    density: int | None = option(None, "how many notes, of all parts together: 1 (few) to 10", shown=BY_MODEL)
    bar_density: list[int] | None = option(
        None, "how many notes in each bar: 0 (none) to 7, such as 2,4,6, begun again until the last bar", shown=BY_MODEL
    )
    tag: str | None = option(None, "a style: the name of a folder of the music it was trained on", shown=BY_MODEL)
    track: list[str] | None = option(
        None,
        "a part and what is asked of it: program=33,role=bass,density=4,polyphony=1, all but the program optional; may "
        "be given again; without --instruments these are the parts",
        shown=BY_MODEL,
    )
    begin: bool | None = option(None, "the piece begins where its first bar is", shown="on")
    end: bool | None = option(
        None, "the piece ends with its last bar", shown="off, on where that is the end of a prompt's own music"
    )
    derive: bool = option(True, "tell the model a prompt's key, chords, densities and roles, as far as none are given")
    guidance: float = option(1.0, "above 1 such conditions weigh more, for twice the work")
    temperature: float = option(1.0, "below 1 safer, above 1 wilder; 0 always takes the likeliest token")
    temperature_time: float | None = option(None, "for when notes begin", shown="temperature")
    temperature_pitch: float | None = option(None, "for pitches", shown="temperature")
    temperature_duration: float | None = option(None, "for how long notes last", shown="temperature")
    temperature_velocity: float | None = option(None, "for how loud notes are", shown="temperature")
    top_k: int = option(0, "sample among the k likeliest tokens; 0 is off")
    top_p: float = option(0.98, "sample among the likeliest tokens that hold this share; 1 is off")
    min_p: float = option(0.0, "leave out tokens below this share of the likeliest one's probability; 0 is off")
    seed: int = option(0, "sample i is the same for the same seed")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    batch_size: int = option(8, "pieces written at once")
    max_length: int | None = option(None, "tokens in a piece at most", shown="max_seq_len of the run")
    plot: bool = option(False, "write a piano roll (.png) beside every piece, new notes in colour")
    wav: bool = option(False, "write sound (.wav) beside every piece, through FluidSynth")
    soundfont: str | None = option(None, "the .sf2 file that --wav sounds through", shown="the system's")
    family: Literal["meloformer", "fractal"] = option("meloformer", FAMILY_HELP, shown="what the checkpoint is")

    def validate(self) -> None:
        for name in ("num_samples", "bars", "batch_size", "max_length", "continue_bars", "prompt_bars"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, value, "at least 1", "see --help for the default")
        families = ("time", "pitch", "duration", "velocity")
        for name in ("temperature", "top_k", "seed", *(f"temperature_{family}" for family in families)):
            value = getattr(self, name)
            self.require(value is None or value >= 0, name, value, "at least 0", "see --help for the default")
        self._validate_task()
        tempo = self.tempo
        self.require(
            tempo is None or 20 <= tempo <= 320, "tempo", tempo, "from 20 to 320", "leave it out to let it vary"
        )
        self.require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1", "1 turns it off")
        self.require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1", "0 turns it off")
        self.require(self.guidance >= 0, "guidance", self.guidance, "at least 0", "1 turns it off")

    def _validate_task(self) -> None:
        """Flags that contradict each other."""

        def given(*names: str) -> list[str]:
            return [f"--{name}" for name in names if getattr(self, name) not in (None, False)]

        prompts = given("prompt", "prompts_file")
        tasks = given("continue_bars", "rewrite", "add_instruments")
        if len(prompts) > 1:
            raise UserError("--prompt and --prompts_file: give one of them; the file may name a single prompt")
        if prompts and len(tasks) != 1:
            raise UserError(
                f"{prompts[0]} needs one of --continue_bars, --rewrite and --add_instruments, received "
                f"{' and '.join(tasks) or 'none'}; the output of one may be the prompt of the next"
            )
        underived = [] if self.derive else ["--no-derive"]
        for flag in [] if prompts else [*tasks, *given("prompt_bars", "only_new"), *underived]:
            raise UserError(f"{flag} needs a MIDI file to go on from; give --prompt")
        for flag in given("bars", "tempo", "time_signature", "instruments") if prompts else []:
            raise UserError(f"{flag} is for pieces from nothing, here the prompt decides; leave it out")
        if self.rewrite is not None and self.prompt_bars is not None:
            raise UserError("--prompt_bars goes with --continue_bars or --add_instruments; --rewrite names its bars")
        if self.chord_bars != 1 and self.chords is None:
            raise UserError("--chord_bars is how long each of --chords lasts; give --chords too")
        if self.soundfont is not None and not self.wav:
            raise UserError("--soundfont is what --wav sounds through; give --wav too")


@dataclass(kw_only=True)
class EvaluateConfig(Settings):
    """What evaluate.py takes."""

    family: Literal["meloformer", "fractal"] = option("meloformer", FAMILY_HELP, shown="what the checkpoint is")
    checkpoint: str | None = option(None, "a run (its best checkpoint is taken) or one checkpoint: its likelihood")
    generated: str | None = option(None, "instead of a checkpoint, a folder of MIDI to measure beside --reference")
    reference: str | None = option(
        None, "held-out real music, best twice as many pieces: a folder of MIDI or of shards, or a run (its validation)"
    )
    training: str | None = option(
        None, "what the model learnt from, to find copies: a folder of MIDI or of shards, or a run (its own pieces)"
    )
    max_pieces: int = option(500, "read at most so many pieces of --generated and of --reference")
    data_dir: str | None = option(None, "folder that preprocess_data.py wrote", shown="the run's own")
    split: Literal["validation", "train"] = option("validation", "which pieces, by the run's own split")
    max_seq_len: int | None = option(
        None, "read rows of this many tokens, so with more or less context", shown="the run's own"
    )
    batch_size: int = option(1, "rows in one pass")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "auto is bf16 on hardware that has it, else fp32")
    conditions: list[str] | None = option(
        None, "measure the same music also with these given, such as key,chords or all; each: one by one", shown="none"
    )
    obedience: int | None = option(
        None, "write so many pieces under the conditions of held-out ones, and measure how they keep to them", shown="0"
    )
    guidance: float = option(1.0, "with obedience: above 1 the conditions weigh more, for twice the work")
    output: str | None = option(
        None,
        "file for the numbers; with --generated a folder for report.json and report.html",
        shown="evaluation.json in the run's folder, or the generated folder",
    )
    family: Literal["meloformer", "fractal"] = option("meloformer", FAMILY_HELP, shown="what the checkpoint is")

    def validate(self) -> None:
        if (self.checkpoint is None) == (self.generated is None):
            raise UserError(
                "give --checkpoint for likelihood, or --generated and --reference to measure music: one of them"
            )
        if (self.generated is None) != (self.reference is None):
            raise UserError("--generated and --reference go together: a figure means something beside real music only")
        if self.training is not None and self.generated is None:
            raise UserError("--training is what --generated is searched for copies of; give that too")
        self.require(self.max_pieces >= 1, "max_pieces", self.max_pieces, "at least 1", "500 is the default")
        self.require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1", "1 is the default")
        pieces = self.obedience or 0
        self.require(pieces >= 0, "obedience", pieces, "at least 0", "32 pieces already say something")
        self.require(self.guidance >= 0, "guidance", self.guidance, "at least 0", "1 turns it off")
        if self.guidance != 1 and not self.obedience:
            raise UserError("--guidance weighs the conditions of --obedience; give --obedience 32 too, or leave it out")
        rows = self.max_seq_len
        self.require(rows is None or rows >= 16, "max_seq_len", rows, "at least 16", "leave it out for the run's own")
