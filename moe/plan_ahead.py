"""Expert parallelism with the routing known before layer 0: every ticket of a batch made at once.

With a pre-gate, or a recorded route, the experts of all layers are known when the tokens are. One
collective of [micro-batches, layers, experts] counts then replaces the exchange of counts in every
layer, and the one host synchronisation behind it those of the layers: permutations, splits and
landing offsets lie ready. Activation checkpointing uses the same tickets again, so that nothing is
exchanged twice and the recomputed routing is the routing.

Read first: `routers/ahead/plan.py` (the routes), `tickets.py`.

Shapes:  L MoE layers   T tokens on this rank   K experts per token
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.profiler import record_function

from gatewise.moe.dispatch import Dispatcher, Piece
from gatewise.moe.stages import Schedule
from gatewise.moe.tickets import PassPieces, PassTickets
from gatewise.parallel.schedule.executor import Execution
from gatewise.routers.ahead.plan import RoutePlan

__all__ = ["BatchPlan", "StalePlanError", "plan_tickets"]

_Key = tuple[int, int, PassPieces]  # micro-batch, layer that decides, how it is cut


class StalePlanError(RuntimeError):
    """A plan was made with other parameters of the pre-gate than those of now."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The routes of one micro-batch and, where ranks agreed on them ahead, its tickets."""

    route: RoutePlan
    tickets: tuple[PassTickets, ...] | None = None  # of each layer; None: layer by layer

    def layer(self, index: int) -> PassTickets | None:
        """Return the tickets of MoE layer `index`."""
        return None if self.tickets is None else self.tickets[index]

    def check_version(self, version: int) -> None:
        """Raise `StalePlanError` unless the pre-gate is still as it was when it planned."""
        if self.route.version is not None and self.route.version != version:
            raise StalePlanError(
                f"the plan was made with version {self.route.version} of the pre-gate's "
                f"parameters, which are at version {version} now; plan again after every update"
            )


def plan_tickets(
    routes: Sequence[RoutePlan],
    dispatcher: Dispatcher,
    *,
    schedules: Sequence[Schedule],
    execution: Execution | None = None,
) -> list[BatchPlan]:
    """Make the tickets of all layers of several micro-batches, in one collective.

    Args:
        routes: of each micro-batch; on all ranks equally many.
        dispatcher: of any layer: all have the same experts on the same ranks.
        schedules: of each layer; they say how both passes cut the tokens.
        execution: of the layers; its recorder gets when the ranks agreed.

    Returns:
        One plan per route, in order.
    """
    pieces: list[Piece] = []
    places: dict[_Key, slice] = {}  # layers that decide and cut alike share tickets
    keys: list[list[_Key]] = []  # of each micro-batch, for each layer
    for number, route in enumerate(routes):
        same = route.expert_LTK.shape[0] == 1
        keys.append([])
        for layer, schedule in enumerate(schedules):
            cuts = PassPieces.of(schedule)
            key = (number, 0 if same else layer, cuts)
            keys[-1].append(key)
            if key not in places:
                cut = cuts.cut(route.layer(layer).expert_TK)
                places[key] = slice(len(pieces), len(pieces) + len(cut))
                pieces += cut
    watched = (execution or Execution()) if dispatcher.moves else Execution()
    with record_function("moe.plan"):
        with watched.communication("exchange_counts"):
            prepared = dispatcher.prepare(pieces, may_drop=True)()
        tickets = {key: key[2].tickets(prepared[place]) for key, place in places.items()}
    return [
        BatchPlan(route, tuple(tickets[key] for key in layers))
        for route, layers in zip(routes, keys, strict=True)
    ]
