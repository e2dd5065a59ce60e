"""Expert parallelism with the routing known before layer 0: every ticket of a batch made at once.

With a pre-gate, or a recorded route, the experts of all layers are known when the tokens are. One
collective of [micro-batches, layers, experts] counts then replaces the exchange of counts in every
layer, and the one host synchronisation behind it those of the layers: permutations, splits and
landing offsets lie ready. Activation checkpointing uses the same tickets again, so that nothing is
exchanged twice and the recomputed routing is the routing.

Read first: `routers/ahead/plan.py` (the routes), `dispatch.py` (tickets).

Shapes:  L MoE layers   T tokens on this rank   K experts per token
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.profiler import record_function

from gatewise.moe.dispatch import Dispatcher, Piece, Ticket, cut_pieces
from gatewise.routers.ahead.plan import RoutePlan

__all__ = ["BatchPlan", "StalePlanError", "plan_tickets"]


class StalePlanError(RuntimeError):
    """A plan was made with other parameters of the pre-gate than those of now."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The routes of one micro-batch and, where ranks agreed on them ahead, its tickets."""

    route: RoutePlan
    tickets: tuple[tuple[Ticket, ...], ...] | None = None  # [layer][chunk]; None: layer by layer

    def layer(self, index: int) -> tuple[Ticket, ...] | None:
        """Return the tickets of MoE layer `index`, one per chunk."""
        return None if self.tickets is None else self.tickets[index]

    def check_version(self, version: int) -> None:
        """Raise `StalePlanError` unless the pre-gate is still as it was when it planned."""
        if self.route.version is not None and self.route.version != version:
            raise StalePlanError(
                f"the plan was made with version {self.route.version} of the pre-gate's "
                f"parameters, which are at version {version} now; plan again after every update"
            )


def plan_tickets(
    routes: Sequence[RoutePlan], dispatcher: Dispatcher, *, chunks: Sequence[int]
) -> list[BatchPlan]:
    """Make the tickets of all layers of several micro-batches, in one collective.

    Args:
        routes: of each micro-batch; on all ranks equally many.
        dispatcher: of any layer: all have the same experts on the same ranks.
        chunks: into how many each layer's schedule cuts the tokens.

    Returns:
        One plan per route, in order.
    """
    pieces: list[Piece] = []
    spans: list[list[slice]] = []  # of each micro-batch, for each layer its tickets' places
    for route in routes:
        same = route.expert_LTK.shape[0] == 1
        places: dict[tuple[int, int], slice] = {}  # layers that decide and cut alike share tickets
        spans.append([])
        for layer, count in enumerate(chunks):
            key = (0 if same else layer, count)
            if key not in places:
                cut = cut_pieces(route.layer(layer).expert_TK, count)
                places[key] = slice(len(pieces), len(pieces) + count)
                pieces += cut
            spans[-1].append(places[key])
    with record_function("moe.plan"):
        tickets = dispatcher.prepare(pieces, may_drop=True)
    return [
        BatchPlan(route, tuple(tuple(tickets[span]) for span in layers))
        for route, layers in zip(routes, spans, strict=True)
    ]
