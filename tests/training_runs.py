"""Small training runs for tests: settings, text, and runs on one or several ranks.

`run` trains in this process for one rank and on gloo ranks for more, and returns the records and
the last checkpoint, by which runs are compared.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.moe.config import ModelConfig
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import make_groups
from gatewise.parallel.runtime import Runtime
from gatewise.routers.config import RouterConfig
from gatewise.training.checkpoint_load import load_whole
from gatewise.training.checkpointer import find_latest
from gatewise.training.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    OptimConfig,
    Precision,
    TrainConfig,
)
from gatewise.training.data import PreparedData, open_prepared, prepare_data
from gatewise.training.trainer import Trainer, train
from ranks import run_ranks

__all__ = ["Records", "Run", "losses", "make_text", "make_trainer", "run", "runtime", "tiny"]

WORDS = ["expert", "router", "token", "gate", "batch", "rank", "layer", "load", "bias", "loss"]
LENGTH = 32


def make_text(folder: Path, *, files: int = 12, sentences: int = 60) -> PreparedData:
    """Write text files and prepare them as bytes; every tenth file is validation."""
    generator = random.Random(0)
    text = folder / "text"
    text.mkdir()
    for number in range(files):
        lines = [
            " ".join(generator.choices(WORDS, k=generator.randrange(4, 12))) + ".\n"
            for _ in range(sentences)
        ]
        (text / f"{number:02d}.txt").write_text("".join(lines), encoding="ascii")
    return prepare_data(
        DataConfig(path=str(text), cache=str(folder / "cache"), sequence_length=LENGTH)
    )


def tiny(
    steps: int = 6,
    *,
    ranks: int = 1,
    expert: int = 1,
    shard: int = 1,
    parallel: Mapping[str, Any] | None = None,
    micro: int | None = None,
    model: Mapping[str, Any] | None = None,
    router: RouterConfig | None = None,
    **settings: Any,
) -> TrainConfig:
    """Return settings of a run of two MoE layers with four experts on 8 sequences of 32 bytes.

    `parallel` holds further degrees.
    """
    return TrainConfig(
        **{
            "steps": steps,
            "log_every": 1,
            "precision": Precision.fp32,
            "data": DataConfig(sequence_length=LENGTH),
            "model": ModelConfig(
                **{
                    "layers": 2,
                    "hidden": 16,
                    "heads": 2,
                    "num_experts": 4,
                    "top_k": 2,
                    "expert_width": 16,
                    "init_std": 0.2,  # larger than usual, so that every part matters at once
                    **(model or {}),
                }
            ),
            "router": router or RouterConfig(),
            "parallel": ParallelConfig(
                **{
                    "ranks": ranks,
                    "expert": expert,
                    "shard": shard,
                    "threads": 1,
                    "timeout": 120,
                    **(parallel or {}),
                }
            ),
            "batch": BatchConfig(sequences=8, micro=micro),
            "optim": OptimConfig(warmup=2),
            "evaluation": EvaluationConfig(tokens=400, micro=4),
            **settings,
        }
    )


class Records:
    """A sink that keeps records."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def resume(self, step: int) -> None:
        """Forget what was recorded after `step`."""
        self.all = [record for record in self.all if record["step"] <= step]

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep a record."""
        self.all.append(dict(record))

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True)
class Run:
    """What a run left."""

    records: list[dict[str, Any]]
    output: dict[str, Any]
    folder: Path

    def column(self, name: str) -> list[float]:
        """Return the values of one metric, in order."""
        return [record[name] for record in self.records if name in record]

    def training(self) -> list[dict[str, Any]]:
        """Return the training records without what depends on the machine."""
        machine = {
            "train/tokens_per_second",
            "train/memory_mb",
            "schedule/exposed_communication_ms",
            "ranks/own_ms_median",
            "ranks/own_ms_max",
            "ranks/slowest",
        }
        return [
            {name: value for name, value in record.items() if name not in machine}
            for record in self.records
            if "train/loss" in record
        ]

    def tensors(self, step: int | None = None) -> dict[str, Tensor]:
        """Return all tensors of the last checkpoint, or of a step's, whole."""
        checkpoints = self.folder / "checkpoints"
        path = find_latest(checkpoints) if step is None else checkpoints / f"step_{step:08d}"
        assert path is not None
        return load_whole(path)


def runtime(config: TrainConfig, rank: int = 0) -> Runtime:
    """Describe a rank whose process group the test has started."""
    return Runtime(rank, config.parallel.ranks, torch.device("cpu"), make_groups(config.parallel))


def make_trainer(
    config: TrainConfig, data: PreparedData, folder: Path, rank: int = 0
) -> tuple[Trainer, Records]:
    """Build a trainer on this rank, in training mode."""
    records = Records()
    trainer = Trainer(config, runtime(config, rank), data, folder, [] if rank else [records])
    trainer.model.train()
    return trainer, records


def run(
    config: TrainConfig,
    data: PreparedData,
    folder: Path,
    prepare: Callable[[int], None] | None = None,
) -> Run:
    """Train on as many ranks as the settings say.

    Args:
        config: settings.
        data: text.
        folder: of the run.
        prepare: called with the rank before training, to plant a fault; a module-level function.
    """
    folder.mkdir(exist_ok=True)
    if config.parallel.ranks == 1:
        _train(0, 1, config, str(data.folder), str(folder), prepare)
    else:
        args = (config, str(data.folder), str(folder), prepare)
        run_ranks(_train, config.parallel.ranks, args)
    left = json.loads((folder / "left.json").read_text())
    return Run(left["records"], left["output"], folder)


def _train(
    rank: int,
    world: int,
    config: TrainConfig,
    data: str,
    folder: str,
    prepare: Callable[[int], None] | None,
) -> None:
    if prepare is not None:
        prepare(rank)
    records = Records()
    output = train(
        dataclasses.replace(config),
        runtime(config, rank),
        open_prepared(data),
        Path(folder),
        [] if rank else [records],
    )
    if rank == 0:
        (Path(folder) / "left.json").write_text(
            json.dumps({"records": records.all, "output": output})
        )


def losses(result: Run) -> list[float]:
    """Return the training losses of each step."""
    return result.column("train/loss")
