"""`gatewise bench pregate`: the exchange of counts in every layer against the plan made ahead.

The same pre-gated run three times over, on the same ranks and in turn, step by step: counts
exchanged in every layer, once per micro-batch, once per optimizer step. Losses must agree in every
bit; collectives and host reads are counted; times are of interleaved steps.
"""

import os
import statistics
import time
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
from gatewise.routers.ahead.config import Exchange
from gatewise.training.config import TrainConfig

__all__ = ["Row", "bench_rank", "run", "usage"]

_SUMMARY = """usage: gatewise bench pregate [field=value ...]

Train with a pre-gate and exchange counts in every layer, once per micro-batch, and once per step,
in turn; print times, collectives and host reads of each (default: experiment=quickstart
router=gru_pregate parallel.ranks=4 parallel.expert=4, two micro-batches).
Fields of its own:
  pregate.steps=20    steps of each way that are timed, after 3 that are not

"""
_WARM_UP = 3
_DEFAULTS = {
    "experiment": "quickstart",
    "router": "gru_pregate",
    "parallel.ranks": "4",
    "parallel.expert": "4",
    "batch.micro": "1",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One way to exchange counts; counts are of rank 0 and of one step."""

    exchange: str
    step_ms: float  # median of the slowest rank's times
    step_ms_low: float  # quartiles
    step_ms_high: float
    relative: float  # median over steps of its time / the time of `layer` in the same turn
    metadata_exchanges: int
    metadata_exchanges_in_layers: int
    row_exchanges: int
    other_collectives: int
    host_reads_in_layers: int
    equal_losses: bool  # to those of `layer`, in every bit, on every step


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return _SUMMARY + train_usage(_with_defaults(_split(arguments)[1]))


def run(arguments: Sequence[str]) -> int:
    """Measure and print; return the exit code."""
    steps, rest = _split(arguments)
    config = load_train_config(_with_defaults(rest))
    if not config.router.ahead.is_on:
        raise ConfigError(
            "router.ahead.kind is off; `bench pregate` needs a pre-gate: use router=gru_pregate"
        )
    folder = RunFolder.choose(config.run.dir, "bench_pregate")
    return run_session(
        "bench pregate",
        folder,
        lambda: _measure(config, steps, folder),
        world_size=config.parallel.ranks,
    )


def _split(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Separate `pregate.steps` from the fields of training."""
    steps, rest = 20, []
    for text in arguments:
        name, _, value = text.partition("=")
        if not name.startswith("pregate."):
            rest.append(text)
        elif name != "pregate.steps" or not value.isdigit() or int(value) < 1:
            raise ConfigError(
                f"{name} is {value!r}; `bench pregate` takes pregate.steps, a whole number of at "
                "least 1"
            )
        else:
            steps = int(value)
    return steps, rest


def _with_defaults(arguments: Sequence[str]) -> list[str]:
    given = {text.lstrip("+").partition("=")[0] for text in arguments}
    added = {name: value for name, value in _DEFAULTS.items() if name not in given}
    return [*(f"{name}={value}" for name, value in added.items()), *arguments]


def _measure(config: TrainConfig, steps: int, folder: RunFolder) -> dict[str, Any]:
    from gatewise.training.data import prepare_data

    data = prepare_data(config.data)
    ranks = config.parallel.ranks
    outcomes = run_ranks(
        bench_rank,
        ranks,
        (config, data.folder, folder.path, steps),
        threads=threads_per_rank(config.parallel.threads, ranks, os.environ),
        logs=folder.logs,
    )
    results = [dict(outcome.result or {}) for outcome in outcomes]
    rows = _rows(results)
    _print_table(rows)
    return {
        "rows": [asdict(row) for row in rows],
        "steps": steps,
        "micro_batches": results[0]["micro_batches"],
        "moe_layers": results[0]["moe_layers"],
        "ranks": ranks,
        "losses": results[0]["losses"],
    }


def bench_rank(
    place: Place, config: TrainConfig, data_folder: Path, folder: Path, steps: int
) -> dict[str, Any]:
    """Be one rank: run the ways in turn.

    Returns:
        Per way the seconds and the loss of each step, and the counts of one step.
    """
    from gatewise.training.data import open_prepared
    from gatewise.training.observe import observe
    from gatewise.training.trainer import Trainer

    with join_ranks(place, config.parallel) as runtime:
        trainers = {}
        for way in Exchange:
            ahead = replace(config.router.ahead, exchange=way)
            point = replace(config, router=replace(config.router, ahead=ahead))
            trainers[way.name] = Trainer(
                point, runtime, open_prepared(data_folder), folder / way.name, []
            )
        try:
            seconds: dict[str, list[float]] = {name: [] for name in trainers}
            losses: dict[str, list[float]] = {name: [] for name in trainers}
            counts = {}
            for step in range(_WARM_UP + steps):
                names = list(trainers)
                turn = step % len(names)
                for name in names[turn:] + names[:turn]:  # no way is always the first
                    trainers[name].model.train()
                    began = time.perf_counter()
                    loss = float(trainers[name].run_step().loss)
                    if step >= _WARM_UP:
                        seconds[name].append(time.perf_counter() - began)
                    losses[name].append(loss)
            for name, trainer in trainers.items():
                with observe() as seen:
                    losses[name].append(float(trainer.run_step().loss))
                counts[name] = {
                    "metadata_exchanges": seen.metadata,
                    "metadata_exchanges_in_layers": seen.metadata_in_layers,
                    "row_exchanges": seen.rows,
                    "other_collectives": sum(seen.others.values()),
                    "host_reads_in_layers": seen.reads_in_layers,
                }
            layers = len(trainers["layer"].model.moe_layers())
        finally:
            for trainer in trainers.values():
                trainer.close()
    share = config.batch.sequences // place.world_size
    return {
        "seconds": seconds,
        "losses": losses,
        "counts": counts,
        "moe_layers": layers,
        "micro_batches": share // (config.batch.micro or share),
    }


def _rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Put the ranks' numbers together: a step lasts as long as its slowest rank."""
    first = results[0]
    slowest = {
        name: [max(times) for times in zip(*(r["seconds"][name] for r in results), strict=True)]
        for name in first["seconds"]
    }
    rows = []
    for name, times in slowest.items():
        low, middle, high = (1e3 * cut for cut in _quartiles(times))
        ratios = [a / b for a, b in zip(times, slowest["layer"], strict=True)]
        rows.append(
            Row(
                name,
                middle,
                low,
                high,
                statistics.median(ratios),
                **first["counts"][name],
                equal_losses=all(r["losses"][name] == r["losses"]["layer"] for r in results),
            )
        )
    return rows


def _quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def _print_table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="one optimizer step; in brackets: inside layers")
    for name in ("exchange", "ms", "quartiles", "ratio", "counts", "rows", "reads", "losses"):
        table.add_column(name, justify="left" if name == "exchange" else "right")
    for row in rows:
        table.add_row(
            row.exchange,
            f"{row.step_ms:.0f}",
            f"{row.step_ms_low:.0f}-{row.step_ms_high:.0f}",
            f"{row.relative:.3f}",
            f"{row.metadata_exchanges} ({row.metadata_exchanges_in_layers})",
            str(row.row_exchanges),
            f"({row.host_reads_in_layers})",
            "equal" if row.equal_losses else "DIFFER",
        )
    Console().print(table)
