"""Every policy computes what the serial layer of one rank computes, forward and backward."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatewise.moe.config import Activation
from gatewise.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.layer import MoELayer
from gatewise.moe.planning.stated import STATED_POLICIES, stated_schedule
from gatewise.moe.stages import Schedule, backward_graph, forward_graph
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import ExpertGroups, make_groups
from gatewise.parallel.schedule.executor import Execution
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.plan import serial_plan, staged_plan
from gatewise.routers.api import RoutingContext
from gatewise.routers.config import RouterConfig
from gatewise.routers.router import ComposedRouter
from ranks import run_ranks

HIDDEN, WIDTH, EXPERTS, TOP_K = 8, 6, 8, 2
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


def whole_layer(activation: Activation, skewed: bool) -> MoELayer:
    torch.manual_seed(3)
    layer = MoELayer(
        ComposedRouter(HIDDEN, EXPERTS, TOP_K, RouterConfig()),
        GroupedExperts(EXPERTS, HIDDEN, WIDTH, activation),
        LocalDispatcher(EXPERTS),
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    if skewed:
        with torch.no_grad():
            layer.router.weight[:, 0] = -40.0 * torch.arange(EXPERTS)
    return layer.double()


def spread(whole: MoELayer, groups: ExpertGroups) -> MoELayer:
    """Return this rank's part of the layer."""
    dispatcher = AllToAllDispatcher(EXPERTS, groups)
    experts = GroupedExperts(
        dispatcher.num_local,
        HIDDEN,
        WIDTH,
        whole.experts.activation,
        first_expert=dispatcher.first_expert,
        shard=groups.shard.rank,
        shards=groups.shard.size,
    ).double()
    for name in ("w_in_eGD", "w_out_eDF"):
        getattr(experts, name).data.copy_(part_of(experts, name, getattr(whole.experts, name)))
    return MoELayer(copy.deepcopy(whole.router), experts, dispatcher)


def part_of(experts: GroupedExperts, name: str, whole: Tensor) -> Tensor:
    """Return this rank's part of a weight of all experts, or of its gradient."""
    mine = whole[experts.first_expert : experts.first_expert + experts.num_local]
    return experts.part_of(name, mine)


def passes(layer: MoELayer, x_TD: Tensor, mix_TD: Tensor) -> dict[str, Tensor]:
    x_TD = x_TD.clone().requires_grad_()
    y_TD, _, _ = layer(x_TD, RoutingContext(), 0)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad((y_TD * mix_TD).sum(), (x_TD, *parameters))
    return dict(zip(("y", "x", *names), (y_TD.detach(), *gradients), strict=True))


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
        whole = whole_layer(activation, skewed)
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
                assert value.shape == expected.shape
                if value.numel():
                    error = float((value - expected).abs().max())
                    error /= max(1.0, float(expected.abs().max()))
                    assert error < 1e-10, f"{key} is off by {error:.1e}: {name}, {case}"
    lanes.close()


@pytest.mark.dist
@pytest.mark.parametrize(("world", "shards"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_all_policies_give_the_serial_layers_outputs_and_gradients(world: int, shards: int) -> None:
    run_ranks(_is_the_serial_layer, world, (shards,))
