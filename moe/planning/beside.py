"""Blocks in a row, and parts of a micro-batch that go through them side by side in a fixed order.

Read `policies.py`, `moe/turns.py` and `moe/side_by_side.py` first: this is `whole_block` as
training runs it. One thread leads all parts, so the order of all tasks is known, and so is what
waits for what: the prediction is of exactly that order.
"""

from collections.abc import Iterator

from gatewise.moe.planning.block import BACKWARD_TABLE, FORWARD_TABLE, stages_of
from gatewise.moe.planning.policies import Pass, Problem, Proposal
from gatewise.moe.turns import turns
from gatewise.parallel.schedule.cost import Amount
from gatewise.parallel.schedule.plan import LANES, Lane, Plan, Stage, StageGraph, Task

__all__ = ["beside_pass", "chain", "propose_beside"]

# The stages of each step of a part, and of what goes before it enters a block: `moe/turns.py`.
_FORWARD = {
    "enter": ("attention", "attention_scatter"),
    "send": ("order", "dispatch", "shared"),
    "gather": ("gather",),
    "work": ("experts", "scatter"),
    "collect": ("collect",),
}
_ARRIVE = ("combine", "block_gather")
# Autograd takes the steps in the reverse order.
_BACKWARD = {
    "collect": ("scatter_grad",),
    "work": ("experts_data", "gather_grad", "experts_weights"),
    "gather": ("dispatch_grad",),  # without split experts: in the step before
    "send": ("shared_grad", "order_grad"),
    "enter": ("attention_scatter_grad", "attention_grad", "attention_weights"),
}
_ARRIVE_GRAD = ("block_gather_grad", "combine_grad", "collect_grad")
# Rows of attention, for which who leads all parts waits at once.
_AT_ONCE = frozenset(
    ("attention_scatter", "block_gather", "block_gather_grad", "attention_scatter_grad")
)


def propose_beside(problem: Problem) -> list[Proposal]:
    """Return what is predicted of every number of parts that divides the sequences.

    Args:
        problem: with the blocks of the whole model, and the sequences of a micro-batch.

    Returns:
        Proposals of the policy `whole_block`; the chunks of their plans are the parts. None where
        there is but one sequence.
    """
    proposals = []
    for parts in range(2, min(problem.max_chunks, problem.sequences) + 1):
        if problem.sequences % parts:
            continue
        passes = {name: beside_pass(problem, name, parts) for name in ("forward", "backward")}
        proposals.append(Proposal.of("whole_block", passes, problem, blocks=problem.blocks))
    return proposals


def chain(
    problem: Problem, name: str, *, prefix: str = "", slices: int = 1
) -> tuple[list[Stage], dict[str, Amount]]:
    """Return the stages of all blocks in a row, each stage cut as the plan says.

    Args:
        problem: with the number of blocks.
        name: "forward" or "backward", whose block 0 is the last one of the model.
        prefix: before the number of the block in every name, as "f" in "f0.attention".
        slices: pieces of every gradient sum.
    """
    work = problem.work
    own = dict(work.forward if name == "forward" else work.backward)
    table = FORWARD_TABLE if name == "forward" else BACKWARD_TABLE
    reduce = problem.reduce_amount
    if name == "backward" and reduce.size:
        own["reduce_end"] = reduce
    stages: list[Stage] = []
    amounts: dict[str, Amount] = {}
    before: tuple[str, ...] = ()
    for block in range(problem.blocks):
        label = f"{prefix}{block}."
        made = stages_of(
            table,
            own,
            exchange=work.exchange,
            whole=True,
            split_weights=True,
            slices=slices,
            prefix=label,
            before=before,
        )
        stages += made
        amounts |= {label + stage: amount for stage, amount in own.items()}
        before = (made[-1].name if name == "forward" else f"{label}attention_grad",)
    return stages, amounts


def beside_pass(problem: Problem, name: str, parts: int) -> Pass:
    """Return a pass of all blocks in the order of parts side by side.

    Args:
        problem: with the number of blocks.
        name: "forward" or "backward".
        parts: of a micro-batch, equally large.
    """
    stages, amounts = chain(problem, name)
    graph = StageGraph(tuple(stages))
    have = {stage.name: stage.count(parts) for stage in stages}
    tasks = _forward_tasks if name == "forward" else _backward_tasks
    is_sharded = "gather" in problem.work.forward
    lanes: dict[Lane, list[Task]] = {lane: [] for lane in LANES}
    for task in tasks(problem.blocks, parts, is_sharded=is_sharded):
        if task.chunk < have.get(task.stage, 0):
            waited = task.stage.partition(".")[2] in _AT_ONCE
            lanes["compute" if waited else graph.stage(task.stage).lane].append(task)
    plan = Plan(parts, {lane: tuple(listed) for lane, listed in lanes.items()})
    return Pass(graph, plan, amounts)


def _forward_tasks(blocks: int, parts: int, *, is_sharded: bool) -> Iterator[Task]:
    """Yield all tasks of the forward pass in order, also of stages that there may not be."""
    for turn in turns(blocks, parts, is_sharded=is_sharded):
        if turn.step == "enter" and turn.block:
            yield from _tasks(turn.block - 1, _ARRIVE, turn.part)
        yield from _tasks(turn.block, _FORWARD[turn.step], turn.part)
    for part in range(parts):
        yield from _tasks(blocks - 1, _ARRIVE, part)


def _backward_tasks(blocks: int, parts: int, *, is_sharded: bool) -> Iterator[Task]:
    """Yield those of the backward pass, whose block 0 and part 0 are the last of the forward."""
    for part in range(parts):
        yield from _tasks(0, _ARRIVE_GRAD, part)
    for turn in reversed(list(turns(blocks, parts, is_sharded=is_sharded))):
        block, part = blocks - 1 - turn.block, parts - 1 - turn.part
        yield from _tasks(block, _BACKWARD[turn.step], part)
        if turn.step == "enter":
            if turn.block:
                yield from _tasks(block + 1, _ARRIVE_GRAD, part)
            if part == parts - 1:  # the block's gradients are there: full buckets leave
                yield from _tasks(block, ("reduce_end",), 0)


def _tasks(block: int, stages: tuple[str, ...], part: int) -> Iterator[Task]:
    for stage in stages:
        yield Task(f"{block}.{stage}", part)
