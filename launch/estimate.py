"""`gatewise estimate`: memory of the fullest rank of a training run, before it starts.

Takes the fields of `train`. The model is not allocated: `training/memory.py` computes its parts.
The process's own base (interpreter, torch, what a first step loads) is measured: a process like a
rank trains a model of a few kilobytes for one step.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewise.conf.compose import load_beside
from gatewise.conf.fields import field_table
from gatewise.launch.machine import memory_mb
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.spawn import peak_rss_mb, run_here, run_ranks, warm_up
from gatewise.launch.train import PRELOAD
from gatewise.launch.usage import usage_text
from gatewise.launch.world import Place, join_ranks, threads_per_rank
from gatewise.moe.config import ModelConfig
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    OptimConfig,
    TrainConfig,
)

__all__ = ["EstimateConfig", "run", "usage"]

_SUMMARY = """Compute the memory of the fullest rank before a run starts: no ranks, no model.
Takes the fields of `train` too."""


@dataclass(kw_only=True, slots=True)
class EstimateConfig:
    """What the settings of a run do not say."""

    imbalance: float = 1.2  # rows of the rank that gets most over the mean, with spread experts
    base_mb: float | None = None  # of the process without the run; None: measured now

    def __post_init__(self) -> None:
        if not self.imbalance >= 1:
            raise ConfigError(f"imbalance is {self.imbalance}; it must be at least 1")
        if self.base_mb is not None and not self.base_mb >= 0:
            raise ConfigError(f"base_mb is {self.base_mb}; it must be at least 0 or null")


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    own, config = load_beside(EstimateConfig, arguments)
    return usage_text("estimate", _SUMMARY, field_table(own) | field_table(config))


def run(arguments: Sequence[str]) -> int:
    """Compute, print and store the estimate; return the exit code."""
    own, config = load_beside(EstimateConfig, arguments)
    folder = RunFolder.choose(config.run.dir, f"{config.name}_estimate")
    return run_session("estimate", folder, lambda: _estimate(own, config, folder))


def _estimate(own: EstimateConfig, config: TrainConfig, folder: RunFolder) -> Mapping[str, Any]:
    ranks = config.parallel.ranks
    base = _measure_base(config, folder.logs) if own.base_mb is None else own.base_mb

    import torch

    from gatewise.training.memory import estimate_memory, vocabulary
    from gatewise.training.trainer import resolve_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = estimate_memory(
        config,
        vocabulary(config),
        number_bytes=resolve_dtype(config.precision, device).itemsize,
        imbalance=own.imbalance,
    )
    parts = dataclasses.asdict(memory)
    del parts["saves_early"]
    total = base + memory.total
    rows = {
        "interpreter and torch": base,
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "gradients received": memory.exchange,
        "activations": memory.activations,
        "  rows received": memory.receive,
        "backward pass": memory.backward,
        "logits": memory.logits,
        "evaluation": memory.evaluation,
        "checkpoint copy": memory.snapshot,
        "text": memory.text,
    }
    print(f"{config.name}: {ranks} ranks, the fullest one in MB")
    for name, value in rows.items():
        print(f"  {name:<22} {value:>10,.1f}")
    print(f"  {'peak':<22} {total:>10,.1f}")
    print("  (a step and an evaluation are not at once; the copy stays from the first save on)")
    available = memory_mb()["available"]
    if available is not None:
        fits = "fit" if total * ranks <= available else "do not fit"
        print(f"  {ranks} x {total:,.0f} MB {fits} into the {available:,.0f} MB free here")
    return {
        "rank_peak_mb": round(total, 1),
        "base_mb": round(base, 1),
        "parts_mb": {
            name: round(value, 2) for name, value in parts.items() if name != "saves_early"
        },
        "imbalance": own.imbalance,
        "ranks": ranks,
        "available_mb": available,
    }


def _measure_base(config: TrainConfig, logs: Path) -> float:
    """Return the peak of a process like a rank of the run that trains next to nothing."""
    threads = threads_per_rank(config.parallel.threads, config.parallel.ranks, os.environ)
    with tempfile.TemporaryDirectory(prefix="gatewise_") as name:
        folder = Path(name)
        text = folder / "text"
        text.mkdir()
        for number in range(2):
            (text / f"{number}.txt").write_text("a few words to train on, again. " * 20)
        least = TrainConfig(
            steps=2,
            precision=config.precision,
            router=config.router,
            data=DataConfig(
                path=str(text), cache=str(folder / "cache"), sequence_length=16, validation_every=2
            ),
            model=ModelConfig(
                layers=1,
                hidden=16,
                heads=2,
                num_experts=config.model.num_experts and 4,
                top_k=min(2, config.model.top_k),
                expert_width=16,
                activation=config.model.activation,
            ),
            parallel=ParallelConfig(threads=threads),
            batch=BatchConfig(sequences=2),
            optim=OptimConfig(warmup=0),
            evaluation=EvaluationConfig(tokens=32, micro=1),
        )
        if config.parallel.ranks == 1:  # such a run trains in the process of the command
            os.environ["OMP_NUM_THREADS"] = str(threads)
            place = Place(rank=0, world_size=1, threads=threads)
            run_here(_probe, place, (least, folder), log=logs / "rank_0.log")
            return peak_rss_mb()
        warm_up(threads, preload=PRELOAD)
        (outcome,) = run_ranks(_probe, 1, (least, folder), threads=threads, logs=logs)
        return outcome.peak_rss_mb


def _probe(place: Place, config: TrainConfig, folder: Path) -> Mapping[str, Any]:
    from gatewise.training.data import prepare_data
    from gatewise.training.trainer import train

    with join_ranks(place, config.parallel) as runtime:
        return train(config, runtime, prepare_data(config.data), folder, [])
