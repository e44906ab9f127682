"""A command line into a config: defaults <- preset <- `--config file.yaml` <- flags and `key=value`.

>>> from meloformer.config import Config
>>> config = load(Config, ["--data_dir", "processed", "--model-size", "small", "model.n_layer=4"])
>>> config.model.size, config.model.n_layer, config.data.max_bars
('small', 4, 2048)

Every key is a flag, `--max_seq_len 512`, with underscores or hyphens, booleans also as `--no-plot`; and every key is
an override, `data.max_seq_len=512`. A flag that takes a list of words may be given again, to add to it. The surprise:
argparse lays out the help and cuts the line into words, but no value passes through its types, so that a flag and a
line of yaml are read by the same rules and refused alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from meloformer.errors import UserError
from meloformer.settings import Key, S, Settings, expand_home, find_key, read_values, read_word, read_yaml

_NEGATIVE = re.compile(r"-[\d.]")  # how no flag begins
SECTION_TITLES = {"model": "the model", "data": "the data", "training": "training", "": "settings"}


def load(cls: type[S], argv: Sequence[str] | None = None, description: str | None = None) -> S:
    """The validated config of a command line (None: this process's own). `--help` prints and exits 0."""
    words = _spell_flags(cls, list(sys.argv[1:] if argv is None else argv))
    flags, rest = _parser(cls, description).parse_known_args(words)
    given: dict[str, Any] = {}
    for key in cls.options():
        word = getattr(flags, key.dotted)
        if isinstance(word, list):
            rest += [part for part in word if key.spaced and "=" in part]
            word = ",".join(part for part in word if not (key.spaced and "=" in part))
        if word is not None:
            given[key.dotted] = word if isinstance(word, bool) else read_word(key, expand_home(word), f"--{key.flag}")
    for word in rest:
        spelled, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word}: not understood here; give a flag such as --{cls.options()[0].flag}, or key=value")
        key = find_key(cls, spelled, word)
        if key.dotted in given:
            raise UserError(f"{word}: {key.dotted} is given twice; keep one of them")
        given[key.dotted] = read_word(key, expand_home(text), word)
    values = read_values(cls, read_yaml(flags.config), flags.config) if flags.config else {}
    return cls.from_values({**values, **given}, "command line")


class Parser(argparse.ArgumentParser):
    """Errors are a UserError of one line, and in a flag hyphens and underscores are the same."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelled(word) for word in words], namespace)

    def _spelled(self, word: str) -> str:
        """A flag as it was added."""
        flag, equals, value = word.partition("=")
        for name in (flag, "--" + flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")):
            if flag.startswith("--") and name in self._option_string_actions:
                return f"{name}{equals}{value}"
        return word

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every flag")


def _spell_flags(cls: type[Settings], words: list[str]) -> list[str]:
    """Flags in the one spelling that the parser holds; one that does not exist is refused here, with the nearest."""
    spelled: list[str] = []
    known = {key.flag: key for key in cls.options()}
    for word in words:
        flag, equals, value = word.partition("=")
        before = known.get(spelled[-1].removeprefix("--")) if spelled and spelled[-1].startswith("--") else None
        if before is not None and _NEGATIVE.match(word) and not (before.spaced or _is_switch(before)):
            spelled[-1] += f"={word}"  # else argparse takes -1,0 for a flag
            continue
        if not flag.startswith("--") or flag in ("--help", "--config", "--"):
            spelled.append(word)
            continue
        name = flag[2:].replace("-", "_")
        negated = name.startswith("no_") and name not in known and name[3:] in known and _is_switch(known[name[3:]])
        key = known[name[3:]] if negated else find_key(cls, name, flag)
        spelled.append(f"--{'no-' if negated else ''}{key.flag}{equals}{value}")
    return spelled


def _parser(cls: type[Settings], description: str | None) -> argparse.ArgumentParser:
    parser = Parser(
        description=description or cls.__doc__,
        usage="%(prog)s [--config FILE] [--flag VALUE ...] [key=value ...]",
        epilog="Hyphens and underscores are the same in a flag. A key in a section is also written section.key=value.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    parser.add_argument("--config", metavar="FILE", help="yaml file of keys, flat or by section; flags override it")
    groups: dict[str, Any] = {}
    for key in cls.options():
        section = key.path[0] if len(key.path) > 1 else ""
        if section not in groups:
            groups[section] = parser.add_argument_group(SECTION_TITLES.get(section, section))
        action = {"action": argparse.BooleanOptionalAction} if _is_switch(key) else {"metavar": _metavar(key.hint)}
        if key.spaced:
            action["nargs"] = "+"
        elif list[str] in (key.hint, *typing.get_args(key.hint)):
            action["action"] = "append"
        # default=None, not the real one: what was not given must not override the yaml file
        groups[section].add_argument(f"--{key.flag}", dest=key.dotted, default=None, help=_help(key), **action)
    return parser


def _is_switch(key: Key) -> bool:
    """Whether its flag is --name or --no-name; None may stand for a default that is worked out later."""
    return key.hint is bool or key.hint == bool | None


def _metavar(hint: Any) -> str:
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, members))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return "|".join(map(_metavar, members))
    return {list: "A,B,..", dict: "MAP", int: "N", float: "X"}.get(typing.get_origin(hint) or hint, "TEXT")


def _help(key: Key) -> str:
    if key.default is dataclasses.MISSING:
        default = "required"
    elif key.shown is not None or key.default is None:
        default = f"default: {key.shown or 'none'}"
    elif isinstance(key.default, bool):
        default = f"default: {'on' if key.default else 'off'}"
    else:
        default = f"default: {key.default}"
    return f"{key.help} ({default})".replace("%", "%%")
