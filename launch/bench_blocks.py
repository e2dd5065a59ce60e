"""Whole blocks of a training step on emulated nodes: attention, experts and gradient sums.

Read `bench_chain.py` and `moe/planning/block.py` first. Policies such as `whole_block` look beyond
one layer, so what runs here are all stages of all blocks. Every communication stage moves as many
bytes between the same ranks as a model would, and every computation sleeps as long as the emulated
device would compute; the bytes mean nothing, so there are no results to compare. What the chain
shows with real rows, it shows for each layer of experts alone.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.launch.bench_chain import ChainGroups
from gatewise.launch.chain_profile import NUMBER_BYTES, ChainSize
from gatewise.moe.planning.block import REDUCE_STAGES, Workload, block_work
from gatewise.moe.planning.policies import Pass, Problem
from gatewise.moe.planning.shapes import ModelShape
from gatewise.parallel.schedule.executor import Lanes, PlanRunner
from gatewise.parallel.schedule.plan import Task
from gatewise.parallel.schedule.probes import collective_probes
from gatewise.parallel.schedule.profiler import Run
from gatewise.parallel.schedule.profiles import Profile
from gatewise.parallel.schedule.recorder import Recorder

__all__ = ["Blocks", "PreparedBlocks", "make_blocks_problem"]

_HEADS = 4
_OPERATION = {
    **dict.fromkeys(("dispatch", "collect", "collect_grad", "dispatch_grad"), "all_to_all"),
    **dict.fromkeys(
        ("gather", "scatter_grad", "block_gather", "attention_scatter_grad"), "all_gather"
    ),
    **dict.fromkeys(
        ("scatter", "gather_grad", "attention_scatter", "block_gather_grad"), "reduce_scatter"
    ),
    **dict.fromkeys(REDUCE_STAGES, "all_reduce"),
}


def make_blocks_problem(
    size: ChainSize, profile: Profile, *, tokens: int, blocks: int, sequences: int, max_chunks: int
) -> Problem:
    """Return what a policy is asked: equal blocks in a row, whose experts get `tokens` rows a rank.

    Args:
        size: width of rows and experts.
        profile: the costs.
        tokens: rows that each rank sends to experts.
        blocks: of the model.
        sequences: of the micro-batch that the ranks of a node share.
        max_chunks: most chunks of a pass.
    """
    top_k = min(2, size.nodes)
    shape = ModelShape(
        name="blocks",
        source="settings of a benchmark",
        layers=blocks,
        hidden=size.width,
        vocab=1,
        heads=_HEADS,
        kv_heads=_HEADS,
        head_dim=max(1, size.width // _HEADS),
        experts=size.nodes,
        top_k=top_k,
        expert_width=size.expert_width,
        matrices=2,
    )
    length = max(1, tokens * size.ranks_per_node // (top_k * sequences))
    work = block_work(
        shape,
        profile,
        Workload(sequences, length, activation_bytes=NUMBER_BYTES, gradient_bytes=NUMBER_BYTES),
    )
    return Problem(work, profile.interference, max_chunks, blocks=blocks, sequences=sequences)


@dataclass(frozen=True, slots=True)
class PreparedBlocks:
    """A pass over all blocks: its runner, what each task does, and how often it is repeated."""

    runner: PlanRunner
    work: Mapping[Task, Run]
    repeats: int


class Blocks:
    """The blocks of one rank.

    Args:
        groups: who talks to whom.
        lanes: where communication runs.
        size: width of rows.
        blocks: how many.
    """

    def __init__(self, groups: ChainGroups, lanes: Lanes, size: ChainSize, blocks: int) -> None:
        self._lanes, self._blocks = lanes, blocks
        nothing = dict.fromkeys(_OPERATION.values(), 1.0)
        self._probes = collective_probes(
            groups.exchange, groups.node, groups.gradients, width=size.width, largest=nothing
        )
        self._known: dict[tuple[str, float], Run] = {}  # a lane runs one of them at a time

    def start(self) -> None:
        """Do nothing: there are no gradients to forget."""

    def gradients(self, *, with_sum: bool) -> list[Tensor]:
        """Return nothing: the bytes have no meaning."""
        return []

    def prepare(self, item: Pass, blocks: int) -> PreparedBlocks:
        """Make a planned pass ready.

        Args:
            item: the pass.
            blocks: that it spans.
        """
        work = {task: self._work(item, task) for task in item.graph.tasks(item.plan.chunks)}
        runner = PlanRunner(item.graph, item.plan)
        return PreparedBlocks(runner, work, self._blocks // blocks)

    def run(self, _name: str, item: PreparedBlocks, recorder: Recorder | None = None) -> Tensor:
        """Run a pass over all blocks."""

        def run(task: Task) -> None:
            item.work[task]()

        for _ in range(item.repeats):
            item.runner.run(run, lanes=self._lanes, recorder=recorder)
        return torch.empty(0)

    def _work(self, item: Pass, task: Task) -> Run:
        operation = _OPERATION.get(task.stage.rpartition(".")[2])
        if operation is None:
            seconds = 1e-3 * item.ms(task)
            return lambda: time.sleep(seconds)
        size = item.amounts[task.stage].size * item.plan.share(item.graph, task)
        key = operation, round(size)
        if key not in self._known:
            self._known[key] = self._probes[operation].prepare(size)[1]
        return self._known[key]
