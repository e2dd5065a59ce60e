"""The policy `search`: orders, unequal chunks, and weight gradients apart from data gradients.

Read `policies.py` first. Within one layer the staged order is nearly the best when a gather takes
as long as a scatter; what is left is the gap between the last gather and the first scatter, the
filling and draining of the pipeline, and weight gradients that make rows wait. The search starts
from the best interleaved plans, tries all of these around them, and ends with swaps of neighbours
in a lane and with larger and smaller chunks, as long as these help.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

from gatewise.moe.planning.policies import (
    Pass,
    Problem,
    Window,
    best_pass,
    dense_ms,
    interleave,
    pass_graph,
    staged_groups,
    staged_pass,
    windows,
)
from gatewise.parallel.schedule.orders import grouped_order, nested_sequences, reordered_plan
from gatewise.parallel.schedule.plan import Lane, Plan, Task, ordered_plan

__all__ = ["search_passes"]

_STARTS = 3  # best (degree, window) pairs that are looked at closely
_EXHAUSTIVE = 3  # chunks up to which every order of a pair of stages is tried
_SWAPS = 200  # predictions of the last phase
_SMALL = 0.5  # size of a small first or last chunk beside the others
_SIZES = (0.6, 0.85, 1.2, 1.6)  # of a chunk beside what it was, in the last phase
_RESIZES = 400  # predictions of that


def search_passes(problem: Problem) -> dict[str, Pass]:
    """Return the best forward and backward pass that the search finds."""
    return {name: _search(problem, name) for name in ("forward", "backward")}


def _search(problem: Problem, name: str) -> Pass:
    options: list[Window | None] = [None]
    if name == "backward":
        options = list(windows(problem, dense_ms(problem)))
    starts = []
    for window, chunks in product(options, range(1, problem.max_chunks + 1)):
        base = staged_pass(problem, name, chunks, window=window)
        tried = [base, *_lagged(base, name)]
        best = best_pass(tried, problem.interference)
        starts.append((best.total_ms(problem.interference), chunks, window, best))
    starts.sort(key=lambda start: start[0])
    near = [start[3] for start in starts[:_STARTS]]
    for _, chunks, window, _best in starts[:_STARTS]:
        near += _variants(problem, name, chunks, window)
    return _swap(_resize(_swap(best_pass(near, problem.interference), problem), problem), problem)


def _lagged(base: Pass, name: str) -> Iterator[Pass]:
    chunks = base.plan.chunks
    for near in range(1, min(chunks, 4)):
        for far in sorted({near, chunks}):
            yield Pass(base.graph, interleave(base, name, (near, far)), base.amounts)


def _variants(problem: Problem, name: str, chunks: int, window: Window | None) -> Iterator[Pass]:
    """Yield other cuts and orders of the same degree."""
    for split, shares in product((False, True), _cuts(chunks)):
        if split and name == "forward":
            continue
        graph, amounts = pass_graph(problem, name, window=window, split_weights=split)
        order = grouped_order(graph, chunks, staged_groups(graph, split_weights=split))
        base = Pass(graph, ordered_plan(graph, chunks, order, shares=shares), amounts)
        yield base
        yield from _nested(base, name) if chunks <= _EXHAUSTIVE else _lagged(base, name)


def _cuts(chunks: int) -> list[tuple[float, ...]]:
    """Return equal chunks, and such with a small first, last, or first and last one."""
    cuts: list[tuple[float, ...]] = [()]
    if chunks < 2:
        return cuts
    for first, last in ((_SMALL, 1.0), (1.0, _SMALL), (_SMALL, _SMALL)):
        weights = [first, *[1.0] * (chunks - 2), last]
        if chunks == 2 and first == last:
            continue
        cuts.append(tuple(weight / sum(weights) for weight in weights))
    return cuts


def _nested(base: Pass, name: str) -> Iterator[Pass]:
    pairs = [("gather", "scatter"), ("dispatch", "collect")]
    if name == "backward":
        pairs = [("scatter_grad", "gather_grad"), ("collect_grad", "dispatch_grad")]
    orders = [
        list(nested_sequences(*pair, base.plan.chunks)) for pair in pairs if pair[0] in base.amounts
    ]
    for sequences in product(*orders):
        yield Pass(base.graph, reordered_plan(base.plan, sequences), base.amounts)


def _swap(start: Pass, problem: Problem) -> Pass:
    """Swap neighbours in the lanes while that shortens the prediction."""
    best, least = start, start.total_ms(problem.interference)
    left = _SWAPS
    improved = True
    while improved and left > 0:
        improved = False
        for lane, place in _places(best.plan):
            left -= 1
            if left <= 0:
                break
            candidate = Pass(best.graph, _swapped(best.plan, lane, place), best.amounts)
            try:
                ms = candidate.total_ms(problem.interference)
            except ValueError:  # the swap contradicts the dependencies
                continue
            if ms < least * (1 - 1e-6):
                best, least, improved = candidate, ms, True
                break
    return best


def _resize(start: Pass, problem: Problem) -> Pass:
    """Make single chunks larger or smaller while that shortens the prediction."""
    best, least = start, start.total_ms(problem.interference)
    chunks = start.plan.chunks
    left = _RESIZES if chunks > 1 else 0
    improved = True
    while improved and left > 0:
        improved = False
        for chunk, size in product(range(chunks), _SIZES):
            left -= 1
            if left <= 0:
                break
            weights = list(best.plan.shares or [1.0 / chunks] * chunks)
            weights[chunk] *= size
            shares = tuple(weight / sum(weights) for weight in weights)
            candidate = Pass(best.graph, replace(best.plan, shares=shares), best.amounts)
            ms = candidate.total_ms(problem.interference)
            if ms < least * (1 - 1e-6):
                best, least, improved = candidate, ms, True
    return best


def _places(plan: Plan) -> list[tuple[Lane, int]]:
    return [(lane, i) for lane, tasks in plan.lanes.items() for i in range(len(tasks) - 1)]


def _swapped(plan: Plan, lane: Lane, place: int) -> Plan:
    tasks: list[Task] = list(plan.lanes[lane])
    tasks[place], tasks[place + 1] = tasks[place + 1], tasks[place]
    lanes: Mapping[Lane, tuple[Task, ...]] = {**plan.lanes, lane: tuple(tasks)}
    return replace(plan, lanes=lanes)
