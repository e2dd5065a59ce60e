"""Blocks in a row, and parts of a micro-batch that go through them side by side in a fixed order.

Read `policies.py` and `moe/side_by_side.py` first: this is `whole_block` as training runs it. One
thread leads all parts through each block: it computes their attention one after the other and lets
their rows leave, then waits for the rows of each and lets its experts work. So the order of all
tasks is known, and so is what waits for what: the prediction is of exactly that order.
"""

from collections.abc import Iterator

from gatewise.moe.planning.block import BACKWARD_TABLE, FORWARD_TABLE, stages_of
from gatewise.moe.planning.policies import Pass, Problem, Proposal
from gatewise.parallel.schedule.cost import Amount
from gatewise.parallel.schedule.plan import Stage, StageGraph, Task, ordered_plan

__all__ = ["beside_pass", "chain", "propose_beside"]

# What a part does when it enters a block, and when its experts work.
_ENTER = ("attention", "attention_scatter", "order", "dispatch", "shared")
_WORK = ("gather", "experts", "scatter", "collect")
_LEAVE = ("combine", "block_gather")
# The backward pass takes these in the reverse order.
_LEAVE_GRAD = ("block_gather_grad", "combine_grad", "collect_grad")
_WORK_GRAD = ("scatter_grad", "experts_data", "gather_grad", "dispatch_grad", "experts_weights")
_ENTER_GRAD = (
    *("shared_grad", "order_grad", "attention_scatter_grad"),
    *("attention_grad", "attention_weights"),
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
    rows = _forward_rows(problem.blocks) if name == "forward" else _backward_rows(problem.blocks)
    order = [
        Task(stage, part)
        for names in rows
        for part in range(parts)
        for stage in names
        if part < have.get(stage, 0)
    ]
    # who leads all parts waits for what travels within a node, before and behind the experts
    plan = ordered_plan(graph, parts, order, merge={"intra": "compute"})
    return Pass(graph, plan, amounts)


def _forward_rows(blocks: int) -> Iterator[list[str]]:
    """Yield the stages that every part runs before the next part does."""
    before: list[str] = []
    for block in range(blocks):
        yield before + [f"{block}.{stage}" for stage in _ENTER]
        yield [f"{block}.{stage}" for stage in _WORK]
        before = [f"{block}.{stage}" for stage in _LEAVE]
    yield before


def _backward_rows(blocks: int) -> Iterator[list[str]]:
    """Yield the same of the backward pass; block 0 is the last one of the model."""
    yield [f"0.{stage}" for stage in _LEAVE_GRAD]
    for block in range(blocks):
        yield [f"{block}.{stage}" for stage in _WORK_GRAD]
        entering = [f"{block}.{stage}" for stage in _ENTER_GRAD]
        if block + 1 < blocks:
            entering += [f"{block + 1}.{stage}" for stage in _LEAVE_GRAD]
        yield entering
        yield [f"{block}.reduce_end"]  # full buckets leave when the block's gradients are there
