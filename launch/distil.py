"""`gatewise distil`: train a pre-gate from a checkpoint whose layers route for themselves."""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.conf.compose import config_to_yaml, load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.session import run_session
from gatewise.launch.spawn import run_here, run_ranks, warm_up
from gatewise.launch.tracking import make_sinks
from gatewise.launch.usage import usage_text
from gatewise.launch.world import Place, join_ranks, threads_per_rank
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig
from gatewise.training.distil_config import DistilConfig, student_config
from gatewise.training.sinks import close_all

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch

__all__ = ["distil_rank", "run", "usage"]

_SUMMARY = """Train a pre-gate (router.ahead.kind=gru or read_me) to choose as the routers of a
checkpoint choose. The model stays as it is; the result is a checkpoint whose pre-gate decides."""
_PRELOAD = ("gatewise.training.distil", "torch.distributed.checkpoint")


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return usage_text(
        "distil teacher=PATH",
        _SUMMARY,
        field_table(load_settings(DistilConfig, arguments)),
    )


def run(arguments: Sequence[str]) -> int:
    """Distil as the command line says and return the exit code."""
    settings = load_settings(DistilConfig, arguments)
    if settings.teacher is None:
        raise ConfigError("teacher is not set; give teacher=PATH, a run's folder or a step")
    from gatewise.launch.restore import open_checkpoint

    stored = open_checkpoint(settings.teacher)
    config = student_config(stored.config, settings)
    folder = RunFolder.choose(config.run.dir, "distil")
    return run_session(
        "distil",
        folder,
        lambda: _start(config, stored, folder),
        world_size=config.parallel.ranks,
    )


def distil_rank(
    place: Place, config: TrainConfig, teacher: Path, data_folder: Path, folder: Path
) -> dict[str, Any]:
    """Be one rank of a distillation.

    Args:
        place: of this rank.
        config: of the model with its pre-gate.
        teacher: checkpoint of the model that teaches.
        data_folder: of the prepared data.
        folder: of the run.
    """
    from gatewise.training.data import open_prepared
    from gatewise.training.distil import distil

    with join_ranks(place, config.parallel) as runtime:
        sinks = make_sinks(config, folder) if runtime.rank == 0 else []
        try:
            return distil(
                config,
                teacher,
                runtime=runtime,
                data=open_prepared(data_folder),
                folder=folder,
                sinks=sinks,
            )
        finally:
            close_all(sinks)


def _start(config: TrainConfig, stored: "Stored", folder: RunFolder) -> Mapping[str, Any]:
    from gatewise.launch.restore import restore_tokenizer
    from gatewise.training.data import prepare_data

    tokenizer = restore_tokenizer(stored)
    with writable(folder.path):
        tokenizer.save(folder.path / "tokenizer.json")
    data = prepare_data(config.data)
    if data.tokenizer.fingerprint != tokenizer.fingerprint:
        # another text would train another BPE: tokenise it with the teacher's
        path = str(folder.path / "tokenizer.json")
        data = prepare_data(dataclasses.replace(config.data, tokenizer_path=path))
    folder.write_config(config_to_yaml(config))
    folder.write_environment([Path(sys.argv[0]).name, *sys.argv[1:]])
    ranks = config.parallel.ranks
    threads = threads_per_rank(config.parallel.threads, ranks, os.environ)
    print(f"gatewise distil: {stored.path} -> {folder.path}", flush=True)
    task = (config, stored.path, data.folder, folder.path)
    if ranks == 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        place = Place(rank=0, world_size=1, threads=threads)
        outcome = run_here(distil_rank, place, task, log=folder.logs / "rank_0.log")
    else:
        warm_up(threads, preload=_PRELOAD)
        outcome = run_ranks(distil_rank, ranks, task, threads=threads, logs=folder.logs)[0]
    result = dict(outcome.result or {})
    _print_table(result)
    return {**result, "peak_rss_mb": outcome.peak_rss_mb}


def _print_table(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"agreement on validation text (chance {result['chance_recall']:.3f})")
    for name in ("layer", "recall", "mass recall"):
        table.add_column(name, justify="right")
    pairs = zip(result["recall_per_layer"], result["mass_recall_per_layer"], strict=True)
    for layer, (recall, mass) in enumerate(pairs):
        table.add_row(str(layer), f"{recall:.3f}", f"{mass:.3f}")
    Console().print(table)
    print(
        f"validation loss: {result['val_loss_in_loop']:.4f} in loop, {result['val_loss']:.4f} with "
        f"the pre-gate deciding ({result['val_loss_ratio'] - 1:+.2%})"
    )
