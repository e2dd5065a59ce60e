"""Cost models, interference and profile files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Amount, Cost, Interference, fit_cost, fit_line
from gatewise.parallel.schedule.profiles import (
    OPERATIONS,
    Layout,
    Profile,
    read_profile,
    write_profile,
)

LAYOUT = Layout(ranks=8, ranks_per_node=4, expert=2, shard=4)


def profile() -> Profile:
    costs = {name: Cost(0.1 * i, 1e-6 * i) for i, name in enumerate(OPERATIONS, 1)}
    costs["all_to_all"] = Cost(0.3, 2e-6, 0.98, 1e5, 0.1, 4e-6)
    return Profile(LAYOUT, costs, Interference.mutual({("inter", "intra"): 0.5}), "made up")


def test_a_line_is_found_again() -> None:
    sizes = [1e5 * i for i in range(1, 9)]
    cost = fit_line(sizes, [0.2 + 3e-6 * size for size in sizes])
    assert cost.alpha_ms == pytest.approx(0.2)
    assert cost.beta_ms == pytest.approx(3e-6)
    assert cost.r2 == pytest.approx(1.0)


def test_a_negative_start_becomes_a_line_through_the_origin() -> None:
    cost = fit_line([1.0, 2.0, 3.0], [0.5, 2.0, 3.5])
    assert cost.alpha_ms == 0
    assert cost.beta_ms == pytest.approx((0.5 + 4 + 10.5) / 14)
    assert cost.r2 < 1


def test_two_segments_are_found_where_the_measurements_have_a_knee() -> None:
    sizes = [1e5 * i for i in range(1, 17)]
    ms = [1.0 + 1e-6 * s if s < 8e5 else 0.4 + 4e-6 * s for s in sizes]
    cost = fit_cost(sizes, ms)
    assert cost.knee == 8e5
    for size, measured in zip(sizes, ms, strict=True):
        assert cost.ms(size) == pytest.approx(measured)
    assert fit_cost(sizes, [1.0 + 1e-6 * s for s in sizes]).knee == 0


def test_noise_alone_does_not_make_a_second_segment() -> None:
    sizes = [1e5 * i for i in range(1, 17)]
    noise = [0.01, -0.02, 0.015, -0.01, 0.02, -0.015, 0.005, -0.005] * 2
    cost = fit_cost(sizes, [1 + 2e-6 * s + e for s, e in zip(sizes, noise, strict=True)])
    assert cost.knee == 0
    assert 0.99 < cost.r2 < 1


def test_a_fit_needs_two_different_sizes() -> None:
    with pytest.raises(ValueError, match="at least two different sizes"):
        fit_line([3.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    "cost", [Cost(0.5, 2e-6), Cost(0.4, 4e-6, 1.0, 8e5, 1.0, 1e-6)], ids=["line", "segments"]
)
def test_the_inverse_is_the_largest_size_in_the_time(cost: Cost) -> None:
    for ms in (0.1, 0.6, 1.2, 1.9, 3.0, 4.0, 9.0):
        size = cost.inverse(ms)
        if size == 0:
            assert cost.ms(1e-3) > ms
        else:
            assert cost.ms(size * (1 - 1e-9)) <= ms + 1e-9
            assert cost.ms(size * 1.001 + 1) > ms


def test_no_work_takes_no_time_and_chunks_pay_the_start_each() -> None:
    amount = Amount(Cost(1.0, 0.01), 100)
    assert amount.ms(0) == 0
    assert 4 * amount.ms(0.25) == amount.ms() + 3
    assert amount.least_ms(8) == amount.ms()


def test_busy_lanes_slow_each_other_down_by_their_sum() -> None:
    matrix = Interference({"compute": {"inter": 0.2, "intra": 0.3}})
    assert matrix.rate("compute", ["compute"]) == 1
    assert matrix.rate("compute", ["compute", "inter", "intra"]) == pytest.approx(1 / 1.5)
    assert matrix.rate("inter", ["compute", "inter"]) == 1
    assert matrix
    assert not Interference.mutual({("inter", "intra"): 0.0})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"inter": {"inter": 0.5}}, "two different lanes"),
        ({"inter": {"nvlink": 0.5}}, "two different lanes"),
        ({"inter": {"intra": -0.5}}, "at least 0"),
    ],
)
def test_an_impossible_interference_is_refused(extra: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interference(extra)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    write_profile(profile(), tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile()


def test_a_profile_of_another_layout_is_refused() -> None:
    profile().require(LAYOUT)
    other = Layout(ranks=8, ranks_per_node=4, expert=4, shard=2)
    with pytest.raises(ConfigError, match="of another layout: its expert is 2, this job's is 4"):
        profile().require(other, name="profile.json")


def drop(value: dict[str, Any], *path: str) -> None:
    for name in path[:-1]:
        value = value[name]
    del value[path[-1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format="other"), "its `format` is not"),
        (lambda v: v.update(version=7), "has version 7; this program reads 1"),
        (lambda v: drop(v, "layout"), "has no 'layout'"),
        (lambda v: drop(v, "costs", "all_reduce"), "costs of all_reduce are missing"),
        (lambda v: v["costs"].update(sort={}), "cost of 'sort' is none of"),
        (lambda v: v["costs"]["experts"].update(beta_ms=-1), "cost of experts: beta_ms is -1"),
        (lambda v: drop(v, "costs", "experts", "alpha_ms"), "cost of experts: .*alpha_ms"),
        (lambda v: v["costs"]["experts"].update(gamma=1), r"cost of experts: unknown \['gamma'\]"),
        (lambda v: v["layout"].update(shard=3), "shard is 3, which does not divide the 4 ranks"),
        (lambda v: v["layout"].update(expert=3), "= 12, which does not divide the 8 ranks"),
        (lambda v: v["layout"].update(ranks=0), "ranks is 0"),
        (lambda v: v.update(interference={"inter": {"intra": "x"}}), "cannot be used"),
    ],
)
def test_a_wrong_profile_is_one_clear_line(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    write_profile(profile(), file)
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=message) as mistake:
        read_profile(file)
    assert str(file) in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_a_file_that_is_no_json_or_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ConfigError, match=r"text\.json is not JSON"):
        read_profile(tmp_path / "text.json")


def test_a_layout_knows_its_groups() -> None:
    layout = Layout(ranks=64, ranks_per_node=8, expert=16, shard=2, pipeline=2)
    assert (layout.nodes, layout.copies, layout.data) == (8, 1, 16)
    assert layout.expert_ranks_per_node == 4
    assert layout.expert_spans_nodes
    assert not Layout(ranks=8, ranks_per_node=8, expert=8).expert_spans_nodes
