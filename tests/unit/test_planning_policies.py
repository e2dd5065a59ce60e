"""Scheduling policies: valid plans, predictions above the bound, and known relations."""

import random
from dataclasses import replace
from itertools import pairwise, permutations, product

import pytest

from gatewise.conf.compose import group_choices
from gatewise.conf.presets import load_cluster, load_model_shape
from gatewise.moe.planning.beside import propose_beside
from gatewise.moe.planning.block import Workload, block_work
from gatewise.moe.planning.policies import Pass, Problem, Proposal, bound_ms, staged_pass
from gatewise.moe.planning.search import search_passes
from gatewise.moe.planning.shapes import ModelShape
from gatewise.moe.planning.whole import POLICIES, choose, propose, propose_all, unavailable
from gatewise.moe.stages import BACKWARD, FORWARD, Schedule
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cluster import Cluster, cluster_profile
from gatewise.parallel.schedule.cost import Cost, Interference
from gatewise.parallel.schedule.orders import reordered_plan
from gatewise.parallel.schedule.plan import Task
from gatewise.parallel.schedule.profiles import OPERATIONS, Layout, Profile
from gatewise.parallel.schedule.recurrence import Chunk, staged_ms

SHAPE = ModelShape(
    name="small",
    source="made up",
    layers=4,
    hidden=256,
    vocab=1000,
    heads=8,
    kv_heads=8,
    head_dim=32,
    experts=8,
    top_k=2,
    expert_width=512,
)


def profile(layout: Layout, seed: int, interference: Interference | None = None) -> Profile:
    draw = random.Random(seed)
    costs = {}
    for name in OPERATIONS:
        beta = {"experts": 4e-9, "attention": 4e-9}.get(name, 1e-6)
        costs[name] = Cost(draw.uniform(0.01, 0.2), beta * draw.uniform(0.3, 3))
    return Profile(layout, costs, interference or Interference.none())


def problem(seed: int = 0, *, shard: int = 4, disturbed: bool = False) -> Problem:
    layout = Layout(ranks=8, ranks_per_node=4, expert=8 // shard, shard=shard)
    matrix = Interference.mutual({("inter", "intra"): 0.5, ("compute", "inter"): 0.2})
    costs = profile(layout, seed, matrix if disturbed else None)
    work = block_work(SHAPE, costs, Workload(4, 512))
    return Problem(work, costs.interference, 4, 2, sequences=4, micro_batches=2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("seed", "shard", "disturbed"), [(0, 4, False), (1, 1, False), (2, 2, True)]
)
def test_every_plan_is_a_valid_order_and_never_beats_the_bound(
    policy: str, seed: int, shard: int, disturbed: bool
) -> None:
    asked = problem(seed, shard=shard, disturbed=disturbed)
    check_proposal(propose(policy, asked), asked)


@pytest.mark.parametrize(("seed", "shard"), [(0, 4), (1, 1), (2, 2)])
def test_parts_side_by_side_have_one_order_and_the_planner_is_no_slower(
    seed: int, shard: int
) -> None:
    asked = replace(problem(seed, shard=shard), blocks=3)
    proposals = propose_beside(asked)
    assert [proposal.chunks("backward") for proposal in proposals] == [2, 4]
    for proposal in proposals:
        check_proposal(proposal, asked)
    free = propose("whole_block", asked)
    assert free.predicted_ms <= min(p.predicted_ms for p in proposals) * (1 + 1e-9)
    assert propose_beside(replace(asked, sequences=1)) == []


def check_proposal(proposal: Proposal, asked: Problem) -> None:
    """All tasks run once, in the lanes' orders and after what they need; no bound is beaten."""
    assert proposal.bound_ms <= proposal.predicted_ms * (1 + 1e-9)
    assert proposal.gap >= -1e-9
    assert 0 <= proposal.exposed_ms <= proposal.predicted_ms + 1e-9
    for item in proposal.passes.values():
        item.plan.check(item.graph)
        spans = {i.task: i for i in item.timeline(asked.interference).intervals}
        assert set(spans) == set(item.graph.tasks(item.plan.chunks))
        for tasks in item.plan.lanes.values():
            for before, after in pairwise(tasks):
                assert spans[before].end_ms <= spans[after].start_ms + 1e-9
        for task, span in spans.items():
            for need in item.graph.needs(task, item.plan.chunks):
                assert spans[need].end_ms <= span.start_ms + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_more_freedom_never_predicts_worse(seed: int) -> None:
    ms = {p.policy: p.predicted_ms for p in propose_all(problem(seed))}
    assert ms["fsmoe"] <= ms["fsmoe_no_iio"] + 1e-9
    assert ms["fsmoe_no_iio"] <= ms["tutel"] + 1e-9
    assert ms["tutel"] <= ms["serial"] + 1e-9
    assert ms["interleaved"] <= ms["fsmoe"] + 1e-9
    assert ms["search"] <= ms["interleaved"] + 1e-9


def test_serial_is_the_sum_of_all_work() -> None:
    asked = problem(3)
    work = asked.work
    amounts = [*work.forward.values(), *work.backward.values(), work.reduce]
    assert propose("serial", asked).predicted_ms == pytest.approx(sum(a.ms() for a in amounts))


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_the_staged_core_is_what_the_recurrence_says(chunks: int) -> None:
    asked = problem(5)
    amounts = {
        name: asked.work.forward[name]
        for name in ("dispatch", "gather", "experts", "scatter", "collect")
    }
    core = replace(asked.work, forward=amounts)
    played = staged_pass(replace(asked, work=core), "forward", chunks)
    part = {name: amount.ms(1 / chunks) for name, amount in amounts.items()}
    chunk = Chunk(*(part[name] for name in ("dispatch", "gather", "experts", "scatter", "collect")))
    assert played.total_ms(Interference.none()) == pytest.approx(staged_ms([chunk] * chunks))


def test_search_finds_the_best_order_of_two_chunks_that_exists() -> None:
    """Every order of the layer's communication, at two equal chunks, by brute force."""
    asked = replace(problem(7), max_chunks=2)
    base = staged_pass(asked, "forward", 2)
    best = staged_pass(asked, "forward", 1).total_ms(asked.interference)
    near = [Task(name, chunk) for name in ("gather", "scatter") for chunk in range(2)]
    far = [Task(name, chunk) for name in ("dispatch", "collect") for chunk in range(2)]
    for sequences in product(permutations(near), permutations(far)):
        plan = reordered_plan(base.plan, sequences)
        candidate = Pass(base.graph, plan, base.amounts)
        try:
            best = min(best, candidate.total_ms(asked.interference))
        except ValueError:  # this order contradicts the dependencies
            continue
    found = search_passes(asked)["forward"].total_ms(asked.interference)
    assert found <= best * (1 + 1e-9)


def test_auto_takes_the_shortest_and_serial_where_overlap_loses() -> None:
    proposals = propose_all(problem(1))
    best = choose(proposals)
    assert best.predicted_ms == min(p.predicted_ms for p in proposals)
    assert "times as fast as serial" in best.note
    slow_start = {name: Cost(50.0, 1e-12) for name in OPERATIONS}
    costs = Profile(Layout(1, 1), slow_start, Interference.none())
    alone = Problem(block_work(SHAPE, costs, Workload(1, 64)), costs.interference)
    chosen = propose("auto", alone)
    assert chosen.policy == "serial"
    assert "overlap would not pay" in chosen.note


def test_a_policy_that_cannot_be_used_says_why() -> None:
    asked = replace(problem(), sequences=1, micro_batches=1)
    assert {policy for policy in POLICIES if unavailable(policy, asked)} == {
        "whole_block",
        "paired",
    }
    with pytest.raises(ConfigError, match=r"policy is whole_block, but .* 2 or more"):
        propose("whole_block", asked)
    with pytest.raises(ConfigError, match=r"policy is paired, but .* 2 or more"):
        propose("paired", asked)
    with pytest.raises(ConfigError, match="policy is 'fastest'; it must be auto or one of serial"):
        propose("fastest", asked)


def test_a_gradient_sum_that_fits_beside_attention_costs_nothing() -> None:
    asked = problem(1)
    short = replace(asked.work.reduce, cost=Cost(1e-3, 1e-12))
    with_sum = replace(asked, work=replace(asked.work, reduce=short))
    without = replace(asked, reduce=False)
    ms = propose("fsmoe", with_sum).predicted_ms
    assert ms == pytest.approx(propose("fsmoe", without).predicted_ms)
    exposed = propose("tutel", with_sum).predicted_ms - propose("tutel", without).predicted_ms
    assert exposed == pytest.approx(short.ms())


@pytest.mark.parametrize("policy", ["serial", "tutel", "fsmoe", "interleaved"])
def test_plans_restrict_to_plans_of_the_layer_that_runs(policy: str) -> None:
    asked = replace(problem(2), max_chunks=3)
    passes = propose(policy, asked).passes
    chunks = max(item.plan.chunks for item in passes.values())
    forward, backward = (passes[name].plan for name in ("forward", "backward"))
    forward.restrict(FORWARD).check(FORWARD)
    backward.restrict(BACKWARD).check(BACKWARD)
    if forward.chunks == backward.chunks == chunks:
        Schedule(forward.restrict(FORWARD), backward.restrict(BACKWARD))


def test_the_bound_is_the_fullest_lane() -> None:
    asked = problem(0, shard=1)
    work = asked.work
    compute = [
        a
        for name, a in [*work.forward.items(), *work.backward.items()]
        if name not in ("dispatch", "collect", "collect_grad", "dispatch_grad")
    ]
    moved = 4 * work.forward["dispatch"].ms() + work.reduce.ms()
    assert bound_ms(asked) == pytest.approx(max(sum(a.ms() for a in compute), moved))


# published totals in billions: all weights, and those that a token meets
TOTALS = {
    "mixtral_8x7b": (46.7, 12.9),
    "mixtral_8x22b": (140.6, 39.1),
    "deepseek_v3": (671.0, 37.0),
    "qwen3_30b_a3b": (30.5, 3.3),
    "qwen3_235b_a22b": (235.0, 22.0),
    "olmoe": (6.9, 1.3),
    "gpt_oss_120b": (116.8, 5.1),
    "kimi_k2": (1040.0, 32.0),
}


@pytest.mark.parametrize("name", TOTALS)
def test_shapes_have_the_published_numbers_of_parameters(name: str) -> None:
    shape = load_model_shape(name)
    total, active = TOTALS[name]
    counted = shape.active_parameters()
    if name == "gpt_oss_120b":  # its authors leave the looked-up embedding out
        counted -= shape.vocab * shape.hidden
    assert shape.total_parameters() / 1e9 == pytest.approx(total, rel=0.015)
    assert counted / 1e9 == pytest.approx(active, rel=0.03)
    assert shape.name == name


def test_every_model_and_cluster_file_is_complete() -> None:
    assert set(group_choices("model_shape")) == set(TOTALS)
    for name in group_choices("cluster"):
        cluster = load_cluster(name)
        assert cluster.name == name
        layout = Layout(2 * cluster.ranks_per_node, cluster.ranks_per_node, 2, 1)
        assert all(cost.beta_ms >= 0 for cost in cluster_profile(cluster, layout).costs.values())


def test_links_bound_the_collectives_of_a_cluster() -> None:
    cluster = Cluster(
        name="toy",
        source="made up",
        nodes=4,
        ranks_per_node=2,
        memory_gb=1,
        tflops=1,
        memory_gbps=100,
        node_gbps=8,
        rail_gbps=1,
        link_efficiency=1.0,
        rail_nodes=2,
        spine_oversubscription=4.0,
    )

    def beta(**degrees: int) -> Cost:
        return cluster_profile(cluster, Layout(8, 2, **degrees)).costs["all_to_all"]

    gb = 1e9
    assert beta(expert=2).ms(gb) == pytest.approx(1e3 / 2 / 8, rel=1e-3)  # half stays, over 8 GB/s
    assert beta(expert=4).ms(gb) == pytest.approx(1e3 / 2, rel=1e-3)  # half leaves the node
    # all nodes: three quarters leave, and one half goes through the oversubscribed spine
    assert beta(expert=8).ms(gb) == pytest.approx(1e3 * 4 / 2, rel=1e-3)
    ring = cluster_profile(cluster, Layout(8, 2, shard=2)).costs["all_gather"]
    assert ring.ms(gb) == pytest.approx(1e3 / 2 / 8, rel=1e-3)
    with pytest.raises(ConfigError, match="ranks is 16, but cluster toy has 8"):
        cluster_profile(cluster, Layout(16, 2))
