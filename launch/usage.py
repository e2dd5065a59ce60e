"""The text of `gatewise COMMAND --help`: every field, its default and what it means."""

from collections.abc import Mapping, Sequence
from enum import Enum

from gatewise.conf.fields import Field

__all__ = ["shown_value", "usage_text"]

_VALUE_COLUMN = 30


def usage_text(
    command: str,
    summary: str,
    table: Mapping[str, Field],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return the help of a command.

    Args:
        command: name of the command and its fixed words.
        summary: what it does, in a sentence or a few lines.
        table: its fields; the defaults are shown as they stand there.
        groups: name and choices of each group of settings.
    """
    lines = [f"usage: gatewise {command} [field=value ...]", "", summary]
    if groups:
        lines += ["", "groups (each sets many fields; single fields win over them):"]
        lines += [f"  {name}={'|'.join(choices)}" for name, choices in groups.items()]
    lines += ["", "fields and their defaults:"]
    for field in table.values():
        value = f"  {field.name}={shown_value(field.default)}"
        meaning = field.meaning.replace("None", "null")  # as it is written here
        if issubclass(field.kind, Enum):
            choices = "|".join(field.kind.__members__)
            meaning = f"{choices}: {meaning}" if meaning else choices
        lines.append(f"{value:<{_VALUE_COLUMN}}  # {meaning}" if meaning else value)
    return "\n".join(lines)


def shown_value(value: object) -> str:
    """Spell a value as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return value.name if isinstance(value, Enum) else str(value)
