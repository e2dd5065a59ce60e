"""Health metrics on hand-made counts."""

import math

import pytest
import torch

from gatewise.parallel.collectives import NO_GROUP
from gatewise.routers.api import Load, Routing
from gatewise.training.health import SUMS, HealthMeter, expert_squares, summarise


def routing(counts: list[float], tokens: float, **health: float) -> Routing:
    empty = torch.zeros(0, 2)
    load = Load(torch.tensor(counts), torch.zeros(len(counts)), torch.tensor(tokens))
    values = {name: torch.tensor(value) for name, value in health.items()}
    return Routing(empty.long(), empty, load=load, health=values)


def rows(layers: int, values: dict[str, list[float]]) -> torch.Tensor:
    return torch.tensor([values.get(name, [0.0] * layers) for name in SUMS])


def test_balanced_load_is_healthy() -> None:
    sums = rows(2, {name: [10.0, 10.0] for name in SUMS if name != "dropped"})
    values = summarise(torch.full((2, 4), 5.0), sums, torch.zeros(2))
    assert values["moe/max_violation"] == 0
    assert values["moe/cv"] == 0
    assert values["moe/load_entropy"] == pytest.approx(1.0)
    assert values["moe/dead_frac"] == 0
    assert values["moe/router_entropy"] == 1.0
    assert values["moe/effective_k"] == 2


def test_each_layer_has_its_values_and_the_worst_or_mean_stands_for_all() -> None:
    count_LE = torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0]])
    sums = rows(
        2,
        {
            "confidence": [4.0, 10],
            "entropy": [2, 6],
            "inner": [0, 10 * math.log(3)],
            "outer": [5, 9],
            "weight": [10, 25],
            "logsumexp": [30, -10],
            "dropped": [0, 4],
            "tokens": [10, 10],
        },
    )
    values = summarise(count_LE, sums, torch.tensor([7.5, 2.5]))
    assert values["moe/layer_01/max_violation"] == values["moe/max_violation"] == 3
    assert values["moe/layer_00/max_violation"] == 0
    assert values["moe/cv"] == pytest.approx(math.sqrt(3))
    assert values["moe/layer_01/load_entropy"] == pytest.approx(0, abs=1e-7)
    assert values["moe/load_entropy"] == pytest.approx(0.5)
    assert values["moe/dead_frac"] == 0.75
    assert values["moe/layer_01/drop_frac"] == pytest.approx(4 / 20)
    assert values["moe/drop_frac"] == pytest.approx(2 / 20)
    assert values["moe/router_confidence"] == pytest.approx(0.7)
    assert values["moe/layer_01/router_entropy"] == pytest.approx(0.6)
    assert values["moe/layer_01/effective_k"] == pytest.approx(1.6)
    assert values["moe/effective_k"] == pytest.approx(1.8)
    assert values["moe/layer_00/router_inner_balance"] == 1
    assert values["moe/layer_01/router_inner_balance"] == pytest.approx(3)
    assert values["moe/router_outer_balance"] == pytest.approx(0.7)
    assert values["moe/router_weight_sum"] == pytest.approx(1.75)
    assert values["moe/router_logsumexp"] == pytest.approx(1)
    assert values["moe/router_max_logit"] == 7.5


def test_one_expert_and_no_token_give_finite_values() -> None:
    for count_LE in (torch.zeros(1, 4), torch.full((1, 1), 3.0)):
        values = summarise(count_LE, torch.zeros(len(SUMS), 1), torch.zeros(1))
        assert all(math.isfinite(value) for value in values.values())


def test_a_meter_sums_a_window_and_starts_anew() -> None:
    meter = HealthMeter(1, 2, torch.device("cpu"))
    meter.add([routing([3.0, 1.0], 4.0, confidence=2.0, entropy=1.0, dropped=1.0)])
    meter.add([routing([1.0, 3.0], 4.0, confidence=6.0, entropy=1.0)])
    values = meter.drain(NO_GROUP)
    assert values["moe/max_violation"] == 0
    assert values["moe/router_confidence"] == 1.0
    assert values["moe/drop_frac"] == 1 / 8
    meter.add([routing([4.0, 0.0], 4.0)])
    values = meter.drain(NO_GROUP)
    assert values["moe/max_violation"] == 1
    assert values["moe/router_confidence"] == 0


def test_the_largest_logit_of_a_window_is_kept_and_not_summed() -> None:
    meter = HealthMeter(2, 2, torch.device("cpu"))
    for size in (3.0, 9.0, 4.0):
        meter.add([routing([2.0, 2.0], 4.0, largest_logit=size), routing([2.0, 2.0], 4.0)])
    values = meter.drain(NO_GROUP)
    assert values["moe/layer_00/router_max_logit"] == values["moe/router_max_logit"] == 9
    assert values["moe/layer_01/router_max_logit"] == 0
    meter.add([routing([2.0, 2.0], 4.0, largest_logit=1.0)] * 2)
    assert meter.drain(NO_GROUP)["moe/router_max_logit"] == 1


def test_nan_of_one_step_does_not_spoil_the_window() -> None:
    meter = HealthMeter(1, 2, torch.device("cpu"))
    meter.add([routing([2.0, 2.0], 4.0, confidence=math.nan, entropy=math.nan)])
    meter.add([routing([2.0, 2.0], 4.0, confidence=4.0, entropy=2.0)])
    assert meter.drain(NO_GROUP)["moe/router_confidence"] == 0.5


def test_a_dense_model_has_no_values() -> None:
    meter = HealthMeter(0, 0, torch.device("cpu"))
    meter.add([])
    assert meter.drain(NO_GROUP) == {}


def test_squares_of_experts_are_found_wherever_a_shard_ends() -> None:
    """Two layers in one bucket cut into 1 to 5 shards: the sum over owners is the truth."""
    from torch import nn

    from gatewise.parallel.buckets import make_buckets
    from gatewise.parallel.collectives import Group, Traffic
    from gatewise.parallel.dims import ExpertGroups, Groups, ReduceGroups
    from gatewise.parallel.parameters import ParameterSpec

    shapes = {"w_in": (3, 2, 4), "w_out": (3, 4, 2)}
    values = {
        f"blocks.{layer}.experts.{name}": torch.randn(shape, dtype=torch.float64)
        for layer in (0, 1)
        for name, shape in shapes.items()
    }
    truth_LE = torch.stack(
        [
            sum(values[f"blocks.{layer}.experts.{name}"].square().sum((1, 2)) for name in shapes)
            for layer in (0, 1)
        ]
    )
    layers = ["blocks.0.experts", "blocks.1.experts"]
    for shards in (1, 2, 3, 5):
        parts = []
        for rank in range(shards):
            specs = [
                ParameterSpec(
                    n, nn.Parameter(torch.zeros_like(v)), "expert", "expert", True, v.shape
                )
                for n, v in values.items()
            ]
            pieces = ReduceGroups(Group(None, rank, shards, Traffic()), NO_GROUP)
            buckets = make_buckets(
                specs, Groups(NO_GROUP, ExpertGroups(NO_GROUP), pieces, pieces, None)
            )
            for slot in buckets[0].slots:
                slot.gradient.copy_(values[slot.spec.name])
            owned = [gradient for bucket in buckets for gradient in bucket.owned_gradients()]
            parts.append(expert_squares(owned, layers, 3))
            assert parts[-1].shape == (2, 3)  # every rank sends as many numbers
        torch.testing.assert_close(torch.stack(parts).sum(0), truth_LE)
