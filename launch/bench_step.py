"""`gatewise bench step`: where a training step spends its time, from a profile of every rank.

The step is the trainer's own, on the composed settings. It is profiled with the settings' experts
and with `times` as many: a loop over experts anywhere in the step would run that many more
operations, so the counts of operations and of collectives are part of the result.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gatewise.conf.compose import load_train_config
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.spawn import run_ranks
from gatewise.launch.train import usage as train_usage
from gatewise.launch.world import Place, join_ranks, threads_per_rank
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig

__all__ = ["Part", "profile_rank", "run", "usage"]

_SUMMARY = """usage: gatewise bench step [field=value ...]

Profile training steps of the settings that `gatewise train` would use with the same arguments
(default: experiment=quickstart) and print, per part of the step, its time and its share.
Fields of its own:
  profile.steps=5    steps that are profiled, after 3 that are not
  profile.times=4    the second profile has so many times the experts

"""
_WARM_UP = 3
_COLLECTIVES = ("c10d::", "gloo:", "nccl:")
# what a part of the step is called, by the names that a profile has
_PARTS = (
    "moe.order",
    "moe.dispatch",
    "moe.experts",
    "moe.collect",
    "moe.combine",
    "moe.combine_grad",
    "moe.collect_grad",
    "moe.experts_data",
    "moe.dispatch_grad",
    "moe.experts_weights",
    "moe.order_grad",
    "moe.prepare",
    "moe.exchange_counts",
    "comm.wait",
    "step.reduce",
    "step.update",
)


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the table: a named part of the step on one rank, inner parts left out."""

    rank: int
    experts: int
    part: str
    calls_per_step: float
    ms_per_step: float
    share: float


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return _SUMMARY + train_usage(_with_experiment(_split(arguments)[1]))


def run(arguments: Sequence[str]) -> int:
    """Profile and print; return the exit code."""
    own, rest = _split(arguments)
    config = load_train_config(_with_experiment(rest))
    if not config.model.num_experts:
        raise ConfigError("model.num_experts is 0; `bench step` profiles MoE layers: set it")
    folder = RunFolder.choose(config.run.dir, "bench_step")
    return run_session(
        "bench step",
        folder,
        lambda: _measure(config, own, folder),
        world_size=config.parallel.ranks,
    )


def _split(arguments: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Separate `profile.*` from the fields of training."""
    own, rest = {"steps": 5, "times": 4}, []
    for text in arguments:
        name, _, value = text.partition("=")
        if not name.startswith("profile."):
            rest.append(text)
            continue
        key = name.removeprefix("profile.")
        if key not in own or not value.isdigit() or int(value) < 1:
            raise ConfigError(
                f"{name} is {value!r}; `bench step` takes profile.steps and profile.times, "
                "whole numbers of at least 1"
            )
        own[key] = int(value)
    return own, rest


def _with_experiment(arguments: Sequence[str]) -> list[str]:
    chosen = any(text.startswith("experiment=") for text in arguments)
    return list(arguments) if chosen else ["experiment=quickstart", *arguments]


def _measure(config: TrainConfig, own: dict[str, int], folder: RunFolder) -> dict[str, Any]:
    from gatewise.training.data import prepare_data

    data = prepare_data(config.data)
    ranks = config.parallel.ranks
    threads = threads_per_rank(config.parallel.threads, ranks, {})
    rows: list[dict[str, Any]] = []
    operations: dict[str, list[dict[str, float]]] = {}
    for experts in (config.model.num_experts, config.model.num_experts * own["times"]):
        point = replace(config, model=replace(config.model, num_experts=experts))
        outcomes = run_ranks(
            profile_rank,
            ranks,
            (point, data.folder, folder.path, own["steps"]),
            threads=threads,
            logs=folder.logs,
        )
        results = [dict(outcome.result or {}) for outcome in outcomes]
        rows += [row for result in results for row in result["rows"]]
        operations[str(experts)] = [result["operations"] for result in results]
        _print_table(results[0], experts)
    return {"rows": rows, "operations_per_step": operations, "steps": own["steps"]}


def profile_rank(
    place: Place, config: TrainConfig, data_folder: Path, folder: Path, steps: int
) -> dict[str, Any]:
    """Be one rank: train a few steps, then profile `steps` of them.

    Returns:
        `rows` (parts of the step), `operations` (counts per step), and the time of a step.
    """
    from torch.profiler import ProfilerActivity, profile

    from gatewise.training.data import open_prepared
    from gatewise.training.trainer import Trainer

    with join_ranks(place, config.parallel) as runtime:
        trainer = Trainer(
            config,
            runtime,
            open_prepared(data_folder),
            folder / f"experts_{config.model.num_experts}",
            [],
        )
        try:
            trainer.model.train()
            for _ in range(_WARM_UP):
                trainer.run_step()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                began = time.perf_counter()
                for _ in range(steps):
                    trainer.run_step()
                seconds = time.perf_counter() - began
        finally:
            trainer.close()
    trace = folder / "trace" / f"experts_{config.model.num_experts}_rank_{place.rank}.json"
    trace.parent.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return _summarise(profiler.events(), seconds, steps, config, place.rank)


def _summarise(
    events: Any,  # of torch.profiler, which has no type for its list
    seconds: float,
    steps: int,
    config: TrainConfig,
    rank: int,
) -> dict[str, Any]:
    spent: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for event in events:
        if event.name in _PARTS:
            calls[event.name] += 1
            inner = sum(c.cpu_time_total for c in _inner_parts(event))
            spent[event.name] += event.cpu_time_total - inner
        elif event.name.startswith("aten::"):
            operations["tensor operations"] += 1
            if event.name in ("aten::_local_scalar_dense", "aten::nonzero"):
                operations["host reads"] += 1
        elif event.name.startswith(_COLLECTIVES):
            operations[event.name] += 1
    total = seconds / steps * 1e3
    rows = [
        Part(
            rank,
            config.model.num_experts,
            name,
            calls[name] / steps,
            spent[name] / steps / 1e3,
            spent[name] / steps / 1e3 / total,
        )
        for name in _PARTS
        if calls[name]
    ]
    return {
        "rows": [asdict(row) for row in rows],
        "operations": {name: count / steps for name, count in sorted(operations.items())},
        "step_ms": total,
    }


def _inner_parts(event: Any) -> list[Any]:  # events of torch.profiler
    """Return the nearest parts below an event."""
    found = []
    for child in event.cpu_children:
        found += [child] if child.name in _PARTS else _inner_parts(child)
    return found


def _print_table(result: dict[str, Any], experts: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"rank 0, {experts} experts: {result['step_ms']:.1f} ms a step")
    for name in ("part", "calls a step", "ms a step", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in result["rows"]:
        table.add_row(
            row["part"],
            f"{row['calls_per_step']:.0f}",
            f"{row['ms_per_step']:.2f}",
            f"{row['share']:.1%}",
        )
    console = Console()
    console.print(table)
    console.print(json.dumps(result["operations"]))
