"""The model families by name, where the parts of each are, and which of them a command line means. No torch here.

A third one is an entry in `FAMILIES`; what it consists of is said in meloformer.training.family.

    family_of_command_line()                 of this process's own arguments: "meloformer" or "fractal"
    config_class("fractal", "train")         FractalConfig: what train.py's flags are read into
    command_of("fractal", "generate")        what generate.py does with its config; imports torch
    open_family(config)                      what the training loop asks (meloformer.training.family); imports torch

>>> family_of_command_line(["--family", "fractal", "--train_data", "train.txt"])
'fractal'

What surprises: a family is decided before the command line is read, because it decides which flags there are. It is
said by --family, else by the yaml file of --config, else by what the model of --checkpoint is; else it is MeloFormer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from meloformer.errors import UserError, ended_at_once
from meloformer.pretrained import family_of
from meloformer.settings import Settings, expand_home, read_yaml

if TYPE_CHECKING:
    from meloformer.training.family import ModelFamily

Command = Literal["train", "generate", "evaluate"]


@dataclass(frozen=True)
class FamilyParts:
    """Where a family's parts are, as "module:name": of each command the class that its flags are read into, and what
    does it. For train.py that is a meloformer.training.family.ModelFamily; a family may go without the other two."""

    train: tuple[str, str]
    generate: tuple[str, str] | None = None
    evaluate: tuple[str, str] | None = None


FAMILIES = {
    "meloformer": FamilyParts(
        train=("meloformer.config:Config", "meloformer.training.streams:Streams"),
        generate=("meloformer.command_config:GenerateConfig", "meloformer.generation.command:run"),
        evaluate=("meloformer.command_config:EvaluateConfig", "meloformer.evaluation.command:run"),
    ),
    "fractal": FamilyParts(
        train=("meloformer.fractal.config:FractalConfig", "meloformer.fractal.family:Rolls"),
        generate=("meloformer.fractal.request:FractalGenerateConfig", "meloformer.fractal.command:run"),
        evaluate=("meloformer.fractal.config:FractalEvaluateConfig", "meloformer.fractal.evaluate:run"),
    ),
}


def family_of_command_line(argv: Sequence[str] | None = None) -> str:
    """The name of the family that these words mean (None: this process's own); UserError where --checkpoint names no
    model, unless --help is asked for."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = _value(words, "family")
    config = _value(words, "config")
    if given is None and config is not None:
        data = read_yaml(config)
        given = data.get("family") if isinstance(data, dict) else None
        if given is None and isinstance(data, dict) and data.get("checkpoint") and _value(words, "checkpoint") is None:
            words += ["--checkpoint", str(data["checkpoint"])]
    if given is None:
        checkpoint = _value(words, "checkpoint")
        try:
            given = "meloformer" if checkpoint is None else family_of(checkpoint)
        except UserError:  # said first: flags of the family that the model would be of are no mistake
            if {"-h", "--help"}.isdisjoint(words):
                raise
            return "meloformer"
        if given not in FAMILIES:
            raise UserError(f"{checkpoint}: a model of the family {given!r}; there are {', '.join(FAMILIES)}")
    if not isinstance(given, str) or given not in FAMILIES:
        raise UserError(f"--family is {given!r}, must be one of {', '.join(FAMILIES)}")
    return given


def _value(words: list[str], flag: str) -> str | None:
    """The last value of a flag among words of a command line, `--flag value` or `--flag=value` or `flag=value`."""
    found = None
    for word, following in zip(words, [*words[1:], None]):
        name, equals, value = word.partition("=")
        if name in (f"--{flag}", flag) and equals:
            found = value
        elif word == f"--{flag}" and following is not None:
            found = following
    return None if found is None else expand_home(found)


def config_class(name: str, command: Command) -> type[Settings]:
    """What the flags of a command are read into; UserError where the family has no such command."""
    return _part(name, command, 0)


def command_of(name: str, command: Literal["generate", "evaluate"]) -> Callable[[Any], None]:
    """What does it, given a config of `config_class`; UserError where the family has no such command."""
    return _part(name, command, 1)


def open_family(config: Settings) -> ModelFamily:
    """What the loop asks about a run of this config."""
    return _part(config.family, "train", 1)(config)


def _part(name: str, command: Command, which: int) -> Any:
    places = getattr(FAMILIES[name], command)
    if places is None:
        raise UserError(f"{command}.py: the family {name} has no such command; see meloformer/families.py")
    module, _, part = places[which].partition(":")
    with ended_at_once():
        return getattr(import_module(module), part)
