"""`gatewise plan`: the schedules of a training step side by side, and the plan of the best.

Costs come from a profile that was measured, or are computed from a cluster's data sheet.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
    write_picture,
    write_plan,
    write_trace,
)
from gatewise.launch.usage import usage_text
from gatewise.moe.planning.layouts import best_layouts, make_step
from gatewise.moe.planning.memory import rank_memory
from gatewise.moe.planning.policies import Proposal
from gatewise.moe.planning.step import Step, choose_plan, plan_all, predict_step
from gatewise.moe.planning.whole import POLICIES, unavailable
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.profiles import read_profile, write_profile

__all__ = ["PlanConfig", "chosen_step", "run", "usage"]

_SUMMARY = """Plan the blocks of a model with every policy, predict them, and keep the plan of the
best (or of policy=NAME). profile=PATH holds measured costs and their layout; without it the costs
are computed from cluster=NAME, and a layout that is left open is the best predicted one."""


@dataclass(kw_only=True, slots=True)
class PlanConfig(StepConfig):
    """Settings of the plan command."""

    profile: str | None = None  # file of a measured profile; null: computed from the cluster

    def __post_init__(self) -> None:
        StepConfig.__post_init__(self)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return usage_text("plan", _SUMMARY, field_table(load_settings(PlanConfig, arguments)))


def run(arguments: Sequence[str]) -> int:
    """Plan as the command line says and return the exit code."""
    config = load_settings(PlanConfig, arguments)
    folder = RunFolder.choose(config.run.dir, "plan")
    folder.write_environment(["plan", *arguments])
    return run_session("plan", folder, lambda: _plan(config, folder))


def chosen_step(config: PlanConfig) -> Step:
    """Return the step that the settings mean.

    Raises:
        ConfigError: for names, degrees or a profile that cannot be used.
    """
    shape = load_model_shape(config.model)
    if config.profile is None:
        cluster = load_cluster(config.cluster)
        wish = config.wish(config.ranks or cluster.ranks)
        return best_layouts(shape, cluster, wish, most=3)[0].step
    profile = read_profile(Path(config.profile).expanduser())
    given = {
        name: getattr(config, name)
        for name in ("ranks", "expert", "shard", "pipeline")
        if getattr(config, name) is not None
    }
    try:
        wanted = replace(profile.layout, **given)
    except ValueError as error:
        raise ConfigError(f"profile {config.profile} is of another layout: {error}") from error
    profile.require(wanted, name=f"profile {config.profile}")
    return make_step(
        shape,
        profile,
        config.wish(profile.layout.ranks),
        micro_batch=config.micro_batch or 1,
        recompute=bool(config.recompute),
    )


def _plan(config: PlanConfig, folder: RunFolder) -> dict[str, Any]:
    began = time.perf_counter()
    step = chosen_step(config)
    print("gatewise plan:", folder.path)
    print(describe(step))
    problem = step.problem(reduce=True)
    reasons = {policy: unavailable(policy, problem) for policy in POLICIES}
    if config.policy != "auto" and reasons[config.policy]:
        raise ConfigError(f"policy is {config.policy}, but {reasons[config.policy]}")
    plans = [(plan, predict_step(plan)[0]) for plan in plan_all(step)]
    serial_ms = plans[0][1]
    rows = [_row(plan.experts.last, step_ms, serial_ms) for plan, step_ms in plans]
    if config.policy == "auto":
        kinds = choose_plan(plans).experts
    else:
        kinds = next(p.experts for p, _ in plans if p.experts.last.policy == config.policy)
    kept = kinds.last
    seconds = time.perf_counter() - began
    _print_table(rows, {policy: reason for policy, reason in reasons.items() if reason})
    step_ms = next(row["step_ms"] for row in rows if row["policy"] == kept.policy)
    auto = "auto takes " if config.policy == "auto" else ""
    print(f"{auto}{kept.policy}" + (f": {kept.note}" if kept.note else ""))
    print("costs:", step.profile.source or "of the profile")
    profile = folder.path / "profile.json"
    write_profile(step.profile, profile)
    memory = rank_memory(
        step.shape, step.profile.layout, step.workload, micro_batches=step.micro_batches
    )
    return {
        "model": step.shape.name,
        "layout": layout_json(step),
        "memory_gb": memory_json(memory),
        "policy": kept.policy,
        "note": kept.note,
        "chunks_forward": kept.chunks("forward"),
        "chunks_backward": kept.chunks("backward"),
        "predicted_ms": kept.predicted_ms,
        "bound_ms": kept.bound_ms,
        "step_ms": step_ms,
        "rows": rows,
        "unavailable": {policy: reason for policy, reason in reasons.items() if reason},
        "plan_seconds": seconds,
        "plan": str(write_plan(folder, kinds, step)),
        "profile": str(profile),
        "trace": str(write_trace(folder, kept, step.profile.interference)),
        "picture": str(write_picture(folder, ["serial", "fsmoe", kept.policy], problem)),
    }


def _row(proposal: Proposal, step_ms: float, serial_ms: float) -> dict[str, Any]:
    return {
        "policy": proposal.policy,
        "chunks_forward": proposal.chunks("forward"),
        "chunks_backward": proposal.chunks("backward"),
        "predicted_ms": proposal.predicted_ms,
        "exposed_ms": proposal.exposed_ms,
        "bound_ms": proposal.bound_ms,
        "gap": proposal.gap,
        "step_ms": step_ms,
        "speedup_vs_serial": serial_ms / step_ms,
    }


def _print_table(rows: Sequence[dict[str, Any]], reasons: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    bound = rows[0]["bound_ms"]
    table = Table(
        title=f"one block, both passes and gradient sum; no schedule is below {bound:.3f} ms"
    )
    names = ("policy", "chunks", "block ms", "exposed", "over bound", "step ms", "speed-up")
    for name in names:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['chunks_forward']}/{row['chunks_backward']}",
            f"{row['predicted_ms']:.3f}",
            f"{row['exposed_ms']:.3f}",
            f"{row['gap']:.1%}",
            f"{row['step_ms']:.1f}",
            f"{row['speedup_vs_serial']:.2f}",
        )
    console = Console()
    console.print(table)
    for reason in reasons.values():
        console.print(reason)
