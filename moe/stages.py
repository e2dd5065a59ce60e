"""The stages of the MoE layer's passes, and the plans by which they run.

Read `parallel/schedule/plan.py` first. Each stage is arithmetic of this rank (lane "compute"), or
moves rows between nodes ("inter") or within a node ("intra"):

    forward   order -> dispatch -> [gather ->] experts -> [scatter ->] collect -> combine
    backward  combine_grad -> collect_grad -> [scatter_grad ->] experts_data
              -> [gather_grad ->] dispatch_grad -> order_grad
              experts_weights, and [reduce_window], at any time

What stands in brackets is there only where it has work: `gather` and `scatter` where the ranks of a
node split the width of each expert, `reduce_window` where slices of the sum of other gradients
travel during the pass. `experts_weights` needs `experts_data` and nobody waits for it, so it can
hide `dispatch_grad`; `reduce_window` needs nothing.

A plan of `moe/planning` knows the stages of a whole block; `Schedule.of` leaves out those that do
not belong to the layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gatewise.parallel.schedule.executor import PlanRunner
from gatewise.parallel.schedule.plan import Lane, Plan, Stage, StageGraph, serial_plan

__all__ = [
    "BACKWARD",
    "FORWARD",
    "Schedule",
    "backward_graph",
    "forward_graph",
]

_FORWARD: tuple[tuple[str, Lane], ...] = (
    ("order", "compute"),
    ("dispatch", "inter"),
    ("gather", "intra"),
    ("experts", "compute"),
    ("scatter", "intra"),
    ("collect", "inter"),
    ("combine", "compute"),
)
_BACKWARD: tuple[tuple[str, Lane], ...] = (
    ("combine_grad", "compute"),
    ("collect_grad", "inter"),
    ("scatter_grad", "intra"),
    ("experts_data", "compute"),
    ("gather_grad", "intra"),
    ("dispatch_grad", "inter"),
    ("order_grad", "compute"),
)
_WITHIN_NODE = ("gather", "scatter", "scatter_grad", "gather_grad")


def forward_graph(*, is_sharded: bool = False) -> StageGraph:
    """Return the stages of the forward pass.

    Args:
        is_sharded: the ranks of a node split the width of each expert.
    """
    return StageGraph(tuple(_chain(_FORWARD, is_sharded)))


def backward_graph(*, is_sharded: bool = False, reduce: tuple[float, ...] = ()) -> StageGraph:
    """Return the stages of the backward pass.

    Args:
        is_sharded: the ranks of a node split the width of each expert.
        reduce: slices of the sum of other gradients, as parts of what the pass sends; they sum
            to 1.
    """
    stages = list(_chain(_BACKWARD, is_sharded))
    # listed before the last stage, so that a serial plan computes while the rows travel
    stages.insert(-1, Stage("experts_weights", "compute", ("experts_data",)))
    if reduce:
        stages.append(Stage("reduce_window", "inter", (), reduce))
    return StageGraph(tuple(stages))


def _chain(rows: Iterable[tuple[str, Lane]], is_sharded: bool) -> Iterable[Stage]:
    before: tuple[str, ...] = ()
    for name, lane in rows:
        if is_sharded or name not in _WITHIN_NODE:
            yield Stage(name, lane, before)
            before = (name,)


FORWARD, BACKWARD = forward_graph(), backward_graph()


@dataclass(frozen=True, slots=True)
class Schedule:
    """The plans of both passes; each cuts the tokens as it likes.

    Raises:
        ValueError: if a plan is of another graph, or a graph of another layer.
    """

    forward: Plan
    backward: Plan
    forward_graph: StageGraph = FORWARD
    backward_graph: StageGraph = BACKWARD
    runners: tuple[PlanRunner, PlanRunner] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_stages("forward", self.forward_graph, forward_graph(is_sharded=self.is_sharded))
        _check_stages(
            "backward",
            self.backward_graph,
            backward_graph(is_sharded=self.is_sharded, reduce=self.reduce_shares),
        )
        runners = (
            PlanRunner(self.forward_graph, self.forward),
            PlanRunner(self.backward_graph, self.backward),
        )
        object.__setattr__(self, "runners", runners)  # frozen, and made from the fields alone

    @property
    def is_sharded(self) -> bool:
        """Whether the passes gather and scatter rows within a node."""
        return any(stage.name == "gather" for stage in self.forward_graph.stages)

    @property
    def reduce_shares(self) -> tuple[float, ...]:
        """The slices of other gradients that travel during the backward pass."""
        for stage in self.backward_graph.stages:
            if stage.name == "reduce_window":
                return stage.shares or (1.0,)
        return ()

    @staticmethod
    def serial(chunks: int = 1, *, is_sharded: bool = False) -> "Schedule":
        """Return the schedule that finishes each chunk before the next."""
        forward, backward = (
            forward_graph(is_sharded=is_sharded),
            backward_graph(is_sharded=is_sharded),
        )
        return Schedule(
            serial_plan(forward, chunks), serial_plan(backward, chunks), forward, backward
        )

    @staticmethod
    def of(
        forward: tuple[StageGraph, Plan], backward: tuple[StageGraph, Plan], *, is_sharded: bool
    ) -> "Schedule":
        """Return what plans of whole blocks say about the layer of experts.

        Args:
            forward: stages and plan of a block's forward pass.
            backward: the same of its backward pass.
            is_sharded: the ranks of a node split the width of each expert.

        Raises:
            ValueError: if a stage of the layer is missing.
        """
        graphs = []
        for name, graph, wanted in (
            ("forward", forward[0], forward_graph(is_sharded=is_sharded)),
            ("backward", backward[0], backward_graph(is_sharded=is_sharded, reduce=(1.0,))),
        ):
            own = graph.restrict(stage.name for stage in wanted.stages)
            if is_sharded != any(stage.name in _WITHIN_NODE for stage in graph.stages):
                raise ValueError(
                    f"the {name} plan is of a layer whose experts are "
                    f"{'whole' if is_sharded else 'split within nodes'}, this layer's are "
                    f"{'split' if is_sharded else 'whole'}; plan for this layout"
                )
            graphs.append(own)
        return Schedule(
            forward[1].restrict(graphs[0]), backward[1].restrict(graphs[1]), graphs[0], graphs[1]
        )


def _check_stages(name: str, graph: StageGraph, wanted: StageGraph) -> None:
    """Raise `ValueError` unless a graph has the wanted stages and respects what they need."""
    have = {stage.name: stage for stage in graph.stages}
    differing = sorted({stage.name for stage in wanted.stages} ^ have.keys())
    if differing:
        raise ValueError(
            f"the {name} plan is of another layer: it and this layer differ in the stages "
            f"{', '.join(differing)}; make a plan of this layer's graph"
        )
    for stage in wanted.stages:
        own = have[stage.name]
        if (own.lane == "compute") != (stage.lane == "compute"):
            raise ValueError(
                f"the {name} plan has {stage.name} in lane {own.lane}; it belongs to {stage.lane}"
            )
        missing = set(stage.after) - graph.ancestors(stage.name)
        if missing:
            raise ValueError(
                f"the {name} plan lets {stage.name} start without {', '.join(sorted(missing))}, "
                "which it needs; make a plan of this layer's graph"
            )
