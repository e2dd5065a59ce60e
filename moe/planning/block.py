"""One block of a model as stages with the amount of work in each, for one rank and micro-batch.

Read `parallel/schedule/plan.py` and `cost.py` first. A block is attention and a network; `shard`
ranks of a node split both, and gather and scatter rows around them. The stages of the experts
carry the names of `moe/compute.py`, so a plan made here restricts to a plan of the layer:

    forward   attention -> attention_scatter -> order -> dispatch -> gather -> experts -> scatter
              -> collect -> combine -> block_gather              (shared: beside dispatch)
    backward  block_gather_grad -> combine_grad -> collect_grad -> scatter_grad -> experts_data
              -> gather_grad -> dispatch_grad -> order_grad -> attention_scatter_grad
              -> attention_grad -> attention_weights     (experts_weights: after experts_data)

Source of the volumes: arXiv:2501.10714, section 3; backward computes twice what forward does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gatewise.moe.planning.shapes import ModelShape
from gatewise.parallel.schedule.cost import Amount
from gatewise.parallel.schedule.plan import Lane, Stage
from gatewise.parallel.schedule.profiles import Profile

__all__ = [
    "BACKWARD_TABLE",
    "FORWARD_TABLE",
    "REDUCE_STAGES",
    "BlockWork",
    "Workload",
    "block_work",
    "stages_of",
]

Row = tuple[str, Lane, tuple[str, ...]]
FORWARD_TABLE: tuple[Row, ...] = (
    ("attention", "compute", ()),
    ("attention_scatter", "intra", ("attention",)),
    ("feed_forward", "compute", ("attention_scatter",)),  # of a block without experts
    ("order", "compute", ("attention_scatter",)),
    ("dispatch", "inter", ("order",)),
    ("gather", "intra", ("dispatch",)),
    ("shared", "compute", ("order",)),
    ("experts", "compute", ("gather",)),
    ("scatter", "intra", ("experts",)),
    ("collect", "inter", ("scatter",)),
    ("combine", "compute", ("collect", "shared")),
    ("block_gather", "intra", ("combine", "feed_forward")),
)
BACKWARD_TABLE: tuple[Row, ...] = (
    ("block_gather_grad", "intra", ()),
    ("feed_forward_grad", "compute", ("block_gather_grad",)),
    ("combine_grad", "compute", ("block_gather_grad",)),
    ("collect_grad", "inter", ("combine_grad",)),
    ("scatter_grad", "intra", ("collect_grad",)),
    ("reduce_window", "inter", ()),  # gradients of the block that came before
    ("shared_grad", "compute", ("combine_grad",)),
    ("experts_data", "compute", ("scatter_grad",)),
    ("experts_weights", "compute", ("experts_data",)),
    ("gather_grad", "intra", ("experts_data",)),
    ("dispatch_grad", "inter", ("gather_grad",)),
    ("order_grad", "compute", ("dispatch_grad", "shared_grad")),
    ("attention_scatter_grad", "intra", ("order_grad", "feed_forward_grad")),
    ("reduce_dense", "inter", ()),
    ("attention_grad", "compute", ("attention_scatter_grad",)),
    ("attention_weights", "compute", ("attention_grad",)),
    ("reduce_end", "inter", ("attention_weights",)),
)
REDUCE_STAGES = ("reduce_window", "reduce_dense", "reduce_end")
# Stages of the layer of experts, which policies of layer scope cut; all others stay whole there.
_LAYER = frozenset(
    {
        "order",
        "dispatch",
        "gather",
        "shared",
        "experts",
        "scatter",
        "collect",
        "combine",
        "combine_grad",
        "collect_grad",
        "scatter_grad",
        "shared_grad",
        "experts_data",
        "experts_weights",
        "gather_grad",
        "dispatch_grad",
        "order_grad",
    }
)
_EXCHANGES = frozenset(("dispatch", "collect", "collect_grad", "dispatch_grad"))


@dataclass(frozen=True, slots=True)
class Workload:
    """What one micro-batch asks of the `shard` ranks that work on it together."""

    sequences: int
    length: int  # tokens of a sequence
    load: float = 1.0  # rows of the fullest rank over the mean
    activation_bytes: int = 2  # of one number that travels
    gradient_bytes: int = 4  # of one number in a gradient sum
    recompute: bool = False  # backward computes forward again

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "activation_bytes", "gradient_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.load >= 1:
            raise ValueError(f"load is {self.load}; it must be at least 1 (balanced)")

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.sequences * self.length


@dataclass(frozen=True, slots=True)
class BlockWork:
    """The amounts of one block by stage; a stage without work is not there."""

    forward: Mapping[str, Amount]
    backward: Mapping[str, Amount]
    reduce: Amount  # the sum of this block's gradients over their copies
    exchange: Lane  # of dispatch and collect: intra where the expert group is one node


def block_work(
    shape: ModelShape, profile: Profile, workload: Workload, *, dense: bool = False
) -> BlockWork:
    """Return the work of one block.

    Args:
        shape: the model.
        profile: costs, and the layout in which the block is split.
        workload: the micro-batch.
        dense: the block is one of the first, without experts.
    """
    layout, costs = profile.layout, profile.costs
    shard, tokens = layout.shard, workload.tokens
    plain = tokens * shape.hidden * workload.activation_bytes
    projections = shape.attention_parameters() * tokens / shard
    heads = shape.heads * (shape.query_dim + shape.head_value_dim)
    scores = tokens * workload.length / 2 * heads / shard  # causal: half of the square
    again = 1 if workload.recompute else 0

    def near(kind: str, size: float) -> Amount:
        return Amount(costs[kind], size if shard > 1 else 0.0)

    def compute(size: float, times: float = 1.0, kind: str = "experts") -> Amount:
        return Amount(costs[kind].scaled(times), size)

    forward = {
        "attention": compute(projections + scores, kind="attention"),
        "attention_scatter": near("reduce_scatter", plain),
        "block_gather": near("all_gather", plain),
    }
    backward = {
        "block_gather_grad": near("reduce_scatter", plain),
        "attention_scatter_grad": near("all_gather", plain),
        "attention_grad": compute(
            projections * (1 + again) + scores * (2 + again), kind="attention"
        ),
        "attention_weights": compute(projections, kind="attention"),
    }
    parameters = shape.attention_parameters() / shard + 2 * shape.hidden
    if dense:
        product = tokens * shape.hidden * shape.dense_width / shard
        forward["feed_forward"] = compute(product, shape.matrices)
        backward["feed_forward_grad"] = compute(product, shape.matrices * (2 + again))
        parameters += shape.dense_parameters() / shard
    else:
        _add_experts(shape, profile, workload, forward, backward)
        parameters += shape.router_parameters() + shape.shared_parameters() / shard
        if layout.copies > 1:
            parameters += shape.experts / layout.expert * shape.expert_parameters() / shard
    bytes_summed = parameters * workload.gradient_bytes if layout.data > 1 else 0.0
    return BlockWork(
        {name: amount for name, amount in forward.items() if amount.size},
        {name: amount for name, amount in backward.items() if amount.size},
        Amount(costs["all_reduce"], bytes_summed),
        "inter" if layout.expert_spans_nodes else "intra",
    )


def _add_experts(
    shape: ModelShape,
    profile: Profile,
    workload: Workload,
    forward: dict[str, Amount],
    backward: dict[str, Amount],
) -> None:
    layout, costs = profile.layout, profile.costs
    shard, tokens = layout.shard, workload.tokens
    number = workload.activation_bytes
    rows = shape.top_k * tokens * workload.load  # received by the shard group
    again = 1 if workload.recompute else 0
    exchange = Amount(
        costs["all_to_all"],
        rows * shape.hidden * number / shard if layout.expert > 1 else 0.0,
    )
    gathered = rows * shape.hidden * number if shard > 1 else 0.0
    gather = Amount(costs["all_gather"], gathered)
    scatter = Amount(costs["reduce_scatter"], gathered)
    product = rows * shape.hidden * shape.expert_width / shard
    shared = shape.shared_experts * tokens * shape.hidden * shape.expert_width / shard
    # rows are read and written once on the way in and once on the way out
    touched = (1 + shape.top_k) * tokens * shape.hidden * number / shard

    def products(size: float, factor: float = 1.0, part: str = "experts") -> Amount:
        cost = costs.get(part, costs["experts"])
        return Amount(cost.scaled(shape.matrices * factor), size)

    forward |= {
        "order": Amount(costs["memory"], touched),
        "dispatch": exchange,
        "gather": gather,
        "shared": products(shared),
        "experts": products(product),
        "scatter": scatter,
        "collect": exchange,
        "combine": Amount(costs["memory"], touched),
    }
    backward |= {
        "combine_grad": Amount(costs["memory"], touched),
        "collect_grad": exchange,
        "scatter_grad": gather,
        "shared_grad": products(shared, 2 + again),
        "experts_data": products(product, 1 + again, "experts_data"),
        "experts_weights": products(product, part="experts_weights"),
        "gather_grad": scatter,
        "dispatch_grad": exchange,
        "order_grad": Amount(costs["memory"], touched),
    }


def stages_of(
    table: Iterable[Row],
    present: Iterable[str],
    *,
    exchange: Lane = "inter",
    whole: bool = False,
    split_weights: bool = False,
    slices: int = 1,
    prefix: str = "",
    before: tuple[str, ...] = (),
) -> tuple[Stage, ...]:
    """Return the stages of a block, without those that have no work.

    Args:
        table: `FORWARD_TABLE` or `BACKWARD_TABLE`.
        present: names of the stages that have work.
        exchange: lane of dispatch and collect.
        whole: every stage is cut as the plan says; else only those of the layer of experts.
        split_weights: rows may travel on before the experts' weight gradients are done.
        slices: pieces of every gradient sum.
        prefix: put before every name, for graphs of several blocks.
        before: what the first stages need, named in full.
    """
    there = set(present)
    instead: dict[str, tuple[str, ...]] = {}  # of an absent stage: what stands for it
    stages = []
    for name, lane, after in table:
        found: list[str] = []
        for other in after:
            found += instead.get(other, (prefix + other,))
        if not after and name not in ("reduce_window", "reduce_dense"):
            found = list(before)
        needs = tuple(dict.fromkeys(found))
        if name not in there:
            instead[name] = needs
            continue
        data, weights = prefix + "experts_data", prefix + "experts_weights"
        if data in needs and name != "experts_weights" and not split_weights:
            needs = (*needs, weights)
        if name in REDUCE_STAGES:
            cut: tuple[float, ...] = (1.0 / slices,) * slices
        else:
            cut = () if whole or name in _LAYER else (1.0,)
        stages.append(Stage(prefix + name, exchange if name in _EXCHANGES else lane, needs, cut))
    return tuple(stages)
