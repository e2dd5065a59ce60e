"""From the settings of a run to the plans of its MoE layers, before any rank starts.

Read `schedule_config.py` and `moe/planning/policies.py` first. Every rank makes the same plan of
the same settings and the same profile.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gatewise.moe.config import Activation
from gatewise.moe.planning.beside import propose_beside
from gatewise.moe.planning.block import Workload, block_work
from gatewise.moe.planning.policies import LAYER_POLICIES, Pass, Problem, Proposal
from gatewise.moe.planning.shapes import ModelShape
from gatewise.moe.planning.stated import stated_schedule
from gatewise.moe.planning.whole import choose, propose
from gatewise.moe.stages import Schedule, backward_graph, forward_graph
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Amount, Cost
from gatewise.parallel.schedule.profiles import Layout, Profile, read_profile
from gatewise.parallel.schedule.timeline import Timeline
from gatewise.training.config import TrainConfig

__all__ = ["TrainingSchedule", "known_profile", "layer_problem", "plan_schedule", "run_layout"]


@dataclass(frozen=True, slots=True)
class TrainingSchedule:
    """The plans of every MoE layer, and what is predicted of them."""

    policy: str
    schedule: Schedule
    predicted: Mapping[str, Timeline]  # of one layer's "forward" and "backward"; empty: unknown
    window_bytes: float = 0.0  # of gradients, summed within each layer's backward pass
    note: str = ""
    parts: int = 1  # of a micro-batch, side by side

    def __str__(self) -> str:
        if self.parts > 1:
            text = f"{self.policy}, {self.parts} parts of a micro-batch side by side"
        else:
            forward, backward = self.schedule.forward.chunks, self.schedule.backward.chunks
            text = f"{self.policy}, {forward} chunks forward, {backward} backward"
        return f"{text} ({self.note})" if self.note else text


def known_profile(config: TrainConfig) -> Profile | None:
    """Return the costs that the settings name a file of.

    Raises:
        ConfigError: if the file cannot be read, or is of another layout.
    """
    if config.schedule.profile is None or config.schedule.measures:
        return None
    path = Path(config.schedule.profile).expanduser()
    profile, layout = read_profile(path), run_layout(config)
    if profile.layout.ranks_per_node != layout.ranks_per_node:
        raise ConfigError(
            f"schedule.profile {path} is of nodes of {profile.layout.ranks_per_node} ranks, this "
            f"run has nodes of {layout.ranks_per_node}; set parallel.node to the ranks of a node, "
            "or schedule.profile=measure"
        )
    profile.require(layout, name=f"schedule.profile {path}")
    return profile


def plan_schedule(
    config: TrainConfig, profile: Profile | None, *, number_bytes: int = 4
) -> TrainingSchedule:
    """Return the schedule of a run's MoE layers.

    Args:
        config: checked settings.
        profile: costs to plan with, of this layout; None: the settings state the chunks.
        number_bytes: of one number that travels.
    """
    asked = config.schedule
    if asked.parts > 1:
        return _side_by_side(config, asked.parts)
    if profile is None:
        schedule = stated_schedule(
            asked.policy, *asked.chunks, is_sharded=config.parallel.expert_shard > 1
        )
        return TrainingSchedule(asked.policy, schedule, {})
    problem = layer_problem(config, profile, number_bytes)
    if asked.policy == "auto":
        names = (*LAYER_POLICIES, "search")
        beside = () if config.excludes_parts() or config.feels_parts() else propose_beside(problem)
        proposal = choose([*(propose(name, problem) for name in names), *beside])
    elif asked.policy == "whole_block":
        proposal = min(propose_beside(problem), key=lambda proposal: proposal.predicted_ms)
    else:
        proposal = propose(asked.policy, problem)
    if proposal.policy == "whole_block":
        return _side_by_side(config, proposal.chunks("forward"), proposal.note)
    return _of_layer(proposal, problem, is_sharded=profile.layout.shard > 1)


def _side_by_side(config: TrainConfig, parts: int, note: str = "") -> TrainingSchedule:
    """Return the schedule of parts side by side, each of which a layer takes in one piece."""
    serial = Schedule.serial(is_sharded=config.parallel.expert_shard > 1)
    return TrainingSchedule("whole_block", serial, {}, note=note, parts=parts)


def run_layout(config: TrainConfig) -> Layout:
    """Return how the ranks of a run are used; its degrees have been checked to fit."""
    parallel = config.parallel
    return Layout(
        parallel.ranks,
        parallel.ranks_per_node,
        expert=parallel.expert,
        shard=parallel.expert_shard,
    )


def layer_problem(config: TrainConfig, profile: Profile, number_bytes: int) -> Problem:
    """Return what the policies are asked: a block of this model, one micro-batch of one rank."""
    tensor = config.parallel.tensor
    share = config.batch.sequences * tensor // config.parallel.ranks
    sequences = config.batch.micro or share
    tokens = sequences * config.data.sequence_length // tensor
    work = block_work(
        _shape(config),
        profile,
        Workload(
            max(1, sequences * profile.layout.shard // tensor),
            config.data.sequence_length,
            activation_bytes=number_bytes,
            recompute=config.recompute,
        ),
    )
    # a layer's plan lists every stage, also those that cost nothing in this layout
    is_sharded = profile.layout.shard > 1
    nothing = Amount(Cost(0.0, 0.0), 1.0)
    work = replace(
        work,
        forward={s.name: nothing for s in forward_graph(is_sharded=is_sharded).stages}
        | dict(work.forward),
        backward={s.name: nothing for s in backward_graph(is_sharded=is_sharded).stages}
        | dict(work.backward),
    )
    return Problem(
        work,
        profile.interference,
        min(config.schedule.max_chunks, tokens),
        blocks=len(config.model.moe_layers()),
        sequences=sequences,
        micro_batches=share // sequences,
    )


def _shape(config: TrainConfig) -> ModelShape:
    model = config.model
    return ModelShape(
        name=config.name,
        source="settings of a run",
        layers=model.layers,
        hidden=model.hidden,
        vocab=config.data.vocab_size,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        head_dim=model.head_width(),
        experts=model.num_experts,
        top_k=model.top_k,
        expert_width=model.expert_width,
        shared_experts=model.shared_experts,
        matrices=3 if model.activation is Activation.swiglu else 2,
        tied_embeddings=model.tie_embeddings,
    )


def _of_layer(proposal: Proposal, problem: Problem, *, is_sharded: bool) -> TrainingSchedule:
    """Leave out of a block's plan what does not belong to the layer of experts."""
    if proposal.policy == "serial":  # one chunk; only weight gradients run beside communication
        schedule = Schedule.serial(is_sharded=is_sharded)
    else:
        try:
            first, second = (
                (proposal.passes[name].graph, proposal.passes[name].plan)
                for name in ("forward", "backward")
            )
            schedule = Schedule.of(first, second, is_sharded=is_sharded)
        except ValueError as error:
            raise ConfigError(f"schedule.policy is {proposal.policy}: {error}") from error
    predicted = {}
    for name, graph, plan in (
        ("forward", schedule.forward_graph, schedule.forward),
        ("backward", schedule.backward_graph, schedule.backward),
    ):
        own = Pass(graph, plan, proposal.passes[name].amounts)
        predicted[name] = own.timeline(problem.interference)
    window = proposal.passes["backward"].amounts.get("reduce_window")
    window_bytes = window.size if window and schedule.reduce_shares else 0.0
    return TrainingSchedule(proposal.policy, schedule, predicted, window_bytes, proposal.note)
