"""`gatewise bench WHAT`: measurements of this machine."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from gatewise.conf.fields import nearest
from gatewise.parallel.errors import ConfigError

__all__ = ["run", "usage"]

_BENCHES = {
    "generate": ("gatewise.launch.bench_generate", "text from a compressed model and its origin"),
    "kernels": ("gatewise.launch.bench_kernels", "packed low-bit weights beside torch's products"),
    "layer": ("gatewise.launch.bench_layer", "one MoE layer beside its peers"),
    "pregate": ("gatewise.launch.bench_pregate", "counts exchanged per layer, or planned ahead"),
    "schedule": ("gatewise.launch.bench_schedule", "schedules on emulated nodes, and predictions"),
    "step": ("gatewise.launch.bench_step", "where a training step spends its time"),
}


def run(arguments: Sequence[str]) -> int:
    """Run one benchmark and return the exit code."""
    return int(_load(arguments).run(arguments[1:]))


def usage(arguments: Sequence[str]) -> str:
    """Return the help of one benchmark, or the list of them."""
    if not arguments:
        lines = ["usage: gatewise bench WHAT [field=value ...]", ""]
        return "\n".join(lines + [f"  {name:<9} {text}" for name, (_, text) in _BENCHES.items()])
    return str(_load(arguments).usage(arguments[1:]))


def _load(arguments: Sequence[str]) -> ModuleType:
    name = arguments[0] if arguments else ""
    if name not in _BENCHES:
        hint = nearest(name, _BENCHES) if name else ""
        raise ConfigError(f"bench {name or 'what?'}{hint}; benchmarks: {', '.join(_BENCHES)}")
    return importlib.import_module(_BENCHES[name][0])
