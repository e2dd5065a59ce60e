"""The settings of a command as a flat table: dotted name, type, default and meaning.

The meaning of a field is the comment behind it in its dataclass, so that `--help` and the source
cannot differ. Nothing here knows Hydra; `compose.py` puts the values together.
"""

import difflib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from gatewise.parallel.errors import ConfigError

__all__ = [
    "Field",
    "field_table",
    "nearest",
    "parse_override",
    "split_overrides",
    "unknown_name",
]

_Schema = TypeVar("_Schema")
_COMMENT = re.compile(r"^    (\w+)\s*:.*?\s#\s*(.+?)\s*$")
_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, as in [{name: value, ...}, ...]",
}


@dataclass(frozen=True, slots=True)
class Field:
    """One setting that is not a section."""

    name: str  # dotted, as it is written on the command line
    kind: type  # int, float, bool, str, list or an Enum
    optional: bool  # may be null
    default: Any
    meaning: str

    def allowed(self) -> str:
        """Say in words which values the field takes."""
        if issubclass(self.kind, Enum):
            words = "one of " + ", ".join(self.kind.__members__)
        else:
            words = _KINDS.get(self.kind, self.kind.__name__)
        return f"{words} or null" if self.optional else words

    def parse(self, text: str) -> Any:
        """Return the value that `text` stands for.

        Raises:
            ConfigError: if the field does not take it.
        """
        if self.optional and text.lower() in ("null", "none"):
            return None
        if "${" in text:  # OmegaConf resolves a reference to another field
            return text
        if self.kind is str:
            return _unquote(text)
        if self.kind is list:
            return self._parse_list(text)
        try:
            return self._convert(_unquote(text.strip()))
        except (KeyError, ValueError):
            pass
        hint = ""
        if issubclass(self.kind, Enum):
            hint = nearest(text, self.kind.__members__)
        raise ConfigError(f"{self.name} is {text!r}; it must be {self.allowed()}{hint}")

    def _parse_list(self, text: str) -> Any:
        """Return the entries of a list in YAML's short form; the schema checks each of them."""
        from omegaconf import OmegaConf

        try:
            entries = OmegaConf.to_container(OmegaConf.create(_unquote(text.strip())))
        except Exception:  # PyYAML's errors share no public base with OmegaConf's
            entries = None
        if not isinstance(entries, list):
            raise ConfigError(f"{self.name} is {text!r}; it must be {self.allowed()}")
        return entries

    def _convert(self, text: str) -> Any:
        if self.kind is bool:
            return _BOOLEANS[text.lower()]
        if issubclass(self.kind, Enum):
            return self.kind[text]
        convert: Callable[[str], Any] = self.kind  # int or float
        return convert(text)


def field_table(config: Any, *, prefix: str = "") -> dict[str, Field]:
    """Return every setting below `config` by dotted name, in the order of the dataclasses.

    Args:
        config: a settings dataclass or an instance of one; nested instances give the type of
            their section, so that a subclass with further fields is seen as what it is.
        prefix: dotted name of `config` itself with a final dot, empty for the root.
    """
    owner = config if isinstance(config, type) else type(config)
    meanings = _comments(owner)
    hints = get_type_hints(owner)
    table: dict[str, Field] = {}
    for item in fields(owner):
        name = f"{prefix}{item.name}"
        value = _default(item) if isinstance(config, type) else getattr(config, item.name)
        if is_dataclass(value):
            table |= field_table(value, prefix=f"{name}.")
        else:
            kind, optional = _scalar(hints[item.name])
            meaning = meanings.get(item.name, "")
            table[name] = Field(name, kind, optional, value, meaning)
    return table


def parse_override(
    text: str, table: Mapping[str, Field], *, groups: Iterable[str] = ()
) -> tuple[str, str]:
    """Split `field=value` and check that the field exists.

    Hydra's leading `+` and `++` are accepted and mean nothing, because no field can be added.

    Args:
        text: one argument of the command line.
        table: the fields that exist.
        groups: further names, for the hint at the nearest one.

    Raises:
        ConfigError: for an option, a removal, a section or an unknown name.
    """
    if text.startswith("-"):
        raise ConfigError(f"unknown option {text!r}; settings are written field=value")
    if text.startswith("~"):
        raise ConfigError(f"{text!r} removes a setting; give it another value instead")
    name, equals, value = text.lstrip("+").partition("=")
    name = name.strip()
    if not equals:
        raise ConfigError(
            f"{text!r} is not a setting; write {name}=..., or see --help for the names"
        )
    if name not in table:
        raise ConfigError(unknown_name(name, table, groups=groups))
    return name, value


def split_overrides(schema: type[_Schema], arguments: Sequence[str]) -> tuple[_Schema, list[str]]:
    """Part the fields of a command's own settings from those of the run that it looks at.

    Args:
        schema: dataclass of the command's own fields, all with defaults.
        arguments: of the command line.

    Returns:
        The settings, and the arguments that name none of them.

    Raises:
        ConfigError: if a field of the command does not take its value.
    """
    table = field_table(schema)
    own: dict[str, Any] = {}
    rest: list[str] = []
    for text in arguments:
        if text.lstrip("+").partition("=")[0].strip() in table:
            name, value = parse_override(text, table)
            own[name] = table[name].parse(value)
        else:
            rest.append(text)
    return schema(**own), rest


def unknown_name(name: str, table: Mapping[str, Field], *, groups: Iterable[str] = ()) -> str:
    """Return the message for a name that is no setting, with the nearest one that is."""
    if name == "hydra" or name.startswith("hydra."):
        return f"{name} has no effect here; set the folder of a run with run.dir=..."
    inside = [field.removeprefix(f"{name}.") for field in table if field.startswith(f"{name}.")]
    if inside:
        return f"{name} is a section; set one of its fields: " + ", ".join(
            f"{name}.{field}" for field in inside
        )
    hint = nearest(name, [*_names(table), *groups])
    return f"unknown setting {name!r}{hint}; --help lists all of them"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the candidate most like `name`, or nothing."""
    candidates = list(dict.fromkeys(candidates))
    leaf = name.rpartition(".")[2]
    same_leaf = [word for word in candidates if word.rpartition(".")[2] == leaf]
    matches: Sequence[str] = same_leaf if name not in same_leaf else []
    if len(matches) > 1:
        matches = difflib.get_close_matches(name, matches, n=1, cutoff=0.0)
    if not matches:
        matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not matches:
        by_leaf = {word.rpartition(".")[2]: word for word in reversed(candidates)}
        close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
        matches = [by_leaf[word] for word in close]
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _names(table: Mapping[str, Field]) -> list[str]:
    """Return the fields and the sections that hold them."""
    sections = (name.rpartition(".")[0] for name in table)
    return [*table, *(section for section in sections if section)]


def _default(item: Any) -> Any:  # dataclasses.Field, whose default may be of any type
    if item.default_factory is not MISSING:
        return item.default_factory()
    return None if item.default is MISSING else item.default


def _scalar(hint: Any) -> tuple[type, bool]:
    """Return the type behind `X` or `X | None`, and whether None is allowed."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0], type(None) in get_args(hint)
    return (list, False) if get_origin(hint) is list else (hint, False)


def _unquote(text: str) -> str:
    """Drop one pair of quotes around all of `text`, as Hydra does."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


@functools.cache  # finding a class parses its file
def _comments(owner: type) -> Mapping[str, str]:
    """Return the comment behind each field of a dataclass, base classes included."""
    found: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if not is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # installed without sources: help goes without meanings
            continue
        for line in source.splitlines():
            match = _COMMENT.match(line)
            if match:
                found[match[1]] = match[2]
    return found
