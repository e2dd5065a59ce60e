"""Lists that are written with commas in one field of a benchmark's settings."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from gatewise.conf.fields import nearest

__all__ = ["split_list"]

_Item = TypeVar("_Item")


def split_list(
    text: str,
    name: str,
    parse: Callable[[str], _Item],
    *,
    allowed: str,
    names: Sequence[str] = (),
) -> list[_Item]:
    """Return the parsed parts of a list, each once.

    Args:
        text: the list.
        name: of the field.
        parse: raises KeyError or ValueError for what the field does not take.
        allowed: what it takes, in words.
        names: what a misspelt part may have meant.

    Raises:
        ValueError: naming the field and the part.
    """
    items: dict[_Item, None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            items[parse(part)] = None
        except (KeyError, ValueError):
            raise ValueError(
                f"{name} has {part!r}{nearest(part, names)}; it takes {allowed}"
            ) from None
    return list(items)
