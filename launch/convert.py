"""`gatewise convert WHAT`: models of other programs in and out."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from gatewise.conf.fields import nearest
from gatewise.parallel.errors import ConfigError

__all__ = ["run", "usage"]

_WAYS = {
    "from_hf": ("gatewise.launch.convert_in", "a folder of transformers as a checkpoint"),
    "from_gguf": ("gatewise.launch.convert_gguf", "a GGUF file of a Llama model as a checkpoint"),
    "from_megatron": ("gatewise.launch.convert_megatron_in", "Megatron's torch_dist checkpoint"),
    "to_hf": ("gatewise.launch.convert_out", "a checkpoint as a folder of transformers"),
    "to_megatron": (
        "gatewise.launch.convert_megatron_out",
        "a checkpoint as Megatron's torch_dist",
    ),
}


def run(arguments: Sequence[str]) -> int:
    """Convert one way and return the exit code."""
    return int(_load(arguments).run(arguments[1:]))


def usage(arguments: Sequence[str]) -> str:
    """Return the help of one way, or the list of them."""
    if not arguments:
        lines = ["usage: gatewise convert WHAT [field=value ...]", ""]
        return "\n".join(lines + [f"  {name:<14} {text}" for name, (_, text) in _WAYS.items()])
    return str(_load(arguments).usage(arguments[1:]))


def _load(arguments: Sequence[str]) -> ModuleType:
    name = arguments[0] if arguments else ""
    if name not in _WAYS:
        hint = nearest(name, _WAYS) if name else ""
        raise ConfigError(f"convert {name or 'what?'}{hint}; ways: {', '.join(_WAYS)}")
    return importlib.import_module(_WAYS[name][0])
