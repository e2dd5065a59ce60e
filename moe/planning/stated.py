"""Plans of the layer of experts with stated numbers of chunks, where no costs are known.

Read `policies.py` first. What a policy adds to the numbers of chunks is an order; costs only decide
between orders and numbers. Policies that are nothing but such a decision are not here.
"""

from collections.abc import Callable, Mapping
from functools import partial

from gatewise.moe.planning.block import BlockWork
from gatewise.moe.planning.policies import (
    Pass,
    Problem,
    interleaved_pass,
    one_lane_pass,
    staged_pass,
)
from gatewise.moe.stages import Schedule, backward_graph, forward_graph
from gatewise.parallel.schedule.cost import Amount, Cost, Interference

__all__ = ["ONE_DEGREE", "STATED_POLICIES", "stated_schedule"]

STATED_POLICIES: Mapping[str, Callable[[Problem, str, int], Pass]] = {
    "tutel": one_lane_pass,
    "pipemoe_lina": one_lane_pass,
    "fsmoe_no_iio": one_lane_pass,
    "fsmoe": staged_pass,
    "interleaved": partial(interleaved_pass, lags=(1, 1)),
}
ONE_DEGREE = ("tutel", "pipemoe_lina")  # both passes have the same number of chunks


def stated_schedule(
    policy: str, chunks_forward: int, chunks_backward: int, *, is_sharded: bool = False
) -> Schedule:
    """Return the schedule of a policy with these numbers of chunks.

    Args:
        policy: "serial", or one of `STATED_POLICIES`.
        chunks_forward: of the forward pass.
        chunks_backward: of the backward pass.
        is_sharded: the ranks of a node split the width of each expert.
    """
    if policy == "serial":
        return Schedule.serial(is_sharded=is_sharded)
    amount = Amount(Cost(0.0, 0.0), 1.0)
    forward, backward = forward_graph(is_sharded=is_sharded), backward_graph(is_sharded=is_sharded)
    work = BlockWork(
        {stage.name: amount for stage in forward.stages},
        {stage.name: amount for stage in backward.stages},
        Amount(Cost(0.0, 0.0), 0.0),
        "inter",
    )
    problem = Problem(work, Interference.none(), max(chunks_forward, chunks_backward))
    passes = [
        STATED_POLICIES[policy](problem, name, chunks)
        for name, chunks in (("forward", chunks_forward), ("backward", chunks_backward))
    ]
    first, second = ((item.graph, item.plan) for item in passes)
    return Schedule.of(first, second, is_sharded=is_sharded)
