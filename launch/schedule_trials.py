"""What a rank of `gatewise bench schedule` does: measure a profile, plan, run the trials.

Read `bench_chain.py` and `chain_profile.py` first. Rank 0 plans and tells the others, so that all
run the same plans. Each trial runs every candidate once; a pass lasts as long as on its slowest
rank. Results are compared with those of the first candidate.
"""

import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.launch.bench_blocks import Blocks, make_blocks_problem
from gatewise.launch.bench_chain import Chain, ChainGroups
from gatewise.launch.chain_profile import (
    NUMBER_BYTES,
    ChainSize,
    make_expert,
    make_problem,
    measure_profile,
)
from gatewise.launch.testbed import PORT, enter_node
from gatewise.launch.trials import trial_orders
from gatewise.launch.world import Place
from gatewise.moe.planning.policies import Pass, Problem, Proposal
from gatewise.moe.planning.whole import propose
from gatewise.parallel.collectives import Group
from gatewise.parallel.runtime import keep_freed_memory
from gatewise.parallel.schedule.cost import Interference
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.profiles import Profile
from gatewise.parallel.schedule.recorder import Recorder
from gatewise.parallel.schedule.timeline import Timeline

__all__ = ["Cell", "Measured", "Settings", "Trials", "bench_rank"]


class _Work(Protocol):
    """What the trials run."""

    def start(self) -> None:
        """Forget all gradients."""
        ...

    def prepare(self, item: Pass, blocks: int) -> Any:  # its own type, given back to `run`
        """Make a planned pass, which spans so many blocks, ready."""
        ...

    def run(self, name: str, item: Any, recorder: Recorder | None = None) -> Tensor:
        """Run a pass and return its result."""
        ...

    def gradients(self, *, with_sum: bool) -> list[Tensor]:
        """Return copies of the gradients of all weights."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What all ranks are told."""

    size: ChainSize
    nodes: tuple[str, ...]  # namespaces; empty: the machine's own loopback
    links: str  # for the profile's source
    tokens: tuple[int, ...]  # rows of a rank, one cell each
    computes: tuple[str, ...]  # "emulated", "real"
    passes: tuple[str, ...]  # "forward", "backward"
    policies: tuple[str, ...]  # the first is what the others are compared with
    without_sum: tuple[str, ...]  # policies that are measured again without a gradient sum
    gradient_bytes: int
    trials: int
    max_chunks: int
    timeout: float  # seconds
    blocks: int = 0  # whole blocks of a step; 0: one layer of experts
    sequences: int = 1  # of a micro-batch, where there are blocks
    profiles: Mapping[str, Profile] = field(default_factory=dict)  # by compute, measured before


@dataclass(frozen=True, slots=True)
class Measured:
    """One policy in one cell: its plan and what this rank measured of it."""

    proposal: Proposal
    gradient_bytes: int
    ms: Mapping[str, Sequence[float]]  # of each pass, trial by trial
    timelines: Mapping[str, Timeline]  # of the trial that is nearest to the median
    sent_bytes: Mapping[str, float]  # "inter" and "intra", of this node in a trial, if it is one
    difference: float | None  # of results to the first candidate's, over their largest number


@dataclass(frozen=True, slots=True)
class Cell:
    """All candidates of one size."""

    compute: str
    tokens: int
    blocks: int
    interference: Interference
    candidates: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class Trials:
    """What a rank reports."""

    profiles: Mapping[str, Profile]
    cells: tuple[Cell, ...]
    loads: tuple[float, ...]  # load average at each trial


def bench_rank(place: Place, settings: Settings) -> dict[str, Any]:
    """Be one rank: measure, and return `Trials` as "trials"."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to save
    torch.set_num_threads(place.threads)
    keep_freed_memory()
    if settings.nodes:
        enter_node(settings.nodes[place.rank // settings.size.ranks_per_node])
    groups = _join(place, settings)
    lanes = ThreadLanes()
    try:
        return {"trials": _measure(place.rank, settings, groups, lanes)}
    finally:
        lanes.close()
        dist.destroy_process_group()


def _join(place: Place, settings: Settings) -> ChainGroups:
    """Meet the other ranks; each group gets connections of its own, on the link that it uses."""
    limit = timedelta(seconds=settings.timeout)
    port = PORT if settings.nodes else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = port
    dist.init_process_group(
        "gloo",
        init_method=place.init_method,
        rank=place.rank,
        world_size=place.world_size,
        timeout=limit,
    )
    size = settings.size.ranks_per_node
    everyone = list(range(place.world_size))
    across = [everyone[local::size] for local in range(size)]
    within = [everyone[first : first + size] for first in everyone[::size]]

    def group(partition: list[list[int]], port: str) -> Group:
        os.environ["GLOO_SOCKET_IFNAME"] = port  # gloo reads it where a group is made
        handles = [dist.new_group(ranks, timeout=limit) for ranks in partition]
        mine = next(i for i, ranks in enumerate(partition) if place.rank in ranks)
        return Group.of(handles[mine] if len(partition[mine]) > 1 else None)

    return ChainGroups(
        Group.of(dist.group.WORLD), group(across, port), group(within, "lo"), group(across, port)
    )


def _measure(rank: int, settings: Settings, groups: ChainGroups, lanes: ThreadLanes) -> Trials:
    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    profiles = dict(settings.profiles)
    cells: list[Cell] = []
    loads: list[float] = []
    for compute in settings.computes:
        if compute not in profiles:
            say(f"  {compute} compute: measuring costs")
            most = max(settings.tokens)
            profiles[compute] = measure_profile(
                settings.size,
                groups,
                lanes,
                make_expert(settings.size, compute, most, rank),
                tokens=most,
                gradient_bytes=settings.gradient_bytes,
                source=f"measured, links {settings.links}, {compute} experts",
                progress=lambda text: say(f"    {text}"),
            )
        for tokens in settings.tokens:
            say(f"  {compute} compute, {tokens} rows a rank: planning")
            found = _plan(rank, settings, profiles[compute], tokens)
            work = _make_work(rank, settings, groups, lanes, compute=compute, tokens=tokens)
            measured = _CellTrials(settings, groups.control, work, found).run(loads, say)
            blocks = max(1, settings.blocks)
            disturbed = profiles[compute].interference
            cells.append(Cell(compute, tokens, blocks, disturbed, measured))
    return Trials(profiles, tuple(cells), tuple(loads))


def _make_work(
    rank: int,
    settings: Settings,
    groups: ChainGroups,
    lanes: ThreadLanes,
    *,
    compute: str,
    tokens: int,
) -> _Work:
    """Return what the trials run."""
    size = settings.size
    if settings.blocks:
        return Blocks(groups, lanes, size, settings.blocks)
    generator = torch.Generator().manual_seed(size.seed + 1000 + rank)
    shape = (size.nodes, tokens // size.nodes, size.width)
    return Chain(
        groups,
        lanes,
        make_expert(size, compute, tokens, rank),
        x_nTD=torch.randn(shape, generator=generator),
        dy_nTD=torch.randn(shape, generator=generator),
        gradient=settings.gradient_bytes // NUMBER_BYTES,
    )


def _problem(settings: Settings, profile: Profile, tokens: int, gradient_bytes: int) -> Problem:
    """Return what the policies are asked."""
    if settings.blocks:
        return make_blocks_problem(
            settings.size,
            profile,
            tokens=tokens,
            blocks=settings.blocks,
            sequences=settings.sequences,
            max_chunks=settings.max_chunks,
        )
    return make_problem(
        settings.size,
        profile,
        tokens=tokens,
        gradient_bytes=gradient_bytes,
        max_chunks=settings.max_chunks,
        passes=settings.passes,
    )


def _plan(
    rank: int, settings: Settings, profile: Profile, tokens: int
) -> list[tuple[Proposal, int]]:
    """Return the plans of rank 0, with the bytes of the gradient sum in each."""
    wanted = [(policy, settings.gradient_bytes) for policy in settings.policies]
    wanted += [(policy, 0) for policy in settings.without_sum]
    plans = []
    for policy, gradient in wanted:  # the others wait for one plan at a time
        plan: list[Any] = [None]  # broadcast_object_list takes any objects
        if rank == 0:
            plan[0] = propose(policy, _problem(settings, profile, tokens, gradient))
        dist.broadcast_object_list(plan, src=0)
        plans.append((plan[0], gradient))
    return plans


class _CellTrials:
    """Runs the candidates of one cell in turns."""

    def __init__(
        self,
        settings: Settings,
        control: Group,
        work: _Work,
        plans: Sequence[tuple[Proposal, int]],
    ) -> None:
        self._settings, self._control, self._work = settings, control, work
        self._plans = plans
        self._prepared = [
            {name: work.prepare(plan.passes[name], plan.blocks) for name in settings.passes}
            for plan, _ in plans
        ]
        self._recorder = Recorder()

    def run(self, loads: list[float], say: Callable[[str], None]) -> tuple[Measured, ...]:
        """Warm up, compare results, and run the trials."""
        count = len(self._plans)
        wanted = self._results(0)
        differences = [_difference(self._results(i), wanted) for i in range(count)]
        del wanted
        ms: list[dict[str, list[float]]] = [
            {n: [] for n in self._settings.passes} for _ in self._plans
        ]
        lines: list[list[dict[str, Timeline]]] = [[] for _ in self._plans]
        sent: list[list[dict[str, float]]] = [[] for _ in self._plans]
        for trial, order in enumerate(trial_orders(count, self._settings.trials)):
            loads.append(os.getloadavg()[0])
            for index in order:
                before = self._sent_bytes()
                lines[index].append({})
                for name in self._settings.passes:
                    began, ended, line = self._once(index, name)
                    ms[index][name].append(1e3 * (ended - began))
                    lines[index][-1][name] = line
                dist.barrier(self._control.handle)  # the node's other ranks have sent all as well
                after = self._sent_bytes()
                sent[index].append({link: after[link] - before[link] for link in after})
            if (trial + 1) % 5 == 0:
                say(f"    trial {trial + 1} of {self._settings.trials}")
        return tuple(
            Measured(
                plan,
                gradient,
                slowest,
                lines[index][_nearest_to_median(slowest)],
                {
                    link: statistics.median(trial[link] for trial in sent[index])
                    for link in sent[index][0]
                },
                differences[index],
            )
            for index, ((plan, gradient), slowest) in enumerate(
                zip(self._plans, self._slowest(ms), strict=True)
            )
        )

    def _sent_bytes(self) -> dict[str, float]:
        """Return what this node has sent; on the loopback nobody can tell whose bytes they are."""
        return _sent_bytes() if self._settings.nodes else {}

    def _once(self, index: int, name: str) -> tuple[float, float, Timeline]:
        """Run one pass of a candidate; return when it began and ended, and its timeline."""
        self._work.start()
        dist.barrier(self._control.handle)
        began = time.perf_counter()
        self._work.run(name, self._prepared[index][name], self._recorder)
        ended = time.perf_counter()
        # ranks leave the barrier one after the other; their lines start with the first of them
        origin = torch.tensor(began, dtype=torch.float64)
        dist.all_reduce(origin, dist.ReduceOp.MIN, group=self._control.handle)
        return began, ended, self._recorder.drain(float(origin))

    def _results(self, index: int) -> list[Tensor]:
        """Return what a candidate computes."""
        results = []
        for name in self._settings.passes:
            self._work.start()
            dist.barrier(self._control.handle)
            results.append(self._work.run(name, self._prepared[index][name]))
        return results + self._work.gradients(with_sum=self._plans[index][1] > 0)

    def _slowest(self, ms: list[dict[str, list[float]]]) -> list[dict[str, list[float]]]:
        """Return the times of the slowest rank, trial by trial."""
        names = self._settings.passes
        mine = torch.tensor([[times[name] for name in names] for times in ms], dtype=torch.float64)
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._control.handle)
        return [dict(zip(names, times, strict=True)) for times in mine.tolist()]


def _nearest_to_median(ms: Mapping[str, Sequence[float]]) -> int:
    """Return the trial whose time over all passes is nearest to the median."""
    totals = [sum(times) for times in zip(*ms.values(), strict=True)]
    middle = statistics.median(totals)
    return min(range(len(totals)), key=lambda trial: abs(totals[trial] - middle))


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float | None:
    """Return the largest difference, as a share of the largest number; 0 where bits are equal.

    It is infinite where a number is not finite. What only one of them has, a summed gradient, is
    not compared.
    """
    shares = []
    for x, y in zip(found, wanted, strict=False):
        if y.numel():
            share = float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))
            shares.append(share if math.isfinite(share) else math.inf)  # max() would lose a NaN
    return max(shares, default=None)


def _sent_bytes() -> dict[str, float]:
    """Return the bytes that this node has sent over its port and over `lo`."""
    found = {"inter": 0.0, "intra": 0.0}
    for line in Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()[2:]:
        name, _, numbers = line.partition(":")
        link = {PORT: "inter", "lo": "intra"}.get(name.strip())
        if link is not None:
            found[link] = float(numbers.split()[8])
    return found
