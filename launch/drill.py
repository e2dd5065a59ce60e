"""`gatewise drill`: kill ranks at random moments, start again, and compare with a quiet run.

An undisturbed run first; then the same run again and again, each start with a shot that kills one
rank or all of them: at any moment from the start of its process on, or within a save. The next
start must go on from the newest durable checkpoint. A round ends when a start outlives its shot;
its records and its last checkpoint must be those of the undisturbed run, bit for bit.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gatewise.conf.compose import config_to_yaml, load_beside
from gatewise.conf.fields import field_table
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import EXIT_CRASH, EXIT_OK, run_session
from gatewise.launch.spawn import RankFailure, run_ranks, warm_up
from gatewise.launch.train import PRELOAD
from gatewise.launch.usage import usage_text
from gatewise.launch.world import Place, join_ranks, threads_per_rank
from gatewise.parallel.errors import ConfigError
from gatewise.training.checkpoint_folder import find_latest, read_json
from gatewise.training.config import TrainConfig
from gatewise.training.sinks import JsonlSink, MetricSink, close_all, read_records

__all__ = ["DrillConfig", "Shot", "run", "usage"]

_DEFAULTS = (
    "experiment=tiny",
    "parallel.ranks=4",
    "parallel.expert=2",
    "steps=24",
    "checkpoint.every=1",
    "evaluation.tokens=64",
)
_LATEST_SAVE = 4  # of a start, at which is shot: some are the first, most follow a whole one
_MACHINE = ("train/tokens_per_second", "train/memory_mb", "schedule/", "ranks/")  # times, sizes
_SUMMARY = """Kill ranks at random moments; check that every start goes on from the newest durable
checkpoint, and that the run ends as one that nobody disturbed. Takes the fields of `train` too."""


@dataclass(kw_only=True, slots=True)
class DrillConfig:
    """How often and when."""

    kills: int = 5  # SIGKILLs
    draw: int = 0  # seed of the moments and ranks

    def __post_init__(self) -> None:
        if self.kills < 1:
            raise ConfigError(f"kills is {self.kills}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Shot:
    """When a rank kills itself."""

    rank: int | None  # None: all ranks
    seconds: float  # after its process has started, or after a save has begun
    save: int | None  # which of the saves of this start, from 1; None: of the process
    left: frozenset[str] = frozenset()  # saves that the last start left unfinished


@dataclass(slots=True)
class _Tally:
    """What happened; `problems` must stay empty."""

    kills: int = 0
    all_ranks: int = 0  # all of them at once
    inside_a_save: int = 0  # an unfinished save was left
    before_first: int = 0  # nothing was durable yet
    resumed: int = 0  # kills after which the next start went on from the newest checkpoint
    rounds: int = 0
    problems: list[str] = field(default_factory=list)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    _, config = load_beside(DrillConfig, arguments, _DEFAULTS)
    return usage_text("drill", _SUMMARY, field_table(DrillConfig) | field_table(config))


def run(arguments: Sequence[str]) -> int:
    """Kill, start again and compare; return the exit code."""
    drill, config = load_beside(DrillConfig, arguments, _DEFAULTS)
    if config.parallel.ranks < 2:
        raise ConfigError("parallel.ranks is 1; a drill kills one of several ranks, use 2 or more")
    folder = RunFolder.choose(config.run.dir, f"{config.name}_drill")
    return run_session(
        "drill", folder, lambda: _drill(drill, config, folder), world_size=config.parallel.ranks
    )


def _drill(drill: DrillConfig, config: TrainConfig, folder: RunFolder) -> Mapping[str, Any]:
    from gatewise.training.data import prepare_data

    threads = threads_per_rank(config.parallel.threads, config.parallel.ranks, os.environ)
    warm_up(threads, preload=PRELOAD)
    folder.write_config(config_to_yaml(config))
    start = _Starter(config, prepare_data(config.data).folder, threads, folder.logs)
    quiet = folder.path / "undisturbed"
    began = time.monotonic()
    start(quiet, None)
    seconds = time.monotonic() - began
    print(f"undisturbed: {config.steps} steps in {seconds:.1f} s", flush=True)
    tally = _Tally()
    shots = _shots(random.Random(drill.draw), config.parallel.ranks, seconds)
    while tally.kills < drill.kills and not tally.problems:
        tally.rounds += 1
        _round(start, folder.path / f"round_{tally.rounds}", shots, drill.kills, tally)
        place = folder.path / f"round_{tally.rounds}"
        tally.problems += [f"{place}: {text}" for text in _differences(place, quiet)]
        print(
            f"round {tally.rounds}: {tally.kills} kills ({tally.inside_a_save} within a save, "
            f"{tally.all_ranks} of all ranks), {tally.resumed} resumed right",
            flush=True,
        )
    for problem in tally.problems:
        print(f"  wrong: {problem}")
    failed = bool(tally.problems)
    return {
        "kills": tally.kills,
        "resumed": tally.resumed,
        "inside_a_save": tally.inside_a_save,
        "all_ranks": tally.all_ranks,
        "before_first_checkpoint": tally.before_first,
        "rounds": tally.rounds,
        "problems": tally.problems,
        "exit": EXIT_CRASH if failed else EXIT_OK,
        **({"error": tally.problems[0]} if failed else {}),
    }


def _round(
    start: "_Starter", place: Path, shots: Iterator[Shot], kills: int, tally: _Tally
) -> None:
    """Start a run until it ends; the last start has no shot."""
    unproven = 0  # kills whose resumption was not seen yet
    while True:
        shot = next(shots) if tally.kills < kills else None
        left = _unfinished(place)
        newest = find_latest(place / "checkpoints")
        durable = 0 if newest is None else int(newest.name.removeprefix("step_"))
        seen = len(_resumed_steps(place))
        ended = start(place, shot)
        for step in _resumed_steps(place)[seen:]:
            if step == durable:
                tally.resumed += unproven
            else:
                tally.problems.append(f"{place} went on from step {step}, not from {durable}")
            unproven = 0
        if ended is None:
            return
        if "killed by SIGKILL" not in ended:
            tally.problems.append(f"{place}: {ended}")
            return
        unproven += 1
        tally.kills += 1
        tally.all_ranks += shot is not None and shot.rank is None
        tally.inside_a_save += bool(_unfinished(place) - left)
        tally.before_first += durable == 0


class _Starter:
    """Starts the ranks of the run once more in a folder."""

    def __init__(self, config: TrainConfig, data: Path, threads: int, logs: Path) -> None:
        self._config, self._data, self._threads, self._logs = config, data, threads, logs

    def __call__(self, place: Path, shot: Shot | None) -> str | None:
        """Return how the run failed, or None where it came to its end."""
        place.mkdir(exist_ok=True)
        if shot is not None:
            shot = replace(shot, left=_unfinished(place))
        task = (self._config, self._data, place, shot)
        ranks = self._config.parallel.ranks
        try:
            run_ranks(_rank, ranks, task, threads=self._threads, logs=self._logs)
        except RankFailure as error:
            return str(error)
        return None


class _Resumptions:
    """A sink that notes where each start went on."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def resume(self, step: int) -> None:
        """Append the step."""
        with self._file.open("a", encoding="ascii") as stream:
            stream.write(f"{step}\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Records are another sink's."""

    def close(self) -> None:
        """Nothing is open."""


def _rank(
    place: Place, config: TrainConfig, data_folder: Path, folder: Path, shot: Shot | None
) -> dict[str, Any]:
    """Be one rank of a run that may be shot."""
    from gatewise.training.data import open_prepared
    from gatewise.training.trainer import train

    if shot is not None and shot.rank in (None, place.rank):
        threading.Thread(target=_shoot, args=(shot, folder), daemon=True).start()
    with join_ranks(place, config.parallel) as runtime:
        data = open_prepared(data_folder)
        sinks: list[MetricSink] = []
        if runtime.rank == 0:
            sinks = [JsonlSink(folder / "metrics.jsonl"), _Resumptions(_resumptions(folder))]
        try:
            return dict(train(config, runtime, data, folder, sinks))
        finally:
            close_all(sinks)


def _shoot(shot: Shot, folder: Path) -> None:
    """Wait for the moment, then kill this process."""
    begun: set[str] = set()
    while shot.save is not None and len(begun) < shot.save:
        begun |= _unfinished(folder) - shot.left
        time.sleep(0.001)
    time.sleep(shot.seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _shots(generator: random.Random, ranks: int, seconds: float) -> Iterator[Shot]:
    """Yield moments without end: two of three in a save, one of four for all ranks.

    Args:
        generator: of the moments.
        ranks: number of ranks.
        seconds: that an undisturbed run takes.
    """
    while True:
        save = generator.randint(1, _LATEST_SAVE) if generator.random() < 2 / 3 else None
        rank = None if generator.random() < 1 / 4 else generator.randrange(ranks)
        # saves follow each other: some of the later moments are in the next one, or after it
        latest = generator.choice((0.02, 0.2, 1.0)) if save else seconds
        yield Shot(rank, generator.uniform(0, latest), save)


def _unfinished(folder: Path) -> frozenset[str]:
    """Return the names of saves that are under way, or were when the run was killed."""
    found = (folder / "checkpoints").glob(".step_*.partial-*")
    return frozenset(path.name for path in found)


def _resumptions(folder: Path) -> Path:
    return folder / "resumed.txt"


def _resumed_steps(folder: Path) -> list[int]:
    file = _resumptions(folder)
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def _differences(place: Path, quiet: Path) -> list[str]:
    """Compare records and the last checkpoint of two runs, bit for bit."""
    found = []
    for mine, wanted in zip(_records(place), _records(quiet), strict=False):
        names = [name for name in wanted if mine.get(name) != wanted[name]]
        if names:
            found.append(f"{names[0]} of step {wanted['step']} is {mine.get(names[0])}")
            break
    if len(_records(place)) != len(_records(quiet)):
        found.append(f"{len(_records(place))} records instead of {len(_records(quiet))}")
    mine_sums, wanted_sums = _checksums(place), _checksums(quiet)
    if mine_sums != wanted_sums:
        found.append("the last checkpoint holds other values")
    return found


def _records(folder: Path) -> list[dict[str, Any]]:
    """Return the records without what depends on the machine."""
    file = folder / "metrics.jsonl"
    records = read_records(file) if file.exists() else []
    return [
        {name: value for name, value in record.items() if not name.startswith(_MACHINE)}
        for record in records
    ]


def _checksums(folder: Path) -> dict[str, Any]:
    """Return the checksums of the tensors of the last checkpoint."""
    path = find_latest(folder / "checkpoints")
    files = {} if path is None else read_json(path, "manifest.json")["files"]
    sums = {name: record["sha256"] for name, record in files.items() if name.startswith("shard_")}
    return {"step": path and path.name, **sums}
