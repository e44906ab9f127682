"""A dataclass that knows its keys: strict reading of yaml and flag values into typed fields, and back into a dict.

In: a mapping, nested by section (`{"model": {"n_layer": 4}}`) or flat (`{"n_layer": 4}`). Out: the dataclass, cast
and validated. Every refusal is a UserError that says where, what was received, what is accepted, and what is nearest.

>>> from meloformer.config import ModelConfig
>>> ModelConfig.from_dict({"size": "small", "dropout": "1e-1"}).dropout
0.1

The surprise: numbers are cast by the type of their field and never by yaml, which (version 1.1) reads `3e-4` as text,
010 as 8 and 4:4 as 244.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from meloformer.errors import UserError
from meloformer.files import write_atomic


def option(default: Any = dataclasses.MISSING, help: str = "", **metadata: Any) -> Any:
    """A dataclass field with its help text. Metadata: `flag`, a flag name other than the field's; `aliases`, further
    names; `shown`, how help words a default that is worked out later; `spaced`, a list whose words may also stand apart
    (`--sizes 16 4 1`). Lists and dicts are copied for every instance."""
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: _copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Key(NamedTuple):
    """One field of a Settings class: `path` is ("model", "n_layer") in a sectioned class, ("output",) in a flat one."""

    path: tuple[str, ...]
    flag: str
    hint: Any
    default: Any  # dataclasses.MISSING where the key is required
    help: str
    shown: str | None
    aliases: tuple[str, ...] = ()
    spaced: bool = False

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def spellings(self) -> tuple[str, ...]:
        """Dotted by field name, dotted by flag name, the flag alone, and its other names."""
        return self.dotted, ".".join((*self.path[:-1], self.flag)), self.flag, *self.aliases


S = TypeVar("S", bound="Settings")


class Settings:
    """Base of the config dataclasses. Fields that are Settings themselves are sections."""

    @classmethod
    def options(cls) -> tuple[Key, ...]:
        """Every key, the sections' in their order."""
        return _options(cls)

    @classmethod
    def from_dict(cls: type[S], data: Any, where: str = "settings") -> S:
        """Strict inverse of `to_dict`; absent keys take their defaults. UserError for anything else."""
        return cls.from_values(read_values(cls, data, where), where)

    @classmethod
    def from_values(cls: type[S], values: dict[str, Any], where: str) -> S:
        """From typed values by dotted key."""
        missing = [key for key in cls.options() if key.default is dataclasses.MISSING and key.dotted not in values]
        if missing:
            key = missing[0]
            raise UserError(f"{where}: {key.dotted} is missing; give --{key.flag} ({key.help})")
        sections: dict[str, dict[str, Any]] = {}
        flat: dict[str, Any] = {}
        for dotted, value in values.items():
            *section, name = dotted.split(".")
            (sections.setdefault(section[0], {}) if section else flat)[name] = value
        built = {name: kind(**sections.get(name, {})) for name, kind in _sections(cls).items()}
        settings = cls(**built, **flat)
        settings.validate()
        return settings

    @classmethod
    def flag(cls, dotted: str) -> str:
        """The flag of a key, without its hyphens."""
        return next(key.flag for key in cls.options() if key.dotted == dotted)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, every default resolved: what is saved with a run."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """One yaml file that `--config` reads back."""
        write_atomic(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())

    def validate(self) -> None:
        """UserError where values contradict each other or leave their range. Sections validate themselves first."""
        for name in _sections(type(self)):
            getattr(self, name).validate()

    def require_seed(self, key: str, seed: int) -> None:
        """UserError unless torch takes it."""
        self.require(0 <= seed < 2**63, key, seed, "from 0 to 2**63 - 1", "0 is the default")

    @staticmethod
    def require(good: bool, key: str, received: Any, accepted: str, remedy: str = "") -> None:
        """UserError of one line unless `good`; without `remedy` where what is accepted says it all."""
        if not good:
            raise UserError(f"{key} is {received!r}, must be {accepted}{remedy and '; '}{remedy}")


# What PyYAML answers with: to bad syntax, but also to a 30th of February, to a list as a key, to `!!bool maybe`.
NOT_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


# --- reading ------------------------------------------------------------------------------------------------


def read_yaml(path: str | Path) -> Any:
    """The content of a yaml file, numbers as text; an empty one is an empty mapping."""
    try:
        text = Path(expand_home(str(path))).read_text(encoding="utf-8")
        data = _at_home(yaml.load(text, Loader=_Loader))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; configs/ holds examples") from None
    except NOT_YAML as error:
        raise UserError(f"--config {path}: not yaml: {' '.join(str(error).split())}") from None
    return {} if data is None else data


def expand_home(word: str) -> str:
    """A path that begins with ~/ as a shell would have it, which does so only where the ~ begins a word: not in
    `--output=~/out`, and not in a file. Nothing else that a setting takes begins so."""
    return os.path.expanduser(word) if word == "~" or word.startswith("~/") else word


def _at_home(data: Any) -> Any:
    """`expand_home` of every text in a yaml file."""
    if isinstance(data, dict):
        return {key: _at_home(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_at_home(item) for item in data]
    return expand_home(data) if isinstance(data, str) else data


def read_values(cls: type[Settings], data: Any, where: str) -> dict[str, Any]:
    """Typed values by dotted key out of a nested or flat mapping."""
    if not isinstance(data, dict):
        raise UserError(f"{where}: a mapping of keys to values is expected, received {data!r}")
    values: dict[str, Any] = {}

    def put(spelled: str, value: Any) -> None:
        key = find_key(cls, spelled, where)
        if key.dotted in values:
            raise UserError(f"{where}: {key.dotted} is given twice; keep one of them")
        values[key.dotted] = read_value(key, value, where)

    for name, value in data.items():
        if name in _sections(cls):
            if not isinstance(value, dict | None):
                raise UserError(f"{where}: {name} is {value!r}, must be a section of keys, such as {name}: {{...}}")
            for inner, inner_value in (value or {}).items():
                put(f"{name}.{inner}", inner_value)
        else:
            put(str(name), value)
    return values


def find_key(cls: type[Settings], spelled: str, where: str) -> Key:
    """The key that is spelled so (hyphens count as underscores), or a UserError that names the nearest."""
    name = spelled.replace("-", "_")
    by_spelling = {spelling: key for key in cls.options() for spelling in key.spellings}
    if name in by_spelling:
        return by_spelling[name]
    # The last part is compared on its own as well, so that a right name in a wrong section is found.
    near = difflib.get_close_matches(name.split(".")[-1], by_spelling, 1) or difflib.get_close_matches(
        name, by_spelling, 1
    )
    is_flag = where.startswith("--")
    # A flag of the other family, say of --mode for a checkpoint of token streams, has nothing near it.
    family = by_spelling.get("family")
    remedy = f"--help lists those of the family {family.default}" if family else "--help lists them all"
    if near:
        key = by_spelling[near[0]]
        remedy = f"the nearest is {f'--{key.flag}' if is_flag else key.dotted}"
    raise UserError(f"{where}: no such flag; {remedy}" if is_flag else f"{where}: {spelled} is not a key; {remedy}")


def read_value(key: Key, value: Any, where: str) -> Any:
    """`value` cast to the type of `key`, or a UserError that says what is accepted."""
    if key.spaced and isinstance(value, str):
        value = value.replace(",", " ").split()
    try:
        return _cast(value, key.hint)
    except ValueError:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in _choices(key.hint)], 1, 0.6)
        nearest = f"; the nearest is {near[0]}" if near else ""
        raise UserError(f"{where}: {key.dotted} is {value!r}, must be {describe(key.hint)}{nearest}") from None


def read_word(key: Key, word: str, where: str) -> Any:
    """`read_value` of a word of the command line: text where the key takes text, else what yaml makes of it."""
    members = typing.get_args(key.hint)
    if word == "none" and type(None) in members:
        return None
    if key.hint is str or str in members or typing.get_origin(key.hint) is typing.Literal:
        return read_value(key, word, where)
    try:
        return read_value(key, yaml.load(word, Loader=_Loader), where)
    except NOT_YAML:
        return read_value(key, word, where)


def describe(hint: Any) -> str:
    """A type in words.

    >>> describe(typing.Literal["all"] | list[int])
    'all or a list of whole numbers'
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(describe(member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return f"{'one of ' if len(choices) != 1 else ''}{', '.join(map(str, choices))}"
    if typing.get_origin(hint) is list:
        return {int: "a list of whole numbers", str: "a list of words"}.get(typing.get_args(hint)[0], "a list")
    if typing.get_origin(hint) is dict:
        return "a mapping"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}[hint]


def _cast(value: Any, hint: Any) -> Any:
    """`value` as `hint`, ValueError where it is something else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for member in sorted(arguments, key=lambda member: member is not type(None)):
            try:
                return _cast(value, member)
            except ValueError:
                continue
        raise ValueError(value)
    if origin is typing.Literal:
        for choice in arguments:
            # `2 == "2"` and `True == 1` are both traps here: compare as text, exclude bools
            if not isinstance(value, bool) and str(value) == str(choice):
                return choice
        raise ValueError(value)
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return [_cast(item.strip() if isinstance(item, str) else item, arguments[0]) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(value)
        return {_cast(k, arguments[0]): _cast(v, arguments[1]) for k, v in value.items()}
    if hint is type(None):
        if value is not None:
            raise ValueError(value)
        return None
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(value)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(value)
    if hint is str:
        if isinstance(value, float):  # 1.10 has become 1.1: the text is gone, so ask for quotes
            raise ValueError(value)
        return str(value)
    if isinstance(value, int):
        return hint(value)
    if hint is int and isinstance(value, str):
        try:
            return int(value)  # a float would round what is beyond 2**53
        except ValueError:
            pass  # 1e3 is a whole number too
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    if hint is int:
        if not number.is_integer():
            raise ValueError(value)
        return int(number)
    return number


def _choices(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [choice for member in typing.get_args(hint) for choice in _choices(member)]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _sections(cls: type[Settings]) -> dict[str, type[Settings]]:
    """Section name -> its class, empty for a flat class."""
    hints = {f.name: _hints(cls)[f.name] for f in dataclasses.fields(cls)}
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Settings)}


@cache
def _options(cls: type[Settings]) -> tuple[Key, ...]:
    found: list[Key] = []
    for f in dataclasses.fields(cls):
        if f.name in _sections(cls):
            found += [key._replace(path=(f.name, *key.path)) for key in _options(_sections(cls)[f.name])]
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        meta = f.metadata
        words = (meta.get("flag", f.name), _hints(cls)[f.name], default, meta.get("help", ""), meta.get("shown"))
        found.append(Key((f.name,), *words, meta.get("aliases", ()), meta.get("spaced", False)))
    return tuple(found)


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a config says each thing once. Numbers stay text."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor):
        # Here, because later on the keys of what `<<` takes in stand beside those that override them.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node
