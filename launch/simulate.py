"""`gatewise simulate`: what a training step would take on a cluster that is not here."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.conf.presets import load_cluster, load_model_shape
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.step_settings import (
    StepConfig,
    describe,
    layout_json,
    memory_json,
    read_counts,
    write_plan,
    write_trace,
)
from gatewise.launch.usage import usage_text
from gatewise.moe.planning.layouts import Candidate, best_layouts
from gatewise.moe.planning.simulate import Disturbance, simulate_step
from gatewise.moe.planning.step import Step, exposed_step_ms, plan_step, predict_step

__all__ = ["SimulateConfig", "run", "usage"]

_SUMMARY = """Simulate a training step of a model on a cluster: the best parallel layout for the
ranks, memory of the fullest rank, step time and exposed communication, with skewed loads and slow
ranks. The costs are computed from the cluster's file, not measured."""


@dataclass(kw_only=True, slots=True)
class SimulateConfig(StepConfig):
    """Settings of the simulation."""

    skew: float = 1.0  # expected rows of the fullest expert over the mean
    counts: str | None = None  # file of recorded rows by layer and expert, instead of skew
    slow_share: float = 0.0  # part of the ranks that compute slowly
    slow_extra: float = 0.0  # their extra time: 0.2 is 20 %
    samples: int = 16  # different draws of the load
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        StepConfig.__post_init__(self)
        self.disturbance(())

    def disturbance(self, counts: Sequence[Sequence[float]]) -> Disturbance:
        """Return what makes ranks unlike each other."""
        return Disturbance(
            self.skew, counts, self.slow_share, self.slow_extra, self.samples, self.seed
        )


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return usage_text("simulate", _SUMMARY, field_table(load_settings(SimulateConfig, arguments)))


def run(arguments: Sequence[str]) -> int:
    """Simulate as the command line says and return the exit code."""
    config = load_settings(SimulateConfig, arguments)
    folder = RunFolder.choose(config.run.dir, "simulate")
    folder.write_environment(["simulate", *arguments])
    return run_session("simulate", folder, lambda: _simulate(config, folder))


def _simulate(config: SimulateConfig, folder: RunFolder) -> dict[str, Any]:
    began = time.perf_counter()
    shape = load_model_shape(config.model)
    cluster = load_cluster(config.cluster)
    disturbance = config.disturbance(read_counts(config.counts) if config.counts else ())
    candidates = best_layouts(shape, cluster, config.wish(config.ranks or cluster.ranks))
    step = candidates[0].step
    print("gatewise simulate:", folder.path)
    print(describe(step))
    plan = plan_step(step, config.policy)
    planned = time.perf_counter()
    ideal_ms, _ = predict_step(plan)
    played = simulate_step(plan, disturbance)
    step_ms = played.step_ms
    ended = time.perf_counter()
    exposed_ms = exposed_step_ms(plan)
    kept = plan.experts.last
    tokens = step.micro_batches * step.workload.tokens * step.profile.layout.data
    print(
        f"  {kept.policy} ({kept.chunks('forward')}/{kept.chunks('backward')} chunks): "
        f"step {step_ms:.1f} ms, {ideal_ms:.1f} ms if all ranks were alike, "
        f"{exposed_ms:.1f} ms of communication exposed, {tokens / step_ms * 1e3:,.0f} tokens/s"
    )
    _print_layouts(candidates)
    return {
        "model": shape.name,
        "cluster": cluster.name,
        "layout": layout_json(step),
        "policy": kept.policy,
        "note": kept.note,
        "chunks_forward": kept.chunks("forward"),
        "chunks_backward": kept.chunks("backward"),
        "step_ms": step_ms,
        "ideal_step_ms": ideal_ms,
        "exposed_ms": exposed_ms,
        "bound_ms": kept.bound_ms,
        "gap": kept.gap,
        "fullest_rank_load": played.fullest_rank_load,
        "tokens_per_second": tokens / step_ms * 1e3,
        "model_flops_share": _flops_share(step, tokens, step_ms, cluster.tflops),
        "memory_gb": memory_json(candidates[0].memory),
        "layouts": [
            layout_json(c.step) | {"quick_step_ms": c.quick_ms, "memory_gb": c.memory.total_gb}
            for c in candidates
        ],
        "plan_seconds": planned - began,
        "simulate_seconds": ended - planned,
        "plan": str(write_plan(folder, plan.experts, step)),
        "trace": str(write_trace(folder, kept, step.profile.interference, played.slots)),
    }


def _flops_share(step: Step, tokens: int, step_ms: float, tflops: float) -> float:
    """Return the share of the peak that the model's own arithmetic takes (MFU).

    Six operations per active weight and token, and causal attention's scores.
    """
    shape = step.shape
    weights = shape.active_parameters() - shape.vocab * shape.hidden  # looking up is no product
    heads = shape.heads * (shape.query_dim + shape.head_value_dim)
    scores = shape.layers * step.workload.length / 2 * heads
    peak = step.profile.layout.ranks * tflops * 1e12 * step_ms / 1e3
    return 6 * tokens * (weights + scores) / peak


def _print_layouts(candidates: Sequence[Candidate]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="best layouts, by a quick plan")
    for name in ("expert", "shard", "pipeline", "micro-batch", "recompute", "GB", "step ms"):
        table.add_column(name, justify="right")
    for candidate in candidates:
        layout = candidate.step.profile.layout
        table.add_row(
            str(layout.expert),
            str(layout.shard),
            str(layout.pipeline),
            str(candidate.step.workload.sequences),
            "yes" if candidate.step.workload.recompute else "no",
            f"{candidate.memory.total_gb:.1f}",
            f"{candidate.quick_ms:.1f}",
        )
    Console().print(table)
