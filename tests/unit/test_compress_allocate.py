"""Who gets which width: budgets, rules, baselines, and what must not matter."""

from collections import Counter
from dataclasses import replace

import pytest
from compressed_models import empty_plan, made_up_statistics, settings

from gatewise.compression.allocate import allocate
from gatewise.compression.config import Allocation, Budget, CompressConfig, Granularity, GridConfig
from gatewise.compression.plan import Plan
from gatewise.compression.report import bits_report
from gatewise.compression.statistics import LayerStatistics
from gatewise.parallel.errors import ConfigError

LAYERS, EXPERTS = (0, 1, 2), 8


def plan_of(config: CompressConfig) -> Plan:
    return empty_plan(config, layers=3, num_experts=EXPERTS)


def solved(
    config: CompressConfig, statistics: list[LayerStatistics] | None = None
) -> tuple[Plan, list[list[float]]]:
    """Return the plan, and the width of each layer's experts."""
    plan = plan_of(config)
    found = statistics if statistics is not None else made_up_statistics(LAYERS, EXPERTS)
    plan = plan.with_bits(allocate(plan, found, config))
    widths = [
        [part.shape.bits for part in plan.of_layer(layer, "expert") if part.projection == "in"]
        for layer in LAYERS
    ]
    return plan, widths


def experts_config(allocation: Allocation, bits: float = 2.0, **changes: object) -> CompressConfig:
    return settings(allocation=allocation, budget=Budget.experts, bits=bits, **changes)


@pytest.mark.parametrize("allocation", list(Allocation))
@pytest.mark.parametrize("bits", [1.5, 2.0, 2.5])
def test_every_allocation_keeps_to_the_budget(allocation: Allocation, bits: float) -> None:
    plan, _ = solved(experts_config(allocation, bits))
    assert bits_report(plan, [])["experts"] <= bits
    if allocation is not Allocation.uniform:
        assert bits_report(plan, [])["experts"] == pytest.approx(bits)


@pytest.mark.parametrize("budget", list(Budget))
def test_bits_mean_what_the_budget_says(budget: Budget) -> None:
    config = settings(budget=budget, bits=4.2 if budget is Budget.metadata else 2.4)
    plan, _ = solved(config)
    name = {"metadata": "with_metadata"}.get(budget.name, budget.name)
    reached = bits_report(plan, [])[name]
    assert config.bits - 0.1 < reached <= config.bits


def test_bytes_are_those_of_all_tensors() -> None:
    least = solved(settings(allocation=Allocation.uniform, widths="1"))[0].payload_bytes()
    wide = settings(allocation=Allocation.uniform, widths="3", bits=3.2)
    most = solved(wide)[0].payload_bytes()
    asked = (least + most) // 2
    reached = solved(settings(bytes=asked))[0].payload_bytes()
    assert asked - 200 < reached <= asked
    with pytest.raises(ConfigError, match=f"bytes is {least - 1}, but this model takes from"):
        solved(settings(bytes=least - 1))


@pytest.mark.parametrize("width", [2.0, 3.0])
def test_c9_one_width_only_gives_the_uniform_plan(width: float) -> None:
    uniform, _ = solved(experts_config(Allocation.uniform, width))
    config = experts_config(Allocation.fisher_global, width, widths=f"{width:g}")
    assert solved(config)[0] == uniform
    if width == 3:
        assert solved(experts_config(Allocation.fnorm2, 3.0))[0] == uniform


@pytest.mark.parametrize("allocation", [Allocation.pmq_paper, Allocation.pmq_release])
def test_c10_an_expert_that_no_token_reached_gets_the_least_width(allocation: Allocation) -> None:
    statistics = made_up_statistics(LAYERS, EXPERTS)
    for found in statistics:
        found.count[3], found.gate[3], found.probability[3] = 0, 0.0, 0.0
        for table in (found.squared, found.norms, found.fisher):
            for column in table.values():
                column[3] = 0.0
    for widths in solved(experts_config(allocation), statistics)[1]:
        assert widths[3] == 1


@pytest.mark.parametrize(
    "allocation", [Allocation.pmq_release, Allocation.fisher_global, Allocation.frequency]
)
def test_c11_permuted_experts_give_a_permuted_plan(allocation: Allocation) -> None:
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    plain, permuted = made_up_statistics(LAYERS, EXPERTS), []
    for found in plain:
        changes: dict[str, object] = {
            name: [getattr(found, name)[expert] for expert in order]
            for name in ("count", "gate", "gate_squared", "probability")
        }
        for name in ("trace", "squared", "norms", "fisher", "diagonal", "weight_error"):
            table = getattr(found, name)
            changes[name] = {key: [column[e] for e in order] for key, column in table.items()}
        permuted.append(replace(found, **changes))
    config = experts_config(allocation)
    for before, after in zip(solved(config, plain)[1], solved(config, permuted)[1], strict=True):
        assert after == [before[expert] for expert in order]


@pytest.mark.parametrize("allocation", [Allocation.random, Allocation.frequency, Allocation.weight])
def test_the_baselines_deal_the_widths_of_the_release(allocation: Allocation) -> None:
    release = solved(experts_config(Allocation.pmq_release))[1]
    dealt = solved(experts_config(allocation))[1]
    assert [Counter(widths) for widths in dealt] == [Counter(widths) for widths in release]
    assert dealt != release


def test_pmq_has_one_expert_at_each_of_the_two_widest_widths() -> None:
    for widths in solved(experts_config(Allocation.pmq_release, 1.4))[1]:
        assert {2.0, 3.0} <= set(widths)


def test_a_global_budget_moves_bits_to_the_layer_where_they_count() -> None:
    means = [
        sum(widths) / len(widths) for widths in solved(experts_config(Allocation.fisher_global))[1]
    ]
    assert means[0] < means[2]
    blocks = solved(experts_config(Allocation.fisher_block))[1]
    assert [sum(widths) for widths in blocks] == [16, 16, 16]


def test_projections_and_layers_can_have_their_own_widths() -> None:
    config = experts_config(Allocation.fnorm2_global, granularity=Granularity.projection)
    plan, _ = solved(config)
    pairs = {
        (part.layer, part.expert, part.projection): part.shape.bits
        for part in plan.parts
        if part.kind == "expert"
    }
    assert any(
        pairs[layer, e, "in"] != pairs[layer, e, "out"] for layer in LAYERS for e in range(8)
    )
    config = experts_config(Allocation.fisher_global, granularity=Granularity.layer)
    assert all(len(set(widths)) == 1 for widths in solved(config)[1])


def test_a_budget_that_cannot_be_met_is_refused_with_those_that_can() -> None:
    with pytest.raises(ConfigError, match=r"bits is 0.9 \(budget=experts\).*takes from 1 .* to 3"):
        solved(experts_config(Allocation.fisher_global, 0.9))
    with pytest.raises(ConfigError, match=r"layer 0 cannot meet it with one expert at each"):
        solved(experts_config(Allocation.pmq_release, 1.2))
    with pytest.raises(ConfigError, match="no experts"):
        allocate(empty_plan(settings(), num_experts=0), [], settings())


def test_a_plan_survives_its_text() -> None:
    config = settings(grid=GridConfig(group=16), allocation=Allocation.uniform)
    plan, _ = solved(config)
    assert Plan.from_json(plan.to_json(), source="plan.json") == plan
