"""Experts spread over ranks compute what one rank computes, forward and backward."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from spread_layers import (
    EXPERTS,
    HIDDEN,
    WIDTH,
    assert_near,
    part_of,
    passes,
    spread,
    whole_layer,
)

from gatewise.moe import MoE
from gatewise.moe.stages import Schedule, backward_graph, forward_graph
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import make_groups
from gatewise.parallel.schedule.executor import Execution
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.plan import serial_plan, staged_plan
from gatewise.routers.config import BalanceScope, RouterConfig
from ranks import run_ranks

TOP_K = 2
SHARES = {  # tokens of each rank, and whether all choose the same experts
    "uneven": ([10, 7, 13, 4], False),
    "one rank has no token": ([9, 0, 5, 6], False),
    "all tokens to one rank's experts": ([8, 8, 6, 7], True),
    "nobody has a token": ([0, 0, 0, 0], False),
    "one token in all": ([0, 1, 0, 0], False),
}


def schedules(*, is_sharded: bool = False) -> Iterator[tuple[str, Schedule]]:
    """Yield 1, 2 and 3 chunks, one after the other and overlapped; and passes cut differently."""
    graphs = forward_graph(is_sharded=is_sharded), backward_graph(is_sharded=is_sharded)
    forward, backward = graphs
    for chunks in (1, 2, 3):
        yield f"serial in {chunks}", Schedule.serial(chunks, is_sharded=is_sharded)
        staged = staged_plan(forward, chunks), staged_plan(backward, chunks)
        yield f"staged in {chunks}", Schedule(*staged, *graphs)
    yield "2 and 3", Schedule(staged_plan(forward, 2), staged_plan(backward, 3), *graphs)
    uneven = replace(staged_plan(forward, 3), shares=(0.2, 0.5, 0.3))
    yield "uneven and 1", Schedule(uneven, serial_plan(backward), *graphs)


def _is_the_one_rank_layer(rank: int, world: int, expert: int, shards: int) -> None:
    groups = make_groups(ParallelConfig(ranks=world, expert=expert, expert_shard=shards))
    for case, (shares, skewed) in SHARES.items():
        generator = torch.Generator().manual_seed(1)
        total = sum(shares[:world])
        x_TD, mix_TD = torch.randn(2, total, HIDDEN, generator=generator, dtype=torch.float64)
        if skewed:
            x_TD[:, 0] = 1.0
        whole = whole_layer(skewed=skewed)
        layer = spread(whole, groups.experts)
        layer.execution = Execution(ThreadLanes())
        want = passes(whole, x_TD, mix_TD)
        start = sum(shares[:rank])
        mine = slice(start, start + shares[rank])
        for plan, schedule in schedules(is_sharded=shards > 1):
            layer.schedule = schedule
            have = passes(layer, x_TD[mine], mix_TD[mine])
            for name, value in have.items():
                expected = want[name]
                if name in ("y", "x"):
                    expected = expected[mine]
                elif name.startswith("experts"):
                    expected = part_of(layer.experts, name.rpartition(".")[2], expected)
                    if groups.expert_data.replicate.handle is not None:
                        dist.all_reduce(value, group=groups.expert_data.replicate.handle)
                else:
                    dist.all_reduce(value, group=groups.control.handle)
                assert_near(value, expected, f"{name}, {case}, {plan}")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "expert", "shards"),
    [(2, 2, 1), (4, 1, 1), (4, 2, 1), (4, 4, 1), (2, 1, 2), (4, 2, 2), (4, 1, 4), (4, 1, 2)],
)
def test_outputs_and_all_gradients_do_not_depend_on_where_experts_are(
    world: int, expert: int, shards: int
) -> None:
    run_ranks(_is_the_one_rank_layer, world, (expert, shards))


def _public_layer_is_the_one_rank_layer(rank: int, world: int) -> None:
    for scope, shared, chunks in product(BalanceScope, (0, 1), (1, 2)):
        torch.manual_seed(5)
        router = RouterConfig(balance_scope=scope, balance_loss=0.3)
        whole = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, router=router, shared_experts=shared).double()
        layer = MoE(
            HIDDEN,
            WIDTH,
            EXPERTS,
            TOP_K,
            router=router,
            shared_experts=shared,
            group=dist.group.WORLD,
        ).double()
        layer.layer.schedule = Schedule.serial(chunks)
        local = EXPERTS // world
        mine = slice(rank * local, (rank + 1) * local)
        state = {
            name: value[mine] if ".experts." in name else value
            for name, value in whole.state_dict().items()
        }
        layer.load_state_dict(state)
        layer = copy.deepcopy(layer)  # a copy keeps its group and its share of the gradients
        x, mix = torch.randn(2, world, 5, HIDDEN, dtype=torch.float64)  # a sequence per rank
        y = layer(x[rank : rank + 1])
        loss = (y * mix[rank : rank + 1]).mean() + sum(layer.losses.values())
        loss.backward()
        # the loss of the whole batch is the mean of the ranks' losses
        total = (whole(x) * mix).mean()
        if scope is BalanceScope.micro_batch:  # by its meaning it depends on who has which tokens
            total = total + whole.losses["z"]
            for part in x:
                whole(part)
                total = total + whole.losses["balance"] / world
        else:
            total = total + sum(whole.losses.values())
        total.backward()
        reduced = loss.detach().clone()
        dist.all_reduce(reduced)
        assert_near(reduced / world, total.detach(), "loss")
        for (name, parameter), (_, wanted) in zip(
            layer.named_parameters(), whole.named_parameters(), strict=True
        ):
            gradient, expected = parameter.grad, wanted.grad
            assert gradient is not None
            assert expected is not None
            if ".experts." in name:
                expected = expected[mine]  # averaged already
            else:
                dist.all_reduce(gradient)
                gradient = gradient / world
            assert_near(gradient, expected, f"{name}, {scope.name}")


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_the_public_layer_over_a_group_gives_averaged_expert_gradients(world: int) -> None:
    run_ranks(_public_layer_is_the_one_rank_layer, world)


def _bias_follows_all_ranks(rank: int, world: int) -> None:
    layer = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, router="deepseek_v3", group=dist.group.WORLD)
    whole = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, router="deepseek_v3")
    whole.router.load_state_dict(layer.router.state_dict())  # type: ignore[attr-defined]
    x = torch.randn(20, HIDDEN)
    whole(x)
    layer(x[:0] if rank == 0 else x)  # one rank has no token
    for each in (layer, whole):
        each.update_router()
    assert whole.router.bias_E.any()  # type: ignore[attr-defined]
    assert torch.equal(layer.router.bias_E, whole.router.bias_E)  # type: ignore[attr-defined]


@pytest.mark.dist
def test_the_bias_of_the_public_layer_follows_the_demand_of_all_ranks() -> None:
    run_ranks(_bias_follows_all_ranks, 2)


def _some_ranks_freeze(rank: int, world: int) -> None:
    """Ranks agree on the collectives whatever each of them wants gradients of."""
    group = dist.group.WORLD
    torch.manual_seed(5)
    layer = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, group=group).double()
    x = torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=rank == 0)
    layer.experts.w_in_eGD.requires_grad_(rank != 0)
    layer(x).sum().backward()
    assert (x.grad is not None) == (rank == 0)
    assert (layer.experts.w_in_eGD.grad is not None) == (rank != 0)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer.eval()
    assert torch.isfinite(layer(x)).all()


@pytest.mark.dist
def test_ranks_may_want_different_gradients() -> None:
    run_ranks(_some_ranks_freeze, 2)


def _capacity_looks_at_local_tokens(rank: int, world: int) -> None:
    torch.manual_seed(5)
    whole = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, capacity_factor=0.5).double()
    layer = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, capacity_factor=0.5, group=dist.group.WORLD).double()
    local = EXPERTS // world
    for name, value in layer.state_dict().items():
        source = whole.state_dict()[name]
        value.copy_(source[rank * local : (rank + 1) * local] if ".experts." in name else source)
    x = torch.randn(world, 12, HIDDEN, dtype=torch.float64)
    assert_near(layer(x[rank]).detach(), whole(x[rank]).detach(), "output of the same tokens")
    padding = torch.arange(12) >= 6 + 6 * rank  # all of it on the last rank is real
    want = whole(x[rank], padding).detach()
    assert_near(layer(x[rank], padding).detach(), want, "output beside padding")


@pytest.mark.dist
def test_capacity_drops_alike_for_the_same_tokens_of_a_rank() -> None:
    run_ranks(_capacity_looks_at_local_tokens, 2)


def _one_exchange_of_counts(rank: int, world: int) -> None:
    groups = make_groups(ParallelConfig(ranks=world, expert=world))
    layer = spread(whole_layer(), groups.experts)
    x_TD = torch.randn(10, HIDDEN, dtype=torch.float64)
    for chunks in (1, 3):
        layer.schedule = Schedule.serial(chunks)
        traffic = groups.experts.rows.traffic
        calls, sent = traffic.calls, traffic.sent_bytes
        passes(layer, x_TD, x_TD)
        assert traffic.calls - calls == 1 + 4 * chunks  # the counts; two ways, two passes
        assert traffic.sent_bytes - sent <= 4 * 10 * TOP_K * HIDDEN * 8 + 8 * EXPERTS * chunks


@pytest.mark.dist
def test_a_layer_exchanges_counts_once_and_rows_four_times_a_chunk() -> None:
    run_ranks(_one_exchange_of_counts, 2)
