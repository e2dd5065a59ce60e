"""`gatewise train`: compose, check, prepare the data, start the ranks, store what came out.

Under torchrun or Slurm every process runs this file and is a rank itself; otherwise the process
starts `parallel.ranks` of them (`spawn.py`). `train_rank` is the same in both cases.
"""

import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.conf.compose import config_to_yaml, group_choices, load_train_config
from gatewise.conf.fields import field_table
from gatewise.conf.schemas import GROUPS
from gatewise.launch.engines import check_engine
from gatewise.launch.machine import memory_mb as machine_memory_mb
from gatewise.launch.outcome import answer_script
from gatewise.launch.rank_log import own_log, tell_user
from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.session import (
    EXIT_CONFIG,
    EXIT_CRASH,
    EXIT_OK,
    EXIT_REQUEUE,
    one_line,
    print_error,
    run_session,
)
from gatewise.launch.spawn import RankFailure, run_here, run_ranks, warm_up
from gatewise.launch.tracking import check_tracking, make_sinks
from gatewise.launch.usage import shown_value, usage_text
from gatewise.launch.world import Place, detect_world, join_ranks, threads_per_rank
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig
from gatewise.training.sinks import close_all

if TYPE_CHECKING:
    from gatewise.parallel.runtime import Runtime  # imports torch

__all__ = ["run", "train_rank", "usage"]

# What training imports late: loaded once here, not again by every rank (seconds each).
PRELOAD = ("gatewise.training.trainer", "torch.distributed.checkpoint", "torch._dynamo")
_TOO_MUCH = 1.2  # of the machine's memory: an estimate is no reason to warn for less
_log = logging.getLogger(__name__)
_SUMMARY = """Train a model. Where run.dir holds checkpoints, the run goes on from the newest one.
Without torchrun or Slurm around it, the command starts parallel.ranks processes itself."""


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command, with the defaults that `arguments` lead to."""
    groups = {name: group_choices(name) for name in GROUPS}
    return usage_text("train", _SUMMARY, field_table(load_train_config(arguments)), groups=groups)


def run(arguments: Sequence[str]) -> int:
    """Train as the command line says and return the exit code."""
    place = detect_world(os.environ)
    if place is None:
        return _run(arguments, None)
    return answer_script(lambda: _run(arguments, place), place)


def _run(arguments: Sequence[str], place: Place | None) -> int:
    config = load_train_config(_with_world_size(_with_loaded_model(arguments), place))
    check_tracking(config)
    check_engine(config)
    if config.checkpoint.load is not None:
        from gatewise.launch.restore import locate_checkpoint

        config.checkpoint.load = str(locate_checkpoint(config.checkpoint.load))
    if place is not None and place.world_size != config.parallel.ranks:
        raise ConfigError(
            f"parallel.ranks is {config.parallel.ranks} but {place.world_size} ranks were "
            "started; start as many, or leave parallel.ranks out"
        )
    if config.schedule.profile is not None:
        from gatewise.training.schedule import known_profile, plan_schedule

        profile = known_profile(config)
        if profile is not None:  # every rank will plan so; what is wrong is told now
            plan_schedule(config, profile)
    if place is not None and place.world_size > 1:
        return _run_member(config, place)
    folder = RunFolder.choose(config.run.dir, config.name, is_launched=place is not None)
    return run_session(
        "train",
        folder,
        lambda: _start(config, folder),
        world_size=config.parallel.ranks,
        interrupt_exit=EXIT_REQUEUE,
    )


def train_rank(
    place: Place, config: TrainConfig, data_folder: Path, folder: Path
) -> dict[str, Any]:
    """Be one rank of a training run, from joining the others to leaving them.

    Args:
        place: of this rank.
        config: the whole settings.
        data_folder: of the prepared data.
        folder: of the run.

    Returns:
        What rank 0 has to report; on other ranks it is ignored.
    """
    with join_ranks(place, config.parallel) as runtime:
        return _train(runtime, config, data_folder, folder)


def _train(
    runtime: "Runtime", config: TrainConfig, data_folder: Path, folder: Path
) -> dict[str, Any]:
    from gatewise.training.data import open_prepared
    from gatewise.training.trainer import train

    data = open_prepared(data_folder)
    if runtime.rank == 0 and runtime.device.type == "cpu":
        _tell_memory(runtime, config, data.tokenizer.vocab_size)
    sinks = make_sinks(config, folder) if runtime.rank == 0 else []
    try:
        result = dict(train(config, runtime, data, folder, sinks))
    finally:
        close_all(sinks)
    if result.get("stopped"):
        result["exit"] = EXIT_REQUEUE
        if runtime.rank == 0:
            print(f"stopped after step {result.get('steps')} and saved; start again to go on")
    return result


def _with_loaded_model(arguments: Sequence[str]) -> list[str]:
    """Let model, router and tokenizer follow checkpoint.load, unless an experiment has its own.

    What the user sets wins.
    """
    given = dict(text.lstrip("+").partition("=")[::2] for text in arguments)
    name = given.get("checkpoint.load", "null")
    if name in ("null", "") or "experiment" in given:
        return list(arguments)
    from gatewise.launch.restore import open_checkpoint

    stored = open_checkpoint(name)
    sections = ["model"] if "router" in given else ["model", "router"]
    told = [
        f"{field.name}={shown_value(field.default)}"
        for field in field_table(stored.config).values()
        if field.name.partition(".")[0] in sections
    ]
    tokenizer = stored.path.parent.parent / "tokenizer.json"
    if tokenizer.exists() and not {"data.tokenizer", "data.tokenizer_path"} & given.keys():
        told.append(f"data.tokenizer_path={tokenizer}")
    return [*told, *arguments]


def _tell_memory(runtime: "Runtime", config: TrainConfig, vocab_size: int) -> None:
    """Log what a rank will need, and warn where the machine's ranks cannot all have it."""
    from gatewise.parallel.runtime import memory_mb
    from gatewise.training.memory import estimate_memory
    from gatewise.training.trainer import resolve_dtype

    size = resolve_dtype(config.precision, runtime.device).itemsize
    estimate = estimate_memory(config, vocab_size, number_bytes=size)
    rank_mb = memory_mb(runtime.device) + estimate.total
    _log.info("estimated memory of the fullest rank: %.0f MB", rank_mb)
    machine_mb = machine_memory_mb()["total"]
    here = config.parallel.node or config.parallel.ranks
    if machine_mb is not None and here * rank_mb > _TOO_MUCH * machine_mb:
        _log.warning(
            "%d ranks of about %.0f MB each are more than the %d MB of this machine: see `gatewise "
            "estimate`, raise parallel.expert or parallel.shard, lower batch.micro, or set "
            "recompute=true",
            here,
            rank_mb,
            machine_mb,
        )


def _with_world_size(arguments: Sequence[str], place: Place | None) -> list[str]:
    """Let parallel.ranks and parallel.node follow a launcher's world, unless the user set them."""
    names = [text.lstrip("+").partition("=")[0] for text in arguments]
    told = list(arguments)
    if place is not None and "parallel.ranks" not in names:
        told.append(f"parallel.ranks={place.world_size}")
    even = place is not None and place.node is not None and place.world_size % place.node == 0
    if place is not None and even and "parallel.node" not in names:
        told.append(f"parallel.node={place.node}")
    return told


def _run_member(config: TrainConfig, place: Place) -> int:
    """Be one rank of a world that torchrun or Slurm started; rank 0 keeps the folder.

    The launcher owns the processes, so nothing is started or watched here. The folder is chosen
    once, by rank 0, and told to the others.
    """
    threads = threads_per_rank(config.parallel.threads, place.local_world_size, os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    place = dataclasses.replace(place, threads=threads)
    with join_ranks(place, config.parallel) as runtime:
        import torch.distributed as dist

        folder: RunFolder | None = None
        answer: list[dict[str, str]] = [{}]
        if place.rank == 0:
            try:
                folder = RunFolder.choose(config.run.dir, config.name, is_launched=True)
                answer[0] = {
                    "folder": str(folder.path),
                    "logs": str(folder.logs),
                    "data": str(_prepare(config, folder)),
                }
            except ConfigError as error:
                answer[0] = {"error": one_line(error)}
        dist.broadcast_object_list(answer, src=0)
        if "error" in answer[0]:
            return _refuse(answer[0]["error"], folder, place)
        return _follow(runtime, config, place, answer[0], folder)


def _refuse(message: str, folder: RunFolder | None, place: Place) -> int:
    """End every rank for a mistake that rank 0 found; only rank 0 speaks."""

    def mistake() -> Mapping[str, Any]:
        raise ConfigError(message)

    if folder is not None:
        return run_session("train", folder, mistake, world_size=place.world_size)
    if place.rank == 0:
        print_error(message)
    return EXIT_CONFIG


def _follow(
    runtime: "Runtime",
    config: TrainConfig,
    place: Place,
    answer: Mapping[str, str],
    folder: RunFolder | None,
) -> int:
    """Train in a folder that rank 0 chose."""
    from gatewise.training.data import prepare_data

    path = Path(answer["folder"])
    log = Path(answer["logs"]) / f"rank_{place.rank}.log"

    def body(_: Place) -> dict[str, Any]:
        data_folder = Path(answer["data"])
        if place.rank and place.local_rank == 0:  # another machine, with a cache of its own
            data_folder = prepare_data(config.data).folder
        return _train(runtime, config, data_folder, path)

    def report() -> Mapping[str, Any]:
        with own_log(log, keep_stdout=place.rank == 0):
            outcome = run_here(body, place, (), log=log)
        return {**(outcome.result or {}), "peak_rss_mb": outcome.peak_rss_mb}

    if folder is not None:
        return run_session("train", folder, report, world_size=place.world_size)
    try:
        return int(report().get("exit", EXIT_OK))
    except RankFailure as error:
        print_error(one_line(error))
        return EXIT_CRASH


def _prepare(config: TrainConfig, folder: RunFolder) -> Path:
    """Fill the run's folder and tokenise the text; return the folder of the prepared data."""
    from gatewise.launch.restore import check_resume
    from gatewise.training.data import prepare_data

    with tell_user():
        data = prepare_data(config.data)
        print(f"  text: {len(data.train):,} tokens, {len(data.validation):,} of validation")
        _check_vocabulary(config, config.embedding_rows(data.tokenizer.vocab_size))
        check_resume(config, folder.path, data)
    folder.write_config(config_to_yaml(config))
    folder.write_environment([Path(sys.argv[0]).name, *sys.argv[1:]])
    with writable(folder.path):
        data.tokenizer.save(folder.path / "tokenizer.json")
    return data.folder


def _check_vocabulary(config: TrainConfig, vocab_size: int) -> None:
    """Refuse a table of experts that was made for other token ids, before ranks start."""
    if config.router.hash_table is None or not config.router.uses_hash:
        return
    from gatewise.routers.hashing import read_table

    try:
        read_table(
            config.router.hash_table, vocab_size, config.model.num_experts, config.model.top_k
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _start(config: TrainConfig, folder: RunFolder) -> Mapping[str, Any]:
    """Prepare everything that can fail for a user's mistake, then train on our own ranks."""
    ranks = config.parallel.ranks
    threads = threads_per_rank(config.parallel.threads, ranks, os.environ)
    if ranks > 1:
        warm_up(threads, preload=PRELOAD)
    else:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    _announce(config, folder, threads)
    task = (config, _prepare(config, folder), folder.path)
    if ranks == 1:
        place = Place(rank=0, world_size=1, threads=threads)
        outcomes = [run_here(train_rank, place, task, log=folder.logs / "rank_0.log")]
    else:
        outcomes = run_ranks(train_rank, ranks, task, threads=threads, logs=folder.logs)
    peaks = [outcome.peak_rss_mb for outcome in outcomes]
    return {
        **(outcomes[0].result or {}),
        "peak_rss_mb": max(peaks),
        "rank_peak_rss_mb": peaks,
    }


def _announce(config: TrainConfig, folder: RunFolder, threads: int) -> None:
    """Say what starts, in a few lines."""
    model, parallel = config.model, config.parallel
    experts = f"{model.num_experts} experts top-{model.top_k}" if model.num_experts else "dense"
    print(f"gatewise train: {config.name} -> {shlex.quote(str(folder.path))}")
    print(
        f"  model: {model.layers} layers of {model.hidden}, {experts}; "
        f"{config.batch.sequences} x {config.data.sequence_length} tokens a step, "
        f"{config.steps} steps"
    )
    print(
        f"  ranks: {parallel.ranks} (expert degree {parallel.expert}, "
        f"{threads} thread{'s' if threads > 1 else ''} each)",
        flush=True,
    )


if __name__ == "__main__":
    from gatewise.launch.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
