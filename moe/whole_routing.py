"""Routing where a sequence lies on several ranks and the router looks at all of it.

Most routers decide token by token and need nothing of this. Those that balance or compete within a
sequence see whole ones: every rank of the tensor group routes all their tokens and keeps its own.

Shapes:  T tokens on this rank   E experts, all ranks   K experts per token   B sequences
"""

from dataclasses import replace

from torch import Tensor

from gatewise.parallel.sequence import SequenceSplit
from gatewise.routers.api import Load, Router, Routing, RoutingContext

__all__ = ["route_whole"]


def route_whole(
    router: Router, x_TD: Tensor, context: RoutingContext, layer: int, split: SequenceSplit
) -> tuple[Routing, RoutingContext]:
    """Route whole sequences and return the part of this rank's tokens.

    Losses are those of the whole sequences, equal on all ranks of the group: the mean over ranks
    counts each once. Sums over tokens (load, health) are reported by the first rank alone.

    Args:
        router: decides; a recurrent one's state stays that of the whole sequences.
        x_TD: this rank's tokens.
        context: theirs.
        layer: of the model.
        split: how the sequences lie on ranks.
    """
    batch = context.sequences

    def gather(rows: Tensor) -> Tensor:
        return split.whole(rows.unflatten(0, (batch, -1))).flatten(0, 1)

    def own(rows: Tensor) -> Tensor:
        return split.own(rows.unflatten(0, (batch, -1))).flatten(0, 1)

    padding_T, token_ids, noise = context.padding_T, context.token_ids, context.noise
    whole = replace(
        context,
        padding_T=None if padding_T is None else gather(padding_T.byte()).bool(),
        token_ids=None if token_ids is None else gather(token_ids),
        noise=None if noise is None else replace(noise, part=0, parts=1),
    )
    routing, after = router(gather(x_TD), whole, layer)
    assert routing.slots is None
    counts = float(split.part == 0)
    load = routing.load
    if load is not None:
        load = Load(
            load.count_E * counts,
            load.score_E * counts,
            load.tokens * counts,
            None if load.margin_EM is None else load.margin_EM * counts,
        )
    return replace(
        routing,
        expert_TK=own(routing.expert_TK),
        weight_TK=own(routing.weight_TK),
        logits_TE=None if routing.logits_TE is None else own(routing.logits_TE),
        load=load,
        health={name: value * counts for name, value in routing.health.items()},
    ), replace(context, state_TH=after.state_TH)
