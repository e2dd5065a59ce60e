"""What `gatewise plan` and `gatewise simulate` share: settings, the step they mean, its files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gatewise.launch.run_folder import RunFolder, writable
from gatewise.moe.planning.layouts import Wish
from gatewise.moe.planning.memory import Memory, rank_memory
from gatewise.moe.planning.policies import Problem, Proposal
from gatewise.moe.planning.step import Kinds, Slot, Step
from gatewise.moe.planning.whole import POLICIES, propose
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Interference
from gatewise.parallel.schedule.picture import timelines_svg
from gatewise.parallel.schedule.plan import plan_to_json
from gatewise.parallel.schedule.timeline import Timeline, chrome_events, joined
from gatewise.training.config import RunConfig

__all__ = [
    "StepConfig",
    "describe",
    "layout_json",
    "memory_json",
    "read_counts",
    "write_picture",
    "write_plan",
    "write_trace",
]

_PICTURE_BLOCKS = 2


@dataclass(kw_only=True, slots=True)
class StepConfig:
    """A training step to plan; what is null is chosen."""

    model: str = "mixtral_8x7b"  # a file of conf/model_shape, or the path of one
    cluster: str = "h100_64x8"  # a file of conf/cluster, or the path of one
    policy: str = "auto"  # auto, or the name of a policy: docs/schedule.md
    ranks: int | None = None  # null: all of the cluster
    expert: int | None = None  # expert groups of a set of experts
    shard: int | None = None  # ranks of a node that split each expert and attention
    pipeline: int | None = None  # pipeline stages
    batch: int | None = None  # sequences of a step over all ranks; null: two for each rank
    micro_batch: int | None = None  # sequences of a micro-batch
    sequence_length: int = 4096  # tokens of a sequence
    recompute: bool | None = None  # backward computes forward again; null: where memory asks for it
    load: float = 1.0  # rows of the fullest rank over the mean, to plan for
    max_chunks: int = 8  # most chunks of a micro-batch
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("ranks", "expert", "shard", "pipeline", "batch", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or null")
        for name in ("sequence_length", "max_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.load >= 1:
            raise ValueError(f"load is {self.load}; it must be at least 1 (balanced)")
        if self.policy not in ("auto", *POLICIES):
            raise ValueError(
                f"policy is {self.policy!r}; it must be auto or one of {', '.join(POLICIES)}"
            )

    def wish(self, ranks: int) -> Wish:
        """Return what is asked of the layout."""
        return Wish(
            ranks,
            self.batch or 2 * ranks,
            self.sequence_length,
            self.expert,
            self.shard,
            self.pipeline,
            self.micro_batch,
            self.recompute,
            self.load,
            self.max_chunks,
        )


def layout_json(step: Step) -> dict[str, Any]:  # JSON's own types
    """Return the layout of a step and how its batch is cut."""
    return asdict(step.profile.layout) | {
        "data": step.profile.layout.data,
        "micro_batch": step.workload.sequences,
        "micro_batches": step.micro_batches,
        "recompute": step.workload.recompute,
    }


def memory_json(memory: Memory) -> dict[str, float]:
    """Return the memory of the fullest rank, in GB."""
    return asdict(memory) | {"total_gb": memory.total_gb}


def describe(step: Step) -> str:
    """Return two lines on the step that is planned."""
    work = step.workload
    memory = rank_memory(step.shape, step.profile.layout, work, micro_batches=step.micro_batches)
    total, active = step.shape.total_parameters(), step.shape.active_parameters()
    again = ", recomputing" if work.recompute else ""
    return (
        f"  {step.shape.name}: {total / 1e9:.1f} B parameters, {active / 1e9:.1f} B active; "
        f"{step.profile.layout}\n"
        f"  {step.micro_batches} micro-batches of {work.sequences} x {work.length} tokens{again}; "
        f"{memory.total_gb:.1f} GB on the fullest rank"
    )


def write_plan(folder: RunFolder, kinds: Kinds, step: Step) -> Path:
    """Store the plans of a step as JSON: of its last micro-batch, and of the others."""
    path = folder.path / "plan.json"
    proposal = kinds.last
    value = {
        "policy": proposal.policy,
        "layout": layout_json(step),
        "blocks": proposal.blocks,
        "predicted_ms": proposal.predicted_ms,
        "bound_ms": proposal.bound_ms,
        "last": _passes_json(kinds.last),
        "plain": _passes_json(kinds.plain),
    }
    with writable(folder.path):
        path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    return path


def _passes_json(proposal: Proposal) -> dict[str, Any]:
    return {name: plan_to_json(item.graph, item.plan) for name, item in proposal.passes.items()}


def write_trace(
    folder: RunFolder,
    proposal: Proposal,
    interference: Interference,
    slots: Sequence[Slot] = (),
) -> Path:
    """Store the predicted timelines as a Chrome trace: passes of the blocks, and pipeline slots."""
    events: list[dict[str, Any]] = []
    for process, (name, item) in enumerate(proposal.passes.items()):
        line = item.timeline(interference)
        events += chrome_events(line, f"predicted {proposal.policy}, {name}", process=process)
    process = len(proposal.passes)
    if slots:
        name = "pipeline stages"
        events.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}})
    for slot in slots:
        parts = [("F", slot.forward), ("B", slot.backward)]
        events.append(
            {
                "ph": "X",
                "pid": process,
                "tid": slot.stage,
                "name": " ".join(f"{kind}{index}" for kind, index in parts if index is not None),
                "ts": round(slot.start_ms * 1e3, 3),
                "dur": round((slot.end_ms - slot.start_ms) * 1e3, 3),
            }
        )
    path = folder.path / "trace" / "predicted.json"
    with writable(folder.path):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events}) + "\n", encoding="utf-8")
    return path


def write_picture(folder: RunFolder, policies: Sequence[str], problem: Problem) -> Path:
    """Draw the timelines of some policies over the same blocks."""
    problem = replace(problem, blocks=_PICTURE_BLOCKS)
    panels = [
        (policy, _timeline(propose(policy, problem), problem.interference))
        for policy in dict.fromkeys(policies)
    ]
    path = folder.path / "timeline.svg"
    with writable(folder.path):
        path.write_text(timelines_svg(panels), encoding="utf-8")
    return path


def _timeline(proposal: Proposal, interference: Interference) -> Timeline:
    repeat = _PICTURE_BLOCKS // proposal.blocks
    lines = []
    for item in proposal.passes.values():
        lines += [item.timeline(interference)] * repeat
    return joined(lines)


def read_counts(path: str) -> Sequence[Sequence[float]]:
    """Read recorded routing: rows of each expert, layer by layer.

    Raises:
        ConfigError: unless the file is `{"count_LE": [[...], ...]}`.
    """
    try:
        value: Any = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        rows = value["count_LE"] if isinstance(value, Mapping) else None
        if rows and all(isinstance(row, list) and row for row in rows):
            return [[float(number) for number in row] for row in rows]
    except OSError as error:
        raise ConfigError(f"counts {path} cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, ValueError):
        pass
    raise ConfigError(
        f'counts {path} does not hold recorded rows; it must be {{"count_LE": [[...], ...]}}, '
        "a list of numbers for each layer"
    )
