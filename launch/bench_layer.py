"""`gatewise bench layer`: forward and backward of one MoE layer, ours beside its peers.

Everything is given as a ratio to the dense layer of equal active arithmetic. The measuring is done
by one child process (`bench_cells.py`), so that all candidates share an allocator whose settings
must stand in the environment before a process starts.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table, nearest
from gatewise.launch.lists import split_list
from gatewise.launch.machine import available_cores, cpu_features, cpu_model
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.moe.config import Activation
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig

__all__ = ["Allocator", "Gradients", "LayerBenchConfig", "run", "usage"]

_DTYPES = ("fp32", "bf16")
# Freed memory stays with the process: no candidate pays for first touching the same pages again.
_TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
_POLL_S = 0.3
_NUMBERS = ("tokens", "hidden", "expert_width", "rounds", "cell_seconds", "seed")
_Item = TypeVar("_Item")


class Allocator(Enum):
    """How glibc's allocator is set, for all candidates alike."""

    tuned = "tuned"  # it keeps what was freed
    plain = "plain"  # as the environment has it


class Gradients(Enum):
    """What happens to the gradients between two iterations."""

    none = "none"  # zero_grad(set_to_none=True)
    zero = "zero"  # zero_grad(set_to_none=False); the zeroing is not timed


@dataclass(kw_only=True, slots=True)
class LayerBenchConfig:
    """Settings of the layer benchmark; lists are written with commas."""

    cells: str = "8x2,64x2,64x8"  # experts x top_k
    skewed: str = "8x2"  # cells measured again with skewed routing (swiglu); empty: none
    skew: float = 3.2  # there, the fullest expert's load over the mean
    dtypes: str = "fp32,bf16"  # fp32, bf16
    activations: str = "swiglu,gelu"  # swiglu, gelu, relu
    threads: str = "1,2"  # threads of one process
    tokens: int = 2048  # per iteration
    hidden: int = 512  # model width
    expert_width: int = 1024  # inner width of each expert
    rounds: int = 9  # each times every candidate once
    cell_seconds: float = 150.0  # after 3 rounds a cell ends when it has taken this long
    peers: str = "auto"  # auto: all that are installed; none; or names of peers
    gradients: Gradients = Gradients.none
    allocator: Allocator = Allocator.tuned
    seed: int = 0  # of weights and tokens
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "expert_width", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.skew >= 1:
            raise ValueError(f"skew is {self.skew}; it must be at least 1 (no skew)")
        for name, parse in (
            ("cells", _shape),
            ("skewed", _shape),
            ("dtypes", _dtype),
            ("activations", _activation),
            ("threads", _threads),
        ):
            if not _split(getattr(self, name), name, parse) and name != "skewed":
                raise ValueError(f"{name} is empty; give at least one value")
        for experts, _ in _split(self.skewed, "skewed", _shape):
            if self.skew > experts:
                raise ValueError(f"skew is {self.skew}; with {experts} experts it is at most that")


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return usage_text(
        "bench layer",
        "Time forward and backward of one MoE layer, ours and the peers that are installed, as a\n"
        "ratio to the dense layer of equal active arithmetic.",
        field_table(load_settings(LayerBenchConfig, arguments)),
    )


def run(overrides: Sequence[str]) -> int:
    """Measure, print a table, store `rows` in `result.json` and return the exit code."""
    config = load_settings(LayerBenchConfig, overrides)
    names = _candidates(config.peers)
    folder = RunFolder.choose(config.run.dir, "bench-layer")
    folder.write_environment(["bench", "layer", *overrides])
    return run_session("bench layer", folder, lambda: _measure(config, names, folder))


def _split(text: str, name: str, parse: Callable[[str], _Item]) -> list[_Item]:
    return split_list(text, name, parse, allowed=_ALLOWED[name])


_ALLOWED = {
    "cells": "experts x top_k with 1 <= top_k <= experts, for example 8x2,64x8",
    "skewed": "experts x top_k with 1 <= top_k <= experts, for example 8x2, or nothing",
    "dtypes": " and ".join(_DTYPES),
    "activations": ", ".join(Activation.__members__),
    "threads": f"whole numbers from 1 to this machine's cores ({available_cores()})",
}


def _shape(text: str) -> tuple[int, int]:
    experts, top_k = map(int, text.split("x"))
    if not 1 <= top_k <= experts:
        raise ValueError(text)
    return experts, top_k


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        raise ValueError(text)
    return text


def _activation(text: str) -> Activation:
    return Activation[text]


def _threads(text: str) -> int:
    if not 1 <= int(text) <= available_cores():
        raise ValueError(text)
    return int(text)


def _candidates(peers: str) -> list[str]:
    """Return the candidates beside ours and the dense layer.

    Raises:
        ConfigError: for a peer that does not exist or is not installed.
    """
    from gatewise.launch.bench_peers import PEERS, installed  # imports torch

    present = installed()
    if peers == "auto":
        return present
    wanted = [] if peers in ("none", "") else [name.strip() for name in peers.split(",")]
    for name in wanted:
        if name not in PEERS:
            raise ConfigError(
                f"peers has {name!r}{nearest(name, PEERS)}; it takes auto, none, or of "
                f"{', '.join(PEERS)}"
            )
        if name not in present:
            package = PEERS[name].package
            raise ConfigError(f"peers has {name!r}, but {package} is not installed; pip install it")
    return wanted


def _points(config: LayerBenchConfig) -> list[dict[str, Any]]:
    """Return the cells in the order in which they are measured."""
    points = []
    for dtype in _split(config.dtypes, "dtypes", _dtype):
        for threads in _split(config.threads, "threads", _threads):
            common = {"dtype": dtype, "threads": threads}
            for experts, top_k in _split(config.cells, "cells", _shape):
                shape = {"experts": experts, "top_k": top_k}
                points += [
                    {**shape, "activation": activation.value, **common, "skew": 1.0}
                    for activation in _split(config.activations, "activations", _activation)
                ]
            points += [
                {"experts": experts, "top_k": top_k, "activation": "swiglu", **common}
                | {"skew": config.skew}
                for experts, top_k in _split(config.skewed, "skewed", _shape)
            ]
    return points


def _measure(config: LayerBenchConfig, names: list[str], folder: RunFolder) -> dict[str, Any]:
    """Run the child, show its rows as they come, and return the command's keys."""
    rows_file = folder.path / "rows.jsonl"
    rows_file.write_text("")
    spec = {
        "points": _points(config),
        "candidates": names,
        "gradients": config.gradients.value,
        "allocator": config.allocator.value,
        **{name: getattr(config, name) for name in _NUMBERS},
    }
    environment = dict(os.environ)
    if config.allocator is Allocator.tuned:
        environment |= _TUNED
    command = [sys.executable, "-m", "gatewise.launch.bench_cells", json.dumps(spec)]
    log = folder.logs / "layer.log"
    with log.open("w") as stream:
        child = subprocess.Popen(
            [*command, str(rows_file)], env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            rows = _follow(child, rows_file)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(timeout=10)
    _print_table(rows)
    found: dict[str, Any] = {
        "rows": rows,
        "settings": spec,
        "cpu": cpu_model(),
        "cores": available_cores(),
        "cpu_features": [name for name, present in cpu_features().items() if present],
    }
    if child.returncode:
        found |= {"exit": 1, "error": f"the measuring process ended with {child.returncode}: {log}"}
    return found


def _follow(child: "subprocess.Popen[bytes]", rows_file: Path) -> list[dict[str, Any]]:
    """Read the child's rows until it ends, printing each cell when it is complete."""
    rows: list[dict[str, Any]] = []
    with rows_file.open() as stream:
        while True:
            running = child.poll() is None
            for line in iter(stream.readline, ""):
                rows.append(json.loads(line))
                print(_row_text(rows[-1]), flush=True)
            if not running:
                return rows
            time.sleep(_POLL_S)


def _cell_text(row: dict[str, Any]) -> str:
    skew = "" if row["skew"] == 1 else f" skew {row['max_over_mean']:.1f}"
    shape = f"{row['experts']}x{row['top_k']}"
    return f"{shape} {row['activation']} {row['dtype']} {row['threads']}t{skew}"


def _row_text(row: dict[str, Any]) -> str:
    if row["ratio_to_dense"] is None:
        return f"{_cell_text(row):<32}{row['candidate']:<20}{row['problem']}"
    return (
        f"{_cell_text(row):<32}{row['candidate']:<20}{row['ms_median']:>9.1f} ms "
        f"{row['ratio_to_dense']:>7.2f} of dense (+-{row['ratio_spread']:.2f})"
    )


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per cell and one column per candidate."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != "dense"))
    table = Table(title="forward + backward, ratio to the dense layer; * drops tokens")
    table.add_column("cell")
    table.add_column("dense ms", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(_cell_text(row), {})[row["candidate"]] = row
    for text, found in cells.items():
        fastest = min(
            (row["ratio_to_dense"] for row in found.values() if _competes(row)), default=None
        )
        entries = [_entry(found.get(name), fastest) for name in names]
        dense = found.get("dense")
        table.add_row(text, f"{dense['ms_median']:.1f}" if dense else "", *entries)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=140).print(table)


def _competes(row: dict[str, Any]) -> bool:
    dropless = not row["drops_tokens"] and row["candidate"] != "dense"
    return dropless and row["ratio_to_dense"] is not None


def _entry(row: dict[str, Any] | None, fastest: float | None) -> str:
    if row is None:
        return "-"
    if row["ratio_to_dense"] is None:
        return "failed"
    text = f"{row['ratio_to_dense']:.2f}" + ("*" if row["drops_tokens"] else "")
    if row["problem"]:
        text += "!"
    return f"[bold]{text}[/bold]" if row["ratio_to_dense"] == fastest and _competes(row) else text
