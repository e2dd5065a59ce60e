"""Every policy computes what the serial layer of one rank computes, forward and backward."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from spread_layers import HIDDEN, assert_near, part_of, passes, spread, whole_layer

from gatewise.moe.config import Activation
from gatewise.moe.planning.stated import STATED_POLICIES, stated_schedule
from gatewise.moe.stages import Schedule, backward_graph, forward_graph
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import make_groups
from gatewise.parallel.schedule.executor import Execution
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.plan import serial_plan, staged_plan
from ranks import run_ranks

CASES = {  # tokens of each rank, and whether all choose the same two experts
    "uneven": ([10, 7, 13, 4], False),
    "a rank without tokens": ([9, 0, 5, 6], False),
    "experts without tokens": ([8, 8, 6, 7], True),
}


def schedules(is_sharded: bool) -> Iterator[tuple[str, Schedule, bool]]:
    """Yield schedules, and whether they only reorder what two serial chunks do."""
    for policy in STATED_POLICIES:
        yield policy, stated_schedule(policy, 2, 2, is_sharded=is_sharded), True
        yield f"{policy}, 3, 2", stated_schedule(policy, 3, 2, is_sharded=is_sharded), False
    graphs = forward_graph(is_sharded=is_sharded), backward_graph(is_sharded=is_sharded)
    forward = replace(staged_plan(graphs[0], 3), shares=(0.2, 0.5, 0.3))
    backward = replace(staged_plan(graphs[1], 3), shares=(0.4, 0.2, 0.4))
    yield "unequal", Schedule(forward, backward, *graphs), False
    names = [stage.name for stage in graphs[1].stages if stage.name != "experts_weights"]
    late = staged_plan(graphs[1], 3, [*names, "experts_weights"])
    yield "weights last", Schedule(serial_plan(graphs[0]), late, *graphs), False


def _is_the_serial_layer(rank: int, world: int, shards: int) -> None:
    config = ParallelConfig(ranks=world, expert=world // shards, expert_shard=shards)
    groups = make_groups(config).experts
    lanes = ThreadLanes()
    for number, (case, (shares, skewed)) in enumerate(CASES.items()):
        activation = list(Activation)[number]
        generator = torch.Generator().manual_seed(1)
        x_TD, mix_TD = torch.randn(
            2, sum(shares[:world]), HIDDEN, generator=generator, dtype=torch.float64
        )
        if skewed:
            x_TD[:, 0] = 1.0
        whole = whole_layer(activation, skewed=skewed)
        want = passes(whole, x_TD, mix_TD)
        layer = spread(whole, groups)
        start = sum(shares[:rank])
        mine = slice(start, start + shares[rank])
        layer.schedule = Schedule.serial(2, is_sharded=shards > 1)
        in_two = passes(layer, x_TD[mine], mix_TD[mine])
        for name, schedule, reorders in schedules(shards > 1):
            layer.schedule = schedule
            for execution in (Execution(lanes), Execution()):
                layer.execution = execution
                have = passes(layer, x_TD[mine], mix_TD[mine])
                if reorders:
                    same = [torch.equal(have[key], in_two[key]) for key in want]
                    assert all(same), f"bits of {name}, {case}"
            for key, value in have.items():
                expected = want[key]
                if key in ("y", "x"):
                    expected = expected[mine]
                elif key.startswith("experts."):
                    expected = part_of(layer.experts, key.removeprefix("experts."), expected)
                else:
                    dist.all_reduce(value)
                assert_near(value, expected, f"{key}, {name}, {case}")
    lanes.close()


@pytest.mark.dist
@pytest.mark.parametrize(("world", "shards"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_all_policies_give_the_serial_layers_outputs_and_gradients(world: int, shards: int) -> None:
    run_ranks(_is_the_serial_layer, world, (shards,))
