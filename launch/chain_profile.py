"""The costs of the five-task chain: measured on its own groups, and put together as a problem.

Read `bench_chain.py`, `parallel/schedule/profiler.py` and `moe/planning/policies.py` first.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gatewise.launch.bench_chain import (
    MATRICES,
    ChainGroups,
    EmulatedExpert,
    Expert,
    RealExpert,
)
from gatewise.moe.planning.block import BlockWork
from gatewise.moe.planning.policies import Problem
from gatewise.parallel.schedule.cost import Amount, Cost
from gatewise.parallel.schedule.executor import Lanes
from gatewise.parallel.schedule.probes import collective_probes, compute_probes, drop, sweep
from gatewise.parallel.schedule.profiler import Meter, Probe, Run
from gatewise.parallel.schedule.profiles import Layout, Profile

__all__ = ["NUMBER_BYTES", "ChainSize", "make_expert", "make_problem", "measure_profile"]

NUMBER_BYTES = 4  # fp32
_EXPERT_PARTS = ("experts", "experts_data", "experts_weights")


@dataclass(frozen=True, slots=True)
class ChainSize:
    """How large the chain is."""

    nodes: int
    ranks_per_node: int
    width: int
    expert_width: int  # of the whole expert
    device_gmacs: float  # of the emulated device
    seed: int = 0

    @property
    def peers(self) -> int:
        """Ranks whose rows an expert gets."""
        return self.nodes * self.ranks_per_node

    @property
    def inner(self) -> int:
        """Width of an expert on one rank."""
        return self.expert_width // self.ranks_per_node

    @property
    def layout(self) -> Layout:
        """The layout that a profile must be of."""
        return Layout(self.peers, self.ranks_per_node, self.nodes, self.ranks_per_node)

    def plain_bytes(self, tokens: int) -> int:
        """Return the bytes of a rank's rows."""
        return tokens * self.width * NUMBER_BYTES

    def product(self, tokens: int) -> int:
        """Return the multiply-adds of one matrix product over all rows gathered here."""
        return tokens * self.ranks_per_node * self.width * self.inner


def make_expert(size: ChainSize, compute: str, tokens: int, rank: int) -> Expert:
    """Return the expert of a rank.

    Args:
        size: of the chain.
        compute: "emulated" or "real".
        tokens: rows of each rank.
        rank: this one; ranks of a node hold different parts.
    """
    if compute == "emulated":
        seconds = MATRICES * size.width * size.inner / (size.device_gmacs * 1e9)
        return EmulatedExpert(size.peers, seconds)
    generator = torch.Generator().manual_seed(size.seed + rank)
    return RealExpert(size.peers, tokens // size.nodes, size.width, size.inner, generator)


def measure_profile(
    size: ChainSize,
    groups: ChainGroups,
    lanes: Lanes,
    expert: Expert,
    *,
    tokens: int,
    gradient_bytes: int,
    source: str,
    progress: Callable[[str], None],
) -> Profile:
    """Measure every operation up to `tokens` rows; all ranks at once.

    Args:
        size: of the chain.
        groups: who talks to whom.
        lanes: those of the trials.
        expert: that of the trials.
        tokens: most rows of a rank.
        gradient_bytes: most bytes of a gradient sum; 0: as many as the rows have.
        source: what is kept in the profile about its making.
        progress: gets a line for each operation.
    """
    plain = size.plain_bytes(tokens)
    gathered = plain * size.ranks_per_node
    product = size.product(tokens)
    moved = {
        "all_to_all": plain,
        "all_gather": gathered,
        "reduce_scatter": gathered,
        "all_reduce": gradient_bytes or plain,
    }
    probes = collective_probes(
        groups.exchange, groups.node, groups.gradients, width=size.width, largest=moved
    )
    probes |= compute_probes(width=size.width, largest={"attention": product, "memory": plain})
    probes |= _expert_probes(size, expert, tokens)
    if isinstance(expert, EmulatedExpert):
        probes["attention"] = _emulated(probes["attention"], size.device_gmacs)
    meter = Meter(groups.control, lanes)
    costs: dict[str, Cost] = {}
    for name, probe in probes.items():
        cost = meter.cost(probe)
        costs[name] = cost.scaled(1 / MATRICES) if name in _EXPERT_PARTS else cost
        ms = cost.ms(max(probe.sizes))
        progress(f"{name:<16}{ms:8.1f} ms at most, R2 {cost.r2:.4f}")
    chunk = {
        name: Probe(probe.lane, (max(probe.sizes) / 4,), probe.prepare)
        for name, probe in probes.items()
    }
    interference = meter.interference(
        {"compute": chunk["experts"], "intra": chunk["all_gather"], "inter": chunk["all_to_all"]}
    )
    return Profile(size.layout, costs, interference, source)


def _expert_probes(size: ChainSize, expert: Expert, tokens: int) -> dict[str, Probe]:
    """Return the probes of an expert's parts; sizes are of one of its products."""
    per_row = size.peers * size.width * size.inner

    def rows_of(wanted: float) -> tuple[slice, torch.Tensor]:
        count = max(1, round(wanted / per_row))
        return slice(0, count), torch.zeros(size.ranks_per_node, size.nodes, count, size.width)

    def forward(wanted: float) -> tuple[float, Run]:
        rows, x_sntD = rows_of(wanted)
        return float(rows.stop * per_row), lambda: drop(expert.forward(x_sntD, rows))

    def data(wanted: float) -> tuple[float, Run]:
        rows, x_sntD = rows_of(wanted)
        return float(rows.stop * per_row), lambda: drop(expert.data(x_sntD, rows))

    def weights(wanted: float) -> tuple[float, Run]:
        rows, x_sntD = rows_of(wanted)
        expert.data(x_sntD, rows)
        return float(rows.stop * per_row), lambda: expert.weights(rows)

    sizes = sweep(tokens // size.nodes * per_row)
    return {
        name: Probe("compute", sizes, prepare)
        for name, prepare in zip(_EXPERT_PARTS, (forward, data, weights), strict=True)
    }


def _emulated(probe: Probe, gmacs: float) -> Probe:
    """Return a computation that sleeps as long as the device of the experts would take."""
    return Probe(
        "compute", probe.sizes, lambda size: (size, lambda: time.sleep(size / (gmacs * 1e9)))
    )


def make_problem(
    size: ChainSize,
    profile: Profile,
    *,
    tokens: int,
    gradient_bytes: int,
    max_chunks: int,
    passes: Sequence[str],
) -> Problem:
    """Return what a policy is asked: the chain's stages with their costs.

    Args:
        size: of the chain.
        profile: the costs.
        tokens: rows of a rank.
        gradient_bytes: of the gradient that is summed in the backward pass; 0: none.
        max_chunks: most chunks of a pass.
        passes: "forward", "backward" or both; the other one has no work.
    """
    costs, plain = profile.costs, size.plain_bytes(tokens)
    gathered = plain * size.ranks_per_node if size.ranks_per_node > 1 else 0
    exchange = Amount(costs["all_to_all"], plain)
    gather = Amount(costs["all_gather"], gathered)
    scatter = Amount(costs["reduce_scatter"], gathered)
    experts, data, weights = (
        Amount(costs.get(name, costs["experts"]).scaled(MATRICES), size.product(tokens))
        for name in _EXPERT_PARTS
    )
    forward = {
        "dispatch": exchange,
        "gather": gather,
        "experts": experts,
        "scatter": scatter,
        "collect": exchange,
    }
    backward = {
        "collect_grad": exchange,
        "scatter_grad": gather,
        "experts_data": data,
        "experts_weights": weights,
        "gather_grad": scatter,
        "dispatch_grad": exchange,
    }
    work = BlockWork(
        {name: a for name, a in forward.items() if a.size and "forward" in passes},
        {name: a for name, a in backward.items() if a.size and "backward" in passes},
        Amount(costs["all_reduce"], gradient_bytes if "backward" in passes else 0),
        "inter",
    )
    return Problem(work, profile.interference, max_chunks)
