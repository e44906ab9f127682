"""Every setting of generate.py and evaluate.py, with its type, its default and one line of help.

>>> GenerateConfig(checkpoint="runs/base", output="out", bars=8, key="A minor").num_samples
4

The surprise: what contradicts itself is refused here, before torch is imported; what only the model or the prompt can
tell (an unknown tag, a track that is not there) is refused where they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meloformer.errors import UserError
from meloformer.loop_config import FAMILY_HELP
from meloformer.settings import Settings, option

BY_MODEL = "the model decides"


@dataclass(kw_only=True)
class GenerateConfig(Settings):
    """What generate.py takes."""

    family: Literal["meloformer", "fractal"] = option("meloformer", FAMILY_HELP, shown="what the checkpoint is")
    checkpoint: str = option(help="a run (its best checkpoint is taken) or one checkpoint")
    output: str = option(help="folder for the MIDI files")
    num_samples: int = option(4, "pieces to write, for each prompt if there are any")
    prompt: str | None = option(None, "MIDI file to go on from; say how with one of the next four tasks")
    prompts_file: str | None = option(None, "text file of such MIDI files, one path a line; # begins a comment")
    continue_bars: int | None = option(None, "write so many bars more of every track of the prompt")
    rewrite: list[str] | None = option(
        None,
        "write bars of a track of the prompt anew: track=2,bars=8-16 or track=drums,bars=1; tracks and bars count from "
        "1; may be given again",
    )
    add_instruments: list[str] | None = option(None, "write new parts beside the prompt's, such as 33,drums")
    anew: bool = option(
        False,
        "write a new piece on the prompt's bars, meters, tempos and instruments (--bars: its first), without its notes",
    )
    add_bars: str | None = option(
        None, "with add_instruments, the bars in which they play, such as 9-16, counted from 1", shown="all"
    )
    prompt_bars: int | None = option(
        None,
        "with continue_bars, read only the last so many bars; with add_instruments, they play in those",
        shown="as many as fit; with add_instruments all",
    )
    only_new: bool = option(
        False,
        "write the new notes alone, not the prompt's; they keep their place in its bars, so the file may begin with "
        "silence, and lies right beside the prompt from bar 1",
    )
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
    derive: bool = option(
        True,
        "where no key, chords, densities and roles are given, take a prompt's own; from nothing, let a model that was "
        "trained with --predict_conditions write them; off: tell it what is given alone",
    )
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

    def validate(self) -> None:
        for name in ("num_samples", "bars", "batch_size", "max_length", "continue_bars", "prompt_bars"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, value, "at least 1")
        families = ("time", "pitch", "duration", "velocity")
        for name in ("temperature", "top_k", *(f"temperature_{family}" for family in families)):
            value = getattr(self, name)
            self.require(value is None or value >= 0, name, value, "at least 0")
        self.require_seed("seed", self.seed)
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
        tasks = given("continue_bars", "rewrite", "add_instruments", "anew")
        if len(prompts) > 1:
            raise UserError("--prompt and --prompts_file: give one of them; the file may name a single prompt")
        if prompts and len(tasks) != 1:
            raise UserError(
                f"{prompts[0]} needs one of --continue_bars, --rewrite, --add_instruments and --anew, received "
                f"{' and '.join(tasks) or 'none'}; the output of one may be the prompt of the next"
            )
        for flag in [] if prompts else [*tasks, *given("prompt_bars", "add_bars", "only_new")]:
            raise UserError(f"{flag} needs a MIDI file to go on from; give --prompt")
        own = given("tempo", "time_signature", "instruments") + ([] if self.anew else given("bars"))
        for flag in own if prompts else []:
            raise UserError(f"{flag} is for pieces from nothing, here the prompt decides; leave it out")
        if (self.rewrite is not None or self.anew) and self.prompt_bars is not None:
            raise UserError(
                "--prompt_bars goes with --continue_bars or --add_instruments; --rewrite names its bars, and --anew "
                "writes the first --bars"
            )
        if self.add_bars is not None and (self.add_instruments is None or self.prompt_bars is not None):
            raise UserError(
                "--add_bars says where --add_instruments play; give those too, and not --prompt_bars as well"
            )
        if self.anew and self.only_new:
            raise UserError("--only_new leaves the prompt's notes out, and --anew does not keep them; leave it out")
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

    def validate(self) -> None:
        if (self.checkpoint is None) == (self.generated is None):
            raise UserError(
                "give --checkpoint for likelihood, or --generated and --reference to measure music: one of them"
            )
        if (self.generated is None) != (self.reference is None):
            raise UserError("--generated and --reference go together: a figure means something beside real music only")
        if self.training is not None and self.generated is None:
            raise UserError("--training is what --generated is searched for copies of; give that too")
        own = ("data_dir", "split", "max_seq_len", "batch_size", "device", "precision", "conditions", "obedience")
        unread = (*own, "guidance") if self.generated is not None else ("max_pieces",)
        for name in unread:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                other = "--checkpoint" if self.generated is not None else "--generated"
                raise UserError(f"--{name} is not read here, it goes with {other}; leave it out")
        self.require(self.max_pieces >= 1, "max_pieces", self.max_pieces, "at least 1", "500 is the default")
        self.require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1", "1 is the default")
        pieces = self.obedience or 0
        self.require(pieces >= 0, "obedience", pieces, "at least 0", "32 pieces already say something")
        self.require(self.guidance >= 0, "guidance", self.guidance, "at least 0", "1 turns it off")
        if self.guidance != 1 and not self.obedience:
            raise UserError("--guidance weighs the conditions of --obedience; give --obedience 32 too, or leave it out")
        rows = self.max_seq_len
        self.require(rows is None or rows >= 16, "max_seq_len", rows, "at least 16", "leave it out for the run's own")
