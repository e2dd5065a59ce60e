"""Scheduling policies: what a block costs -> the plans of its two passes.

Read `block.py` first. Each policy is one way to order and cut the same tasks:

    serial         nothing overlaps
    tutel          one lane for all communication, one degree for both passes; arXiv:2206.03382
    pipemoe_lina   the same with gradient sums in pieces of a fixed size; arXiv:2210.17223
    fsmoe_no_iio   one lane, own degrees, gradient sums in idle windows; arXiv:2501.10714
    fsmoe          three lanes, staged order, windows filled greedily; arXiv:2501.10714
    interleaved    fsmoe with scatters (and collects) between the gathers (and dispatches)
    search, whole_block, paired    see `search.py` and `whole.py`

A policy enumerates its degrees and orders, and keeps what the simulator predicts to be shortest.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gatewise.moe.planning.block import (
    BACKWARD_TABLE,
    FORWARD_TABLE,
    REDUCE_STAGES,
    BlockWork,
    stages_of,
)
from gatewise.parallel.schedule.cost import Amount, Interference
from gatewise.parallel.schedule.orders import (
    grouped_order,
    lagged_sequence,
    list_plan,
    reordered_plan,
)
from gatewise.parallel.schedule.plan import (
    LANES,
    Lane,
    Plan,
    StageGraph,
    Task,
    blocking_plan,
    ordered_plan,
)
from gatewise.parallel.schedule.timeline import Program, Timeline

__all__ = [
    "LAYER_POLICIES",
    "Pass",
    "Problem",
    "Proposal",
    "Window",
    "best_pass",
    "bound_ms",
    "pass_graph",
    "propose_layer",
    "staged_groups",
]

_PIECE_BYTES = 30e6  # of Lina's gradient sums
_ONE_LANE: Mapping[Lane, Lane] = {"intra": "inter"}


@dataclass(frozen=True, slots=True)
class Problem:
    """What a policy is asked: one block, how it may be cut, and what goes on around it."""

    work: BlockWork
    interference: Interference
    max_chunks: int = 8
    blocks: int = 1  # equal blocks in a row, for policies that look beyond one
    sequences: int = 1  # of a micro-batch: whole blocks are cut between sequences
    micro_batches: int = 1  # of a step on this rank
    reduce: bool = True  # gradients are summed in this backward pass

    def __post_init__(self) -> None:
        for name in ("max_chunks", "blocks", "sequences", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def reduce_amount(self) -> Amount:
        """The gradient sum of one block, of no size where there is none."""
        whole = self.work.reduce
        return whole if self.reduce else Amount(whole.cost, 0.0)


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass: its stages, its plan and the amount of work of each stage."""

    graph: StageGraph
    plan: Plan
    amounts: Mapping[str, Amount]

    def ms(self, task: Task) -> float:
        """Return the time of a task with nothing beside it."""
        return self.amounts[task.stage].ms(self.plan.share(self.graph, task))

    def timeline(self, interference: Interference) -> Timeline:
        """Return the predicted timeline."""
        program = Program(self.graph, self.plan)
        return program.play([self.ms(task) for task in program.tasks], interference)

    def total_ms(self, interference: Interference) -> float:
        """Return the predicted time."""
        program = Program(self.graph, self.plan)
        return program.total_ms([self.ms(task) for task in program.tasks], interference)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a policy proposes, and what is predicted of it; times are of one block, both passes."""

    policy: str
    passes: Mapping[str, Pass]  # "forward" and "backward", or "pair"
    blocks: int  # blocks that each pass spans
    predicted_ms: float
    exposed_ms: float  # communication that no computation covers
    bound_ms: float  # what no schedule can beat: the fullest resource
    note: str = ""

    @property
    def gap(self) -> float:
        """Share by which the prediction is above the bound."""
        return self.predicted_ms / self.bound_ms - 1 if self.bound_ms else 0.0

    def chunks(self, name: str) -> int:
        """Return the number of chunks of "forward" or "backward"."""
        return (self.passes.get(name) or self.passes["pair"]).plan.chunks

    @staticmethod
    def of(
        policy: str,
        passes: Mapping[str, Pass],
        problem: Problem,
        *,
        blocks: int = 1,
        note: str = "",
    ) -> "Proposal":
        """Predict what a policy proposes."""
        lines = [item.timeline(problem.interference) for item in passes.values()]
        return Proposal(
            policy,
            passes,
            blocks,
            sum(line.total_ms for line in lines) / blocks,
            sum(line.exposed_ms() for line in lines) / blocks,
            bound_ms(problem),
            note,
        )


def bound_ms(problem: Problem) -> float:
    """Return the time that the fullest lane needs for one block, whatever the schedule."""
    work = problem.work
    lanes = dict.fromkeys(LANES, 0.0)
    for table, amounts in ((FORWARD_TABLE, work.forward), (BACKWARD_TABLE, work.backward)):
        for stage in stages_of(table, amounts, exchange=work.exchange):
            lanes[stage.lane] += amounts[stage.name].least_ms(problem.max_chunks)
    # slices of a gradient sum may be smaller than anybody cuts them
    reduce = problem.reduce_amount
    lanes["inter"] += min(reduce.ms(), reduce.least_ms(problem.max_chunks))
    return max(lanes.values())


@dataclass(frozen=True, slots=True)
class Window:
    """Where the gradient sum of the block before goes, as shares of its bytes."""

    layer: float = 0.0  # between the last dispatch and the first collect
    dense: float = 0.0  # beside attention's backward pass
    end: float = 0.0  # behind everything


def pass_graph(
    problem: Problem,
    name: str,
    *,
    window: Window | None = None,
    split_weights: bool = False,
    slices: int = 1,
) -> tuple[StageGraph, dict[str, Amount]]:
    """Return the stages and amounts of one pass of one block.

    Args:
        problem: the block.
        name: "forward" or "backward".
        window: where the gradient sum goes; None leaves it out.
        split_weights: rows may travel on before the weight gradients are done.
        slices: pieces of each part of the gradient sum.
    """
    work = problem.work
    if name == "forward":
        amounts = dict(work.forward)
        table = FORWARD_TABLE
    else:
        amounts, table = dict(work.backward), BACKWARD_TABLE
        reduce = problem.reduce_amount
        shares = (window.layer, window.dense, window.end) if window else (0.0, 0.0, 0.0)
        for stage, share in zip(REDUCE_STAGES, shares, strict=True):
            if share * reduce.size > 0:
                amounts[stage] = Amount(reduce.cost, reduce.size * share)
    stages = stages_of(
        table, amounts, exchange=work.exchange, split_weights=split_weights, slices=slices
    )
    return StageGraph(stages), amounts


def staged_groups(graph: StageGraph, *, split_weights: bool = False) -> list[list[str]]:
    """Return each stage alone; the gradients of data and weights together, where unsplit."""
    groups: list[list[str]] = []
    for stage in graph.stages:
        if stage.name == "experts_weights" and not split_weights:
            groups[-1].append(stage.name)
        else:
            groups.append([stage.name])
    return groups


def _lane_groups(graph: StageGraph) -> list[list[str]]:
    """Return neighbouring communication stages together: on one lane they run chunk by chunk."""
    groups: list[list[str]] = []
    moving = False
    for group in staged_groups(graph):
        stage = graph.stage(group[0])
        moves = stage.lane != "compute" and not stage.shares
        if moves and moving:
            groups[-1] += group
        else:
            groups.append(group)
        moving = moves
    return groups


def one_lane_pass(
    problem: Problem, name: str, chunks: int, *, window: Window | None = None
) -> Pass:
    """Return a pass in which both kinds of communication take turns in one lane."""
    graph, amounts = pass_graph(problem, name, window=window)
    order = grouped_order(graph, chunks, _lane_groups(graph))
    return Pass(graph, ordered_plan(graph, chunks, order, merge=_ONE_LANE), amounts)


def staged_pass(problem: Problem, name: str, chunks: int, *, window: Window | None = None) -> Pass:
    """Return a pass in the staged order on three lanes."""
    graph, amounts = pass_graph(problem, name, window=window)
    order = grouped_order(graph, chunks, staged_groups(graph))
    return Pass(graph, ordered_plan(graph, chunks, order), amounts)


def interleaved_pass(
    problem: Problem, name: str, chunks: int, lags: tuple[int, int], window: Window | None = None
) -> Pass:
    """Return the staged pass with the scatters of early chunks between the gathers of late ones.

    Args:
        problem: the block.
        name: "forward" or "backward".
        chunks: degree.
        lags: a chunk's scatter follows the gather of the chunk so much later; the same of collect
            and dispatch.
        window: where the gradient sum goes.
    """
    base = staged_pass(problem, name, chunks, window=window)
    return Pass(base.graph, interleave(base, name, lags), base.amounts)


def interleave(base: Pass, name: str, lags: tuple[int, int]) -> Plan:
    """Return a staged plan with two pairs of stages interleaved."""
    chunks = base.plan.chunks
    near, far = ("gather", "scatter"), ("dispatch", "collect")
    if name == "backward":
        near, far = ("scatter_grad", "gather_grad"), ("collect_grad", "dispatch_grad")
    return reordered_plan(
        base.plan,
        [
            lagged_sequence(*names, chunks, lag)
            for names, lag in ((near, lags[0]), (far, lags[1]))
            if names[0] in base.amounts
        ],
    )


def best_pass(candidates: Iterable[Pass], interference: Interference) -> Pass:
    """Return the pass with the shortest prediction; the first of equal ones."""
    best: Pass | None = None
    least = 0.0
    for candidate in candidates:
        try:
            ms = candidate.total_ms(interference)
        except ValueError:  # this order contradicts the dependencies
            continue
        if best is None or ms < least - 1e-9:
            best, least = candidate, ms
    assert best is not None
    return best


def windows(problem: Problem, dense_ms: float) -> list[Window]:
    """Return the ways to place the gradient sum that can be best.

    All beside attention; beside attention as much as fits there and the rest in the layer's
    window; all in the layer's window. The degree that goes with each is enumerated.

    Args:
        problem: the block.
        dense_ms: how long the inter lane is idle beside attention's backward pass.
    """
    reduce = problem.reduce_amount
    if not reduce.size:
        return [Window()]
    fits = min(1.0, reduce.cost.inverse(dense_ms) / reduce.size)
    options = [Window(dense=1.0), Window(layer=1.0)]
    if 0 < fits < 1:
        options.append(Window(layer=1.0 - fits, dense=fits))
    return options


def dense_ms(problem: Problem) -> float:
    """Return the time of attention's backward pass with what surrounds it."""
    names = ("attention_scatter_grad", "attention_grad", "attention_weights")
    amounts = problem.work.backward
    return sum(amounts[name].ms() for name in names if name in amounts)


def _degrees(problem: Problem) -> range:
    return range(1, problem.max_chunks + 1)


def _serial(problem: Problem) -> dict[str, Pass]:
    passes = {}
    for name in ("forward", "backward"):
        graph, amounts = pass_graph(problem, name, window=Window(end=1.0))
        passes[name] = Pass(graph, blocking_plan(graph), amounts)
    return passes


def _tutel(problem: Problem) -> dict[str, Pass]:
    return _one_degree(
        problem, lambda name, r: one_lane_pass(problem, name, r, window=Window(end=1.0))
    )


def _pipemoe_lina(problem: Problem) -> dict[str, Pass]:
    pieces = max(1, round(problem.reduce_amount.size / _PIECE_BYTES))

    def make(name: str, chunks: int) -> Pass:
        if name == "forward":
            return one_lane_pass(problem, name, chunks)
        graph, amounts = pass_graph(problem, name, window=Window(layer=1.0), slices=pieces)

        def ms(task: Task) -> float:
            share = graph.stage(task.stage).shares
            return amounts[task.stage].ms(share[task.chunk] if share else 1.0 / chunks)

        plan = list_plan(graph, chunks, ms, fillers=REDUCE_STAGES, merge=_ONE_LANE)
        return Pass(graph, plan, amounts)

    return _one_degree(problem, make)


def _one_degree(problem: Problem, make: Callable[[str, int], Pass]) -> dict[str, Pass]:
    """Return both passes at the degree that is best for their sum."""

    def both(chunks: int) -> dict[str, Pass]:
        return {name: make(name, chunks) for name in ("forward", "backward")}

    def total(passes: Mapping[str, Pass]) -> float:
        return sum(item.total_ms(problem.interference) for item in passes.values())

    return min(map(both, _degrees(problem)), key=total)


def _two_degrees(
    problem: Problem, make: Callable[[str, int, Window | None], Iterable[Pass]]
) -> dict[str, Pass]:
    """Return each pass at its own best degree, with the gradient sum where it costs least."""
    options: Sequence[Window] = windows(problem, dense_ms(problem))

    def candidates(name: str) -> Iterator[Pass]:
        for window in options if name == "backward" else (None,):
            for chunks in _degrees(problem):
                yield from make(name, chunks, window)

    return {
        name: best_pass(candidates(name), problem.interference) for name in ("forward", "backward")
    }


def _fsmoe_no_iio(problem: Problem) -> dict[str, Pass]:
    return _two_degrees(
        problem, lambda name, r, window: [one_lane_pass(problem, name, r, window=window)]
    )


def _fsmoe(problem: Problem) -> dict[str, Pass]:
    return _two_degrees(
        problem, lambda name, r, window: [staged_pass(problem, name, r, window=window)]
    )


def _interleaved(problem: Problem) -> dict[str, Pass]:
    def make(name: str, chunks: int, window: Window | None) -> Iterator[Pass]:
        base = staged_pass(problem, name, chunks, window=window)
        yield base
        for near in range(1, min(chunks, 4)):
            for far in {near, chunks}:
                yield Pass(base.graph, interleave(base, name, (near, far)), base.amounts)

    return _two_degrees(problem, make)


LAYER_POLICIES: Mapping[str, Callable[[Problem], dict[str, Pass]]] = {
    "serial": _serial,
    "tutel": _tutel,
    "pipemoe_lina": _pipemoe_lina,
    "fsmoe_no_iio": _fsmoe_no_iio,
    "fsmoe": _fsmoe,
    "interleaved": _interleaved,
}


def propose_layer(policy: str, problem: Problem) -> Proposal:
    """Return what a policy of layer scope proposes for one block."""
    return Proposal.of(policy, LAYER_POLICIES[policy](problem), replace(problem))
