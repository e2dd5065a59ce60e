"""Which layout a number of ranks should take: enumerated, fitted into memory, predicted.

Read `step.py` and `memory.py` first. Every layout whose degrees divide what they split is a
candidate. Those that fit into memory are estimated halfway between no overlap and the bound of
the fullest resource; the best of them are predicted with a quick plan; and the best of these are
the answer, which the caller plans with care.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gatewise.moe.planning.block import Workload, block_work
from gatewise.moe.planning.memory import Memory, rank_memory
from gatewise.moe.planning.policies import bound_ms, propose_layer
from gatewise.moe.planning.shapes import ModelShape
from gatewise.moe.planning.step import Step, complete_plan, predict_step
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cluster import Cluster, cluster_profile, point_to_point
from gatewise.parallel.schedule.profiles import Layout, Profile

__all__ = ["Candidate", "Wish", "best_layouts", "check_layout", "make_step"]

_USABLE = 0.92  # of the memory; the rest is the allocator's and the libraries'
_QUICK_CHUNKS = 2  # degrees that the quick plan looks at
_MAX_PIPELINE = 64


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for; None leaves the choice open."""

    ranks: int
    batch: int  # sequences of a step, over all ranks
    length: int  # tokens of a sequence
    expert: int | None = None
    shard: int | None = None
    pipeline: int | None = None
    micro_batch: int | None = None  # sequences of a micro-batch
    recompute: bool | None = None
    load: float = 1.0  # rows of the fullest rank over the mean, to plan for
    max_chunks: int = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout with its memory and its quick prediction."""

    step: Step
    memory: Memory
    quick_ms: float


def check_layout(shape: ModelShape, layout: Layout) -> None:
    """Raise `ConfigError` unless the layout can hold the model."""
    for name, degree, what, size in (
        ("expert", layout.expert, "experts", shape.experts),
        ("shard", layout.shard, "attention heads", shape.heads),
    ):
        if size % degree:
            raise ConfigError(
                f"{name} is {degree}, which does not divide the {size} {what} of {shape.name}; "
                "choose a divisor"
            )
    if layout.expert % layout.expert_ranks_per_node:
        raise ConfigError(
            f"expert is {layout.expert}, which leaves a node's "
            f"{layout.ranks_per_node // layout.shard} ranks of a group partly used; choose a "
            "multiple or a divisor"
        )
    if layout.pipeline > shape.layers:
        raise ConfigError(
            f"pipeline is {layout.pipeline}, more than the {shape.layers} layers of {shape.name}; "
            "choose at most these"
        )


def make_step(
    shape: ModelShape,
    profile: Profile,
    wish: Wish,
    *,
    micro_batch: int,
    recompute: bool,
    cluster: Cluster | None = None,
) -> Step:
    """Return the step of a layout.

    Args:
        shape: the model.
        profile: costs and layout.
        wish: batch, length and chunks.
        micro_batch: sequences of a micro-batch.
        recompute: backward computes forward again.
        cluster: for the cost of handing on between pipeline stages.

    Raises:
        ConfigError: if the batch cannot be spread over the layout.
    """
    layout = profile.layout
    check_layout(shape, layout)
    share = layout.data * micro_batch
    if wish.batch % share:
        raise ConfigError(
            f"batch is {wish.batch}, which {layout.data} groups with micro-batches of "
            f"{micro_batch} do not divide; choose a multiple of {share}"
        )
    send = profile.costs["all_to_all"]
    if cluster is not None:
        apart = layout.ranks // layout.pipeline >= layout.ranks_per_node
        send = point_to_point(cluster, between_nodes=apart)
    workload = Workload(micro_batch, wish.length, load=wish.load, recompute=recompute)
    return Step(shape, profile, workload, wish.batch // share, send, wish.max_chunks)


def best_layouts(
    shape: ModelShape, cluster: Cluster, wish: Wish, *, most: int = 5
) -> list[Candidate]:
    """Return the layouts with the shortest quick prediction that fit into memory, best first.

    Raises:
        ConfigError: if no layout fits, with the least memory that one would need.
    """
    fitting: list[tuple[float, Step, Memory]] = []
    least: tuple[float, Layout] | None = None
    tried = 0
    for step in _steps(shape, cluster, wish):
        tried += 1
        memory = rank_memory(
            shape, step.profile.layout, step.workload, micro_batches=step.micro_batches
        )
        if least is None or memory.total_gb < least[0]:
            least = (memory.total_gb, step.profile.layout)
        if memory.total_gb <= cluster.memory_gb * _USABLE:
            fitting.append((_rough_ms(step), step, memory))
    if not fitting:
        if least is None:
            raise ConfigError(
                f"no layout of {wish.ranks} ranks of cluster {cluster.name} suits {shape.name} "
                f"with a batch of {wish.batch}; leave expert, shard, pipeline or micro_batch open, "
                "or change ranks or batch"
            )
        raise ConfigError(
            f"none of {tried} layouts of {wish.ranks} ranks fits into the {cluster.memory_gb:g} GB "
            f"of cluster {cluster.name}; the smallest ({least[1]}) needs {least[0]:.0f} GB: use "
            "more ranks or shorter sequences"
        )
    fitting.sort(key=lambda item: item[0])
    found = [Candidate(step, memory, _quick_ms(step)) for _, step, memory in fitting[: 2 * most]]
    return sorted(found, key=lambda candidate: candidate.quick_ms)[:most]


def _rough_ms(step: Step) -> float:
    """Estimate a step from its amounts alone, without making a plan."""
    problem = step.problem(reduce=False)
    amounts = [*problem.work.forward.values(), *problem.work.backward.values()]
    block = (sum(amount.ms() for amount in amounts) + bound_ms(problem)) / 2
    stages = step.stages
    dense = 0.0
    if step.shape.dense_layers:
        work = block_work(step.shape, step.profile, step.workload, dense=True)
        dense = sum(a.ms() for a in [*work.forward.values(), *work.backward.values()])
    logits = 3 * step.logits().ms()
    slowest = max(s.moe * block + s.dense * dense + s.last * logits for s in stages)
    turns = step.micro_batches + len(stages) - 1
    reduce = max(s.total for s in stages) * problem.work.reduce.ms() / 2
    return turns * slowest + 2 * step.hop_ms * (len(stages) - 1) + reduce + step.update_ms()


def _quick_ms(step: Step) -> float:
    """Predict a step with the staged order, few degrees and lanes that do not disturb."""
    quick = replace(step, max_chunks=min(step.max_chunks, _QUICK_CHUNKS))
    plan = complete_plan(quick, propose_layer("fsmoe", quick.problem(reduce=True)))
    return predict_step(plan)[0]


def _steps(shape: ModelShape, cluster: Cluster, wish: Wish) -> Iterator[Step]:
    """Yield the steps of every layout and micro-batch that can be, without looking at memory.

    With recomputation left open a layout is yielded with it only where it does not fit without.
    """
    for layout in _layouts(shape, cluster, wish):
        profile = cluster_profile(cluster, layout)
        for micro_batch in (wish.micro_batch,) if wish.micro_batch else (1, 2, 4):
            for recompute in (False, True) if wish.recompute is None else (wish.recompute,):
                try:
                    step = make_step(
                        shape,
                        profile,
                        wish,
                        micro_batch=micro_batch,
                        recompute=recompute,
                        cluster=cluster,
                    )
                except ConfigError:  # this layout does not suit the model or the batch
                    break
                yield step
                memory = rank_memory(shape, layout, step.workload, micro_batches=step.micro_batches)
                if memory.total_gb <= cluster.memory_gb * _USABLE:
                    break


def _layouts(shape: ModelShape, cluster: Cluster, wish: Wish) -> Iterator[Layout]:
    per_node = min(cluster.ranks_per_node, wish.ranks)
    for shard in _degrees(wish.shard, per_node):
        for expert in _degrees(wish.expert, shape.experts):
            if wish.ranks % (shard * expert):
                continue
            for pipeline in _degrees(wish.pipeline, wish.ranks // (shard * expert)):
                if pipeline > min(shape.layers, _MAX_PIPELINE):
                    continue
                try:
                    yield Layout(wish.ranks, per_node, expert, shard, pipeline)
                except ValueError:  # degrees that the user gave do not go together
                    continue


def _degrees(wish: int | None, whole: int) -> Sequence[int]:
    if wish is not None:
        return (wish,)
    return [degree for degree in range(1, whole + 1) if whole % degree == 0]
