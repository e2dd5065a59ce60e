"""Whole steps: pipeline order, layouts, memory, the simulation of all ranks, and both commands."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gatewise.conf.presets import load_cluster, load_model_shape
from gatewise.launch.cli import main
from gatewise.moe.planning.block import Workload
from gatewise.moe.planning.layouts import Wish, best_layouts, make_step
from gatewise.moe.planning.memory import rank_memory, split_blocks
from gatewise.moe.planning.simulate import Disturbance, simulate_step
from gatewise.moe.planning.step import Step, StepPlan, pipeline_slots, plan_step, predict_step
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cluster import cluster_profile
from gatewise.parallel.schedule.picture import timelines_svg
from gatewise.parallel.schedule.plan import Stage, StageGraph, serial_plan
from gatewise.parallel.schedule.profiles import Layout, read_profile, write_profile
from gatewise.parallel.schedule.timeline import Timeline, play

CLUSTER = load_cluster("h100_8x8")


def small_step(policy: str, *, pipeline: int = 2, micro_batches: int = 4) -> StepPlan:
    shape = replace(load_model_shape("olmoe"), layers=4, dense_layers=1, dense_width=512)
    layout = Layout(16, 8, expert=4, shard=2, pipeline=pipeline)
    costs = cluster_profile(CLUSTER, layout)
    wish = Wish(16, 2 * layout.data * micro_batches, 512, max_chunks=3)
    step = make_step(shape, costs, wish, micro_batch=2, recompute=False, cluster=CLUSTER)
    assert step.micro_batches == micro_batches
    return plan_step(step, policy)


def test_one_forward_one_backward_takes_its_known_time() -> None:
    stages, micro_batches = 4, 8

    def duration(stage: int, forward: int | None, backward: int | None) -> float:
        return 1.0 if backward is None else 2.0

    slots = pipeline_slots(stages, micro_batches, duration, 0.0)
    assert len(slots) == 2 * stages * micro_batches
    assert max(slot.end_ms for slot in slots) == 3.0 * (micro_batches + stages - 1)
    held = [0] * stages
    most = [0] * stages
    for slot in sorted(slots, key=lambda slot: slot.start_ms):
        held[slot.stage] += 1 if slot.forward is not None else -1
        most[slot.stage] = max(most[slot.stage], held[slot.stage])
    assert most == [4, 3, 2, 1]  # what the memory of activations counts on


def test_paired_slots_run_every_pass_once() -> None:
    slots = pipeline_slots(3, 5, lambda *_: 1.0, 0.1, paired=True)
    for stage in range(3):
        mine = [slot for slot in slots if slot.stage == stage]
        assert sorted(s.forward for s in mine if s.forward is not None) == list(range(5))
        assert sorted(s.backward for s in mine if s.backward is not None) == list(range(5))
        assert any(s.forward is not None and s.backward is not None for s in mine)


@pytest.mark.parametrize("policy", ["serial", "fsmoe", "whole_block", "paired"])
def test_ranks_that_are_alike_take_the_predicted_time(policy: str) -> None:
    plan = small_step(policy)
    predicted, _ = predict_step(plan)
    # a pass over several blocks and stages with fewer of them are both taken in proportion
    assert simulate_step(plan, Disturbance()).step_ms == pytest.approx(predicted, rel=1e-9)


def test_skew_and_slow_ranks_cost_time_and_seeds_repeat() -> None:
    plan = small_step("fsmoe")
    even = simulate_step(plan, Disturbance())
    skewed = simulate_step(plan, Disturbance(skew=2.0, seed=1))
    slow = simulate_step(plan, Disturbance(slow_share=1.0, slow_extra=0.5))
    assert even.fullest_rank_load == 1
    assert skewed.fullest_rank_load > 1.05
    assert skewed.step_ms > even.step_ms
    assert even.step_ms < slow.step_ms < 1.5 * even.step_ms
    assert simulate_step(plan, Disturbance(skew=2.0, seed=1)).step_ms == skewed.step_ms


def test_recorded_counts_decide_the_fullest_rank() -> None:
    plan = small_step("serial")
    counts = [[1.0] * 63 + [65.0]]  # the last of four ranks holds experts 48 to 63
    played = simulate_step(plan, Disturbance(counts=counts))
    assert played.fullest_rank_load == pytest.approx((15 + 65) / 16 / 2)
    with pytest.raises(ConfigError, match="load has 3 counts in layer 0; there must be 64"):
        simulate_step(plan, Disturbance(counts=[[1.0, 2.0, 3.0]]))


def test_blocks_are_split_evenly_with_the_outer_stages_short() -> None:
    stages = split_blocks(load_model_shape("deepseek_v3"), 8)
    assert [stage.total for stage in stages] == [7, 8, 8, 8, 8, 8, 7, 7]
    assert [stage.dense for stage in stages] == [3, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="pipeline is 62, more than the 61 layers"):
        split_blocks(load_model_shape("deepseek_v3"), 62)


def test_memory_counts_every_weight_once_over_all_ranks() -> None:
    shape = load_model_shape("mixtral_8x7b")
    alone = rank_memory(shape, Layout(1, 1), Workload(1, 1))
    assert alone.weights_gb == pytest.approx(2 * shape.total_parameters() / 1e9, rel=1e-3)
    assert alone.optimizer_gb == pytest.approx(6 * alone.weights_gb)
    layout = Layout(64, 8, expert=8, shard=8)
    split = rank_memory(shape, layout, Workload(1, 1))
    assert split.optimizer_gb == pytest.approx(alone.optimizer_gb / 64)
    less = rank_memory(shape, layout, Workload(1, 4096, recompute=True))
    assert less.activations_gb < rank_memory(shape, layout, Workload(1, 4096)).activations_gb / 3


def test_layouts_fit_and_divide() -> None:
    shape = load_model_shape("mixtral_8x7b")
    found = best_layouts(shape, CLUSTER, Wish(64, 128, 4096, shard=2, max_chunks=2))
    assert [c.quick_ms for c in found] == sorted(c.quick_ms for c in found)
    for candidate in found:
        layout = candidate.step.profile.layout
        assert candidate.memory.total_gb < CLUSTER.memory_gb
        assert layout.shard == 2
        assert layout.ranks == 64
        assert shape.experts % layout.expert == 0
        sequences = candidate.step.workload.sequences * candidate.step.micro_batches
        assert sequences * layout.data == 128


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(64, 128, 4096, expert=3), "no layout of 64 ranks of cluster h100_8x8 suits"),
        (Wish(64, 7, 4096, pipeline=1), "no layout of 64 ranks"),
        (Wish(8, 16, 4096), "fits into the 80 GB of cluster h100_8x8; the smallest .* needs"),
    ],
)
def test_layouts_that_cannot_be_are_refused(wish: Wish, message: str) -> None:
    name = "deepseek_v3" if wish.ranks == 8 else "mixtral_8x7b"
    with pytest.raises(ConfigError, match=message):
        best_layouts(load_model_shape(name), CLUSTER, wish)


def test_more_chunks_than_tokens_are_refused() -> None:
    step: Step = small_step("serial").step
    with pytest.raises(ConfigError, match="max_chunks is 600; a rank has 512 tokens"):
        replace(step, max_chunks=600)


def call(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*command, f"run.dir={folder}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == str(folder / "result.json")
    result: dict[str, Any] = json.loads(Path(last).read_text())
    return result


def test_plan_writes_table_plan_profile_trace_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=olmoe", "sequence_length=1024", "max_chunks=2", "micro_batch=2"]
    first = call(["plan", "cluster=h100_8x8", "ranks=8", *words], tmp_path / "a", capsys)
    policies = [row["policy"] for row in first["rows"]]
    assert policies[0] == "serial"
    assert set(policies) | set(first["unavailable"]) >= {"fsmoe", "search", "whole_block"}
    assert first["predicted_ms"] >= first["bound_ms"]
    assert "<svg" in Path(first["picture"]).read_text()
    assert json.loads(Path(first["trace"]).read_text())["traceEvents"]
    assert set(json.loads(Path(first["plan"]).read_text())["last"]) <= {
        "forward",
        "backward",
        "pair",
    }
    # the profile that it wrote gives the same plan again
    again = call(
        ["plan", f"profile={first['profile']}", "batch=16", *words], tmp_path / "b", capsys
    )
    kept = {row["policy"]: row["predicted_ms"] for row in first["rows"]}
    for row in again["rows"]:
        if row["policy"] in kept:
            assert row["predicted_ms"] == pytest.approx(kept[row["policy"]])


def test_simulate_reports_step_memory_and_layouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=olmoe", "cluster=h100_8x8", "ranks=16", "sequence_length=1024", "skew=1.5"]
    words += ["policy=fsmoe", "max_chunks=2", "micro_batch=1", "shard=1"]
    result = call(["simulate", *words], tmp_path / "run", capsys)
    assert result["step_ms"] > result["ideal_step_ms"] > 0
    assert result["memory_gb"]["total_gb"] < 80
    assert result["layout"]["ranks"] == 16
    assert result["layouts"]
    assert 0 < result["model_flops_share"] < 1
    names = {e["name"] for e in json.loads(Path(result["trace"]).read_text())["traceEvents"]}
    assert {"F0", "B0"} <= names


def without_rail(value: dict[str, Any]) -> None:
    del value["rail_gbps"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_rail, "has no rail_gbps; add it: a number"),
        (lambda v: v.update(rail_gbps=0), "cluster.rail_gbps is 0; it must be above 0"),
        (lambda v: v.update(rail_gbps="fast"), "rail_gbps is 'fast'; it must be of type float"),
        (lambda v: v.update(rail_gbsp=1), "unknown field 'rail_gbsp'; did you mean 'rail_gbps'?"),
        (lambda v: v.update(link_efficiency=2.0), "must be above 0 and at most 1"),
    ],
)
def test_a_wrong_cluster_file_is_one_clear_line(
    change: Callable[[dict[str, Any]], None],
    message: str,
    tmp_path: Path,
) -> None:
    file = Path(__file__).parents[2] / "conf" / "cluster" / "h100_8x8.yaml"
    value = yaml.safe_load(file.read_text())
    change(value)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(value))
    with pytest.raises(ConfigError) as mistake:
        load_cluster(str(wrong))
    assert message in str(mistake.value)
    assert "wrong.yaml" in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_wrong_words_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(16, 8, expert=8, shard=1)
    path = tmp_path / "profile.json"
    write_profile(cluster_profile(CLUSTER, layout), path)
    assert read_profile(path).layout == layout
    for words, message in (
        (["plan", "model=mixtral"], "model is 'mixtral'; did you mean 'mixtral_8x7b'?"),
        (["simulate", "cluster=h100"], "cluster is 'h100'"),
        (["plan", "policy=best"], "policy is 'best'; it must be auto or one of serial"),
        (["simulate", "skew=0.5"], "skew is 0.5; it must be at least 1"),
        (["plan", "model=olmoe", f"profile={path}", "expert=4"], "is of another layout"),
        (["simulate", "model=olmoe", "ranks=1000"], "ranks is 1000, but cluster h100_64x8 has 512"),
        (["simulate", "counts=/none.json"], "counts /none.json cannot be read"),
    ):
        assert main([*words, f"run.dir={tmp_path / 'run'}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("gatewise: error: ")
        assert error.count("\n") == 1
        assert message in error


def test_a_picture_shows_every_task_and_needs_one() -> None:
    graph = StageGraph((Stage("send", "inter"), Stage("work", "compute", ("send",))))
    line = play(graph, serial_plan(graph, 2), lambda *_: 1.5)
    text = timelines_svg([("a < b", line), ("again", line)])
    assert text.count("<rect") == 1 + 2 * 4 + 2  # background, tasks, legend
    assert "a &lt; b: 4.50 ms" in text
    with pytest.raises(ValueError, match="no timeline"):
        timelines_svg([("empty", Timeline(()))])
