"""A whole training step planned: the plans of its blocks, and its time without disturbances.

Read `policies.py` and `memory.py` first. The blocks of a pipeline stage follow each other; stages
work in the order one forward, one backward. `simulate.py` plays the same step on every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gatewise.moe.planning.block import Workload, block_work
from gatewise.moe.planning.memory import StageBlocks, split_blocks
from gatewise.moe.planning.policies import Problem, Proposal, propose_layer
from gatewise.moe.planning.shapes import ModelShape
from gatewise.moe.planning.whole import choice_note, propose, propose_all
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Amount, Cost
from gatewise.parallel.schedule.profiles import Profile

__all__ = [
    "Kinds",
    "Slot",
    "Step",
    "StepPlan",
    "choose_plan",
    "complete_plan",
    "exposed_step_ms",
    "pipeline_slots",
    "plan_all",
    "plan_step",
    "predict_step",
    "slot_name",
]

_UPDATE_BYTES = 30  # of memory traffic for one parameter's update: state, gradient and weight


@dataclass(frozen=True, slots=True)
class Step:
    """One training step: a model in a layout, and how much it reads."""

    shape: ModelShape
    profile: Profile
    workload: Workload
    micro_batches: int
    send: Cost  # of bytes from one pipeline stage to the next
    max_chunks: int = 8

    def __post_init__(self) -> None:
        tokens = self.workload.tokens // self.profile.layout.shard
        if self.micro_batches < 1:
            raise ConfigError(f"micro_batches is {self.micro_batches}; it must be at least 1")
        if not 1 <= self.max_chunks <= max(1, tokens):
            raise ConfigError(
                f"max_chunks is {self.max_chunks}; a rank has {tokens} tokens in a micro-batch, "
                f"so it must be 1 to {tokens}"
            )

    @property
    def stages(self) -> list[StageBlocks]:
        """Blocks of each pipeline stage."""
        return split_blocks(self.shape, self.profile.layout.pipeline)

    def problem(self, *, reduce: bool, blocks: int | None = None) -> Problem:
        """Return what a policy is asked for a block with experts."""
        most = max(stage.moe for stage in self.stages)
        return Problem(
            block_work(self.shape, self.profile, self.workload),
            self.profile.interference,
            self.max_chunks,
            max(1, most if blocks is None else blocks),
            self.workload.sequences,
            self.micro_batches,
            reduce,
        )

    @property
    def hop_ms(self) -> float:
        """Time to hand a micro-batch to the next pipeline stage."""
        if self.profile.layout.pipeline == 1:
            return 0.0
        size = self.workload.tokens * self.shape.hidden * self.workload.activation_bytes
        return self.send.ms(size / self.profile.layout.shard)

    def logits(self) -> Amount:
        """Return the work of turning one micro-batch's vectors into logits."""
        macs = self.workload.tokens * self.shape.hidden * self.shape.vocab
        return Amount(self.profile.costs["experts"], macs / self.profile.layout.shard)

    def update_ms(self) -> float:
        """Return the time of the optimizer on the fullest stage."""
        layout = self.profile.layout
        parts = []
        for stage in self.stages:
            dense = stage.total * self.shape.attention_parameters()
            dense += stage.moe * (self.shape.router_parameters() + self.shape.shared_parameters())
            dense += stage.dense * self.shape.dense_parameters()
            dense += (stage.first + stage.last) * self.shape.vocab * self.shape.hidden
            experts = stage.moe * self.shape.experts * self.shape.expert_parameters()
            owned = dense / layout.shard / layout.data
            owned += experts / (layout.expert * layout.shard * layout.copies)
            parts.append(self.profile.costs["memory"].ms(owned * _UPDATE_BYTES))
        return max(parts)


@dataclass(frozen=True, slots=True)
class Kinds:
    """The passes of one kind of block, with and without gradient sums.

    `plain` is for all micro-batches of a step but the last one, `last` for that one.
    """

    plain: Proposal
    last: Proposal


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The plans of a step."""

    step: Step
    experts: Kinds
    alone: Kinds  # of passes that a "paired" plan leaves without a partner; else `experts`
    dense: Kinds | None  # of the first blocks, where they have no experts

    @property
    def paired(self) -> bool:
        """Whether forward and backward passes run at once."""
        return "pair" in self.experts.plain.passes

    def pieces(self, name: str, *, is_last: bool) -> list[tuple[Proposal, str]]:
        """Return who plans "forward", "backward" or "pair" of blocks with experts, and without."""
        kinds = self.experts if name == "pair" or not self.paired else self.alone
        found = [(kinds.last if is_last else kinds.plain, name)]
        if self.dense:
            dense = self.dense.last if is_last else self.dense.plain
            names = ("forward", "backward") if name == "pair" else (name,)
            found += [(dense, part) for part in names]
        return found


def plan_step(step: Step, policy: str) -> StepPlan:
    """Plan a step with one policy, or with the best ("auto").

    Raises:
        ConfigError: as `propose`.
    """
    if policy == "auto":
        return choose_plan([(plan, predict_step(plan)[0]) for plan in plan_all(step)])
    return complete_plan(step, propose(policy, step.problem(reduce=True)))


def plan_all(step: Step) -> list[StepPlan]:
    """Return the plan of every policy that can be used, in the order of `POLICIES`."""
    return [complete_plan(step, last) for last in propose_all(step.problem(reduce=True))]


def choose_plan(plans: Sequence[tuple[StepPlan, float]]) -> StepPlan:
    """Return the plan with the shortest step, and note why if it is the serial one.

    Args:
        plans: of one step, each with its predicted time; the serial one is among them.
    """
    best, least = min(plans, key=lambda item: item[1])
    serial, slow = next(item for item in plans if item[0].experts.last.policy == "serial")
    best, note = choice_note(best, least, serial, slow)
    last = replace(best.experts.last, note=note)
    return replace(best, experts=Kinds(best.experts.plain, last))


def complete_plan(step: Step, last: Proposal) -> StepPlan:
    """Return the plan of a step whose last micro-batch has this proposal.

    Args:
        step: what is planned.
        last: proposal of `step.problem(reduce=True)`.
    """

    def without(policy: str) -> Proposal:
        return propose(policy, step.problem(reduce=False))

    several = step.micro_batches > 1
    experts = Kinds(without(last.policy) if several else last, last)
    alone = experts
    if "pair" in last.passes:
        alone = Kinds(without("fsmoe"), propose("fsmoe", step.problem(reduce=True)))
    dense = None
    if step.shape.dense_layers:
        work = block_work(step.shape, step.profile, step.workload, dense=True)
        problem = replace(step.problem(reduce=True, blocks=1), work=work, max_chunks=1)
        dense = Kinds(
            propose_layer("fsmoe", replace(problem, reduce=False)),
            propose_layer("fsmoe", problem),
        )
    return StepPlan(step, experts, alone, dense)


@dataclass(frozen=True, slots=True)
class Slot:
    """What one pipeline stage does at one time: a forward pass, a backward pass, or both."""

    stage: int
    forward: int | None  # micro-batch
    backward: int | None
    start_ms: float
    end_ms: float


Duration = Callable[[int, int | None, int | None], float]


def pipeline_slots(
    stages: int, micro_batches: int, duration: Duration, hop_ms: float, *, paired: bool = False
) -> list[Slot]:
    """Play the order one forward, one backward.

    Args:
        stages: number of pipeline stages.
        micro_batches: of a step.
        duration: time of a slot, given stage, micro-batch of the forward and of the backward pass.
        hop_ms: time to hand a micro-batch on.
        paired: forward and backward passes of the middle of a step run at once.

    Returns:
        The slots in an order in which they can be worked out.
    """
    queues = [
        _stage_order(stages - 1 - stage, micro_batches, paired=paired) for stage in range(stages)
    ]
    done: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * stages
    slots: list[Slot] = []
    places = [0] * stages
    while len(slots) < sum(map(len, queues)):
        for stage, queue in enumerate(queues):
            while places[stage] < len(queue):
                forward, backward = queue[places[stage]]
                ready = _ready(done, stage, stages, (forward, backward), hop_ms)
                if ready is None:
                    break
                start = max(ready, clock[stage])
                end = clock[stage] = start + duration(stage, forward, backward)
                if forward is not None:
                    done["f", stage, forward] = end
                if backward is not None:
                    done["b", stage, backward] = end
                slots.append(Slot(stage, forward, backward, start, end))
                places[stage] += 1
    return slots


def _stage_order(
    behind: int, micro_batches: int, *, paired: bool
) -> list[tuple[int | None, int | None]]:
    """Return the passes of a stage with so many stages behind it."""
    early = min(behind + (1 if paired else 0), micro_batches)
    order: list[tuple[int | None, int | None]] = [(i, None) for i in range(early)]
    for i in range(early, micro_batches):
        order += [(i, i - early)] if paired else [(i, None), (None, i - early)]
    return order + [(None, i) for i in range(micro_batches - early, micro_batches)]


def _ready(
    done: dict[tuple[str, int, int], float],
    stage: int,
    stages: int,
    passes: tuple[int | None, int | None],
    hop_ms: float,
) -> float | None:
    """Return when the inputs of a slot are there, or None while that is not known."""
    forward, backward = passes
    ready = 0.0
    needs: list[tuple[tuple[str, int, int], float]] = []
    if forward is not None and stage > 0:
        needs.append((("f", stage - 1, forward), hop_ms))
    if backward is not None:
        needs.append((("f", stage, backward), 0.0))
        if stage < stages - 1:
            needs.append((("b", stage + 1, backward), hop_ms))
    for key, delay in needs:
        if key not in done:
            return None
        ready = max(ready, done[key] + delay)
    return ready


def predict_step(plan: StepPlan) -> tuple[float, list[Slot]]:
    """Return the time of a step in which all ranks are alike, and its slots."""
    step = plan.step
    stages = step.stages
    logits = step.logits().ms()
    known: dict[tuple[str, bool], list[float]] = {}

    def per_block(name: str, is_last: bool) -> list[float]:
        key = (name, is_last)
        if key not in known:
            known[key] = [
                proposal.passes[part].total_ms(step.profile.interference) / proposal.blocks
                for proposal, part in plan.pieces(name, is_last=is_last)
            ]
        return known[key]

    def duration(stage: int, forward: int | None, backward: int | None) -> float:
        name = slot_name(forward, backward)
        blocks = stages[stage]
        experts, *dense = per_block(name, backward == step.micro_batches - 1)
        passes = {"forward": 1, "backward": 2, "pair": 3}[name]
        return blocks.moe * experts + blocks.dense * sum(dense) + passes * logits * blocks.last

    slots = pipeline_slots(
        len(stages), step.micro_batches, duration, step.hop_ms, paired=plan.paired
    )
    return max(slot.end_ms for slot in slots) + step.update_ms(), slots


def slot_name(forward: int | None, backward: int | None) -> str:
    """Return "forward", "backward" or "pair"."""
    if forward is not None:
        return "forward" if backward is None else "pair"
    return "backward"


def exposed_step_ms(plan: StepPlan) -> float:
    """Return the communication of a step that no computation covers, on the fullest stage."""
    step = plan.step
    most = max(stage.moe for stage in step.stages)
    kinds = plan.experts
    blocks = kinds.plain.exposed_ms * (step.micro_batches - 1) + kinds.last.exposed_ms
    return most * blocks + step.hop_ms * 2 * (len(step.stages) - 1)
