"""The schedule benchmark on real ranks over the loopback, and the profiler on real groups."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gatewise.launch.cli import main
from gatewise.parallel.collectives import Group
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.probes import collective_probes
from gatewise.parallel.schedule.profiler import Meter
from gatewise.parallel.schedule.profiles import OPERATIONS, read_profile
from ranks import run_ranks

pytestmark = pytest.mark.dist


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    command = ["bench", "schedule", "testbed=loopback", f"run.dir={folder}", *arguments]
    assert main(command) == 0
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_all_schedules_give_the_results_of_the_serial_one(tmp_path: Path) -> None:
    small = ["width=8", "expert_width=16", "device_gmacs=0.01", "trials=3", "max_chunks=3"]
    result = bench(
        tmp_path, "tokens=48", "compute=emulated,real", "gradient_bytes=256", *small,
        "policies=tutel,fsmoe,search", "without_sum=fsmoe",
    )  # fmt: skip
    rows = result["rows"]
    assert [row["policy"] for row in rows[:5]] == ["serial", "tutel", "fsmoe", "search", "fsmoe"]
    assert [row["compute"] for row in rows] == ["emulated"] * 5 + ["real"] * 5
    assert all(row["difference"] == 0 for row in rows[:5])  # only rows moved
    assert all(row["difference"] < 1e-5 for row in rows)
    assert all(row["links"] == "unshaped" for row in rows)
    assert {row["inter_bytes"] for row in rows} == {None}  # nobody can tell whose they are
    assert "overlap of links" in result["cannot_show"]
    assert {row["gradient_bytes"] for row in rows} == {0, 256}
    assert len(rows[0]["trials_ms"]) == 3
    low, high = rows[0]["ci95_ms"]
    assert low <= rows[0]["measured_ms"] <= high
    profile = read_profile(tmp_path / "profile_unshaped_real.json")
    assert set(profile.costs) >= set(OPERATIONS)
    trace = json.loads(Path(result["traces"][0]).read_text())
    assert any(event["name"] == "dispatch:0" for event in trace["traceEvents"])
    assert Path(result["pictures"][0]).read_text().startswith("<svg")


def test_nodes_of_one_rank_have_nothing_to_gather(tmp_path: Path) -> None:
    small = ["width=8", "expert_width=16", "device_gmacs=0.01", "trials=2", "max_chunks=2"]
    result = bench(tmp_path, "ranks_per_node=1", "tokens=16", "passes=backward", *small)
    assert all(row["difference"] == 0 for row in result["rows"])
    assert all(row["chunks_forward"] == 0 for row in result["rows"])
    assert "gather_grad:0" not in Path(result["traces"][0]).read_text()


def test_whole_blocks_run_with_every_policy(tmp_path: Path) -> None:
    small = ["width=8", "expert_width=16", "device_gmacs=0.01", "trials=2", "max_chunks=2"]
    policies = "policies=fsmoe,whole_block"
    result = bench(tmp_path, "tokens=32", "blocks=2", "sequences=2", policies, *small)
    assert [row["policy"] for row in result["rows"]] == ["serial", "fsmoe", "whole_block"]
    assert all(row["difference"] is None for row in result["rows"])
    trace = Path(result["traces"][0]).read_text()
    assert "1.dispatch_grad:0" in trace  # of the second block


def _profile(rank: int, world: int) -> None:
    group = Group.of(dist.group.WORLD)
    lanes = ThreadLanes()
    meter = Meter(group, lanes, repeats=3)
    largest = dict.fromkeys(("all_to_all", "all_gather", "reduce_scatter", "all_reduce"), 65536)
    probes = collective_probes(group, group, group, width=64, largest=largest)
    costs = {name: meter.cost(probe) for name, probe in probes.items()}
    assert all(cost.ms(65536) > 0 for cost in costs.values())
    numbers = torch.tensor([cost.ms(65536) for cost in costs.values()])
    other = numbers.clone()
    dist.broadcast(other, 0)
    assert torch.equal(numbers, other)  # all ranks plan with the same costs
    disturbed = meter.interference({"intra": probes["all_gather"], "inter": probes["all_to_all"]})
    assert set(disturbed.extra) == {"intra", "inter"}
    lanes.close()


def test_all_ranks_measure_the_same_costs() -> None:
    run_ranks(_profile, 2)
