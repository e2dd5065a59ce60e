"""`gatewise verify`: the parity suite on the user's own settings and ranks, in minutes.

Training in the layout of the settings must be training on one rank: gradients, norms, losses and
the state after five steps; a run that goes on must be the run that never stopped, bit for bit, and
a checkpoint of either layout must go on in the other. All of it runs through `gatewise train`'s own
code, in double precision, on as small a piece of the model as shows the same (`reduced`).
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewise.conf.compose import load_beside
from gatewise.conf.fields import field_table
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import EXIT_CRASH, EXIT_OK, run_session
from gatewise.launch.spawn import run_ranks, warm_up
from gatewise.launch.train import PRELOAD
from gatewise.launch.usage import usage_text
from gatewise.launch.world import Place, join_ranks, threads_per_rank
from gatewise.moe.config import count_parameters
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.routers.config import BalanceScope
from gatewise.training.checkpoint_folder import step_path
from gatewise.training.config import (
    CheckpointConfig,
    EngineKind,
    EvaluationConfig,
    Precision,
    TrainConfig,
)
from gatewise.training.sinks import JsonlSink, close_all, read_records

__all__ = ["Check", "VerifyConfig", "on_one_rank", "reduced", "run", "usage"]

_STEPS, _CUT = 5, 3  # steps of a run, and where it is interrupted
_FP32 = 1e-6  # what records are rounded to, whatever the arithmetic
_MACHINE = ("train/tokens_per_second", "train/memory_mb", "schedule/", "ranks/")
_SUMMARY = """Compare training in the layout of the settings with training on one rank: gradients,
norms, five steps, resume, checkpoints of one layout in the other. Takes the fields of `train`."""


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """How much of the model is tried, and how far results may differ."""

    max_layers: int = 2  # layers; more where fewer have no MoE layer
    max_length: int = 64  # tokens of a sequence
    max_parameters: int = 20_000_000  # above, widths are halved
    tolerance: float = 1e-8  # relative, of gradients; norms and losses are recorded in fp32
    state_tolerance: float = 1e-6  # relative, of weights and moments after five steps

    def __post_init__(self) -> None:
        for name, least in (("max_layers", 1), ("max_length", 2), ("max_parameters", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("tolerance", "state_tolerance"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    name: str
    against: str
    difference: float  # relative; nan or infinite where values are
    tolerance: float  # 0: equal in every bit
    worst: str  # what differs most

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance  # false for nan

    def __str__(self) -> str:
        """Say it in one line."""
        allowed = f"at most {self.tolerance:.0e}" if self.tolerance else "bit for bit"
        verdict = "pass" if self.passed else "FAIL"
        return (
            f"{verdict}  {self.name:<12} {self.against:<34} {self.difference:9.2e}  "
            f"{allowed:<14}  {self.worst}"
        )


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    own, config = load_beside(VerifyConfig, arguments)
    return usage_text("verify", _SUMMARY, field_table(own) | field_table(config))


def run(arguments: Sequence[str]) -> int:
    """Compare, print the table and return the exit code: 1 where a check fails."""
    own, config = load_beside(VerifyConfig, arguments)
    folder = RunFolder.choose(config.run.dir, f"{config.name}_verify")
    return run_session(
        "verify", folder, lambda: _verify(own, config, folder), world_size=config.parallel.ranks
    )


def reduced(own: VerifyConfig, config: TrainConfig) -> TrainConfig:
    """Return the settings of five steps of a small piece of the model in the same layout.

    Kept are: experts, top_k, routers, heads, activation, ranks and all degrees, schedule, and
    whether there are several micro-batches.
    """
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    layers = min(model.layers, max(own.max_layers, model.dense_layers + model.moe_every))
    model = dataclasses.replace(model, layers=layers)
    length = max(2, min(length, own.max_length) // parallel.tensor) * parallel.tensor
    readers = parallel.ranks // parallel.tensor
    share = config.batch.sequences // readers
    micro = config.batch.micro
    if micro is None or _counts_together(config):
        share, micro = min(share, 2), None
    else:
        passes, micro = min(share // micro, 2), min(micro, 2)
        share = passes * micro
    while count_parameters(model, 257, config.router).total > own.max_parameters:
        if model.expert_width % (2 * parallel.expert_shard) == 0:
            model = dataclasses.replace(model, expert_width=model.expert_width // 2)
        elif model.hidden % (4 * model.heads) == 0:
            model = dataclasses.replace(model, hidden=model.hidden // 2)
        else:
            break
    return dataclasses.replace(
        config,
        steps=_STEPS,
        log_every=1,
        precision=Precision.fp64,
        model=model,
        data=dataclasses.replace(config.data, sequence_length=length),
        batch=dataclasses.replace(config.batch, sequences=share * readers, micro=micro),
        optim=dataclasses.replace(config.optim, warmup=1),
        checkpoint=CheckpointConfig(every=1, keep_last=2 * _STEPS, asynchronous=False),
        evaluation=EvaluationConfig(tokens=length, micro=1, stride=None),
    )


def on_one_rank(config: TrainConfig) -> TrainConfig:
    """Return the settings of the same training on one rank: the same micro-batches, in turn.

    Where a loss counts over all ranks' micro-batches at once, these are one there.
    """
    readers = config.parallel.ranks // config.parallel.tensor
    micro = config.batch.micro or config.batch.sequences // readers
    if _counts_together(config):
        micro = config.batch.sequences
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(threads=config.parallel.threads),
        batch=dataclasses.replace(config.batch, micro=micro),
        engine=EngineKind.gatewise,
        schedule=dataclasses.replace(config.schedule, policy="serial", profile=None, trace=None),
        faults=[],
    )


def _counts_together(config: TrainConfig) -> bool:
    """Tell whether a router loss depends on the counts of all ranks' micro-batches together."""
    router = config.router
    return bool(router.balance_loss) and router.balance_scope is BalanceScope.global_batch


def _verify(own: VerifyConfig, config: TrainConfig, folder: RunFolder) -> Mapping[str, Any]:
    from gatewise.training.data import prepare_data

    small = reduced(own, config)
    one = on_one_rank(small)
    ranks = small.parallel.ranks
    threads = threads_per_rank(config.parallel.threads, ranks, os.environ)
    warm_up(threads, preload=PRELOAD)
    data, places = prepare_data(small.data).folder, _Places(folder.path)
    print(f"verify: {_describe(small)}", flush=True)
    many = [(small, places.layout)]
    run_ranks(_train_all, ranks, (many, data), threads=threads, logs=folder.logs)
    places.cut(places.layout, places.resumed)
    places.cut(places.layout, places.gathered)
    run_ranks(
        _train_all,
        1,
        ([(one, places.single), (one, places.gathered)], data),
        threads=threads,
        logs=folder.logs,
    )
    places.cut(places.single, places.spread)
    many = [(small, places.resumed), (small, places.spread)]
    run_ranks(_train_all, ranks, (many, data), threads=threads, logs=folder.logs)
    checks = list(_checks(own, places, ranks, beta1=small.optim.beta1))
    for check in checks:
        print(f"  {check}")
    failed = [check for check in checks if not check.passed]
    result: dict[str, Any] = {
        "checks": [dataclasses.asdict(c) | {"passed": c.passed} for c in checks],
        "passed": not failed,
        "tried": _describe(small),
        "exit": EXIT_CRASH if failed else EXIT_OK,
    }
    if failed:
        result["error"] = (
            f"{len(failed)} of {len(checks)} checks failed: {failed[0].name} against "
            f"{failed[0].against} differs by {failed[0].difference:.2e} ({failed[0].worst})"
        )
    return result


class _Places:
    """Folders of the five runs."""

    def __init__(self, folder: Path) -> None:
        self.layout = folder / "layout"  # as the settings say
        self.single = folder / "one_rank"
        self.resumed = folder / "layout_resumed"
        self.gathered = folder / "layout_then_one_rank"
        self.spread = folder / "one_rank_then_layout"
        for path in (self.layout, self.single, self.resumed, self.gathered, self.spread):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def cut(self, source: Path, target: Path) -> None:
        """Let a run begin where another one stood in its middle."""
        name = step_path(Path(), _CUT).name
        shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)


def _train_all(
    place: Place, runs: Sequence[tuple[TrainConfig, Path]], data_folder: Path
) -> Mapping[str, Any]:
    """Train each run in its folder, as one rank."""
    from gatewise.training.data import open_prepared
    from gatewise.training.trainer import train

    with join_ranks(place, runs[0][0].parallel) as runtime:
        for config, folder in runs:
            sinks = [JsonlSink(folder / "metrics.jsonl")] if runtime.rank == 0 else []
            try:
                train(config, runtime, open_prepared(data_folder), folder, sinks)
            finally:
                close_all(sinks)
    return {}


def _checks(own: VerifyConfig, places: _Places, ranks: int, *, beta1: float) -> Iterator[Check]:
    """Compare what the runs left."""
    here = f"{ranks} rank{'s' if ranks > 1 else ''}"
    both = f"{here} and 1 rank"
    tight, loose = own.tolerance, own.state_tolerance
    recorded = max(tight, _FP32)
    pairs = _gradients(places.layout, beta1), _gradients(places.single, beta1)
    yield Check("gradients", both, *_furthest(*pairs, tight))
    layout, single = _records(places.layout), _records(places.single)
    kinds = {"norms": ("train/grad_norm", "grad/"), "losses": ("train/loss", "val/")}
    for name, keys in kinds.items():
        yield Check(
            name, both, *_furthest(_numbers(layout, keys), _numbers(single, keys), recorded)
        )
    end = _tensors(places.layout, _STEPS)
    wanted = _tensors(places.single, _STEPS)
    yield Check("five steps", both, *_furthest(end, wanted, loose))
    resumed = f"{here}, stopped after {_CUT}"
    yield Check("resume", resumed, *_furthest(_tensors(places.resumed, _STEPS), end, 0.0))
    again = _numbers(_records(places.resumed), ("",))
    before = {name: n for name, n in _numbers(layout, ("",)).items() if name in again}
    yield Check("resume", f"{here}, records", *_furthest(again, before, 0.0))
    gathered = _tensors(places.gathered, _STEPS)
    yield Check("reshard", f"{here} to 1 rank", *_furthest(gathered, wanted, loose))
    spread = _tensors(places.spread, _STEPS)
    yield Check("reshard", f"1 rank to {here}", *_furthest(spread, end, loose))


def _furthest(
    found: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float
) -> tuple[float, float, str]:
    """Return the largest relative difference of tensors or numbers, the tolerance, and whose."""
    import torch

    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        return math.inf, tolerance, f"{odd[0]} is on one side only"
    worst, name = 0.0, "no difference"
    for key, value in found.items():
        have, want = torch.as_tensor(value).double(), torch.as_tensor(wanted[key]).double()
        if have.shape != want.shape:
            return math.inf, tolerance, f"{key} has another shape"
        if torch.equal(have, want):
            continue
        scale = float(want.norm()) or 1.0
        difference = float((have - want).norm()) / scale
        if not difference <= worst:  # true for nan, too
            worst, name = difference, key
        if math.isnan(difference):
            break
    return worst, tolerance, name


def _tensors(folder: Path, step: int) -> dict[str, Any]:
    """Return all tensors of a checkpoint, whole."""
    from gatewise.training.checkpoint_load import load_whole

    return load_whole(step_path(folder / "checkpoints", step))


def _gradients(folder: Path, beta1: float) -> dict[str, Any]:
    """Return the gradients of the first step, which Adam's first moments hold after it."""
    moments = _tensors(folder, 1).items()
    return {
        name.removeprefix("adam_m/"): moment / (1 - beta1)
        for name, moment in moments
        if name.startswith("adam_m/")
    }


def _records(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder / "metrics.jsonl")


def _numbers(records: Sequence[Mapping[str, Any]], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Return the numbers of records under `step n: name`, without what depends on the machine."""
    return {
        f"step {record['step']}: {name}": math.nan if value is None else value
        for record in records
        for name, value in record.items()
        if name.startswith(prefixes) and not name.startswith(_MACHINE)
    }


def _describe(config: TrainConfig) -> str:
    """Say what is tried."""
    model, parallel = config.model, config.parallel
    experts = f"{model.num_experts} experts of {model.expert_width}" if model.num_experts else ""
    degrees = [
        f"{name} {getattr(parallel, name)}"
        for name in ("expert", "expert_shard", "tensor", "shard")
        if getattr(parallel, name) > 1
    ]
    layout = f"{parallel.ranks} ranks" + (f" ({', '.join(degrees)})" if degrees else "")
    return (
        f"{model.layers} layers of {model.hidden}, {experts or 'dense'}, "
        f"{config.batch.sequences} x {config.data.sequence_length} tokens, {layout}, "
        f"{_STEPS} steps in fp64"
    )
