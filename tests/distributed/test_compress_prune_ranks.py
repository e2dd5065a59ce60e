"""Pruned choices are not sent: two ranks of experts give what one gives, with fewer rows."""

from collections.abc import Callable, Sequence

import pytest
import torch
from spread_layers import HIDDEN, spread, whole_layer

from gatewise.compression.config import Protect, PruneRule
from gatewise.compression.protection import Protection
from gatewise.compression.pruning import LayerPruner, LayerRule
from gatewise.moe.dispatch import AllToAllDispatcher, Piece, Ticket
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import make_groups
from gatewise.routers.api import RoutingContext
from ranks import run_ranks

TOP_K = 3


class CountingDispatcher(AllToAllDispatcher):
    """Notes how many rows leave."""

    sent = 0

    def prepare(self, pieces: Sequence[Piece], *, may_drop: bool) -> Callable[[], list[Ticket]]:
        tickets = super().prepare(pieces, may_drop=may_drop)()
        self.sent += sum(sum(ticket.send) for ticket in tickets)
        return lambda: tickets


def pruner(mu: float) -> LayerPruner:
    rule = LayerRule(0, 0.0, ratio=(0.0, mu, mu))
    protection = Protection(Protect.l1, 0.2, 512, 0.0)
    return LayerPruner(PruneRule.ratio, rule, protection, rescale=True)


@torch.no_grad()
def check(rank: int, world: int) -> None:
    groups = make_groups(ParallelConfig(ranks=world, expert=world))
    whole = whole_layer(top_k=TOP_K).eval()
    layer = spread(whole, groups.experts, CountingDispatcher).eval()
    dispatcher = layer.dispatcher
    assert isinstance(dispatcher, CountingDispatcher)
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(20 - 7 * rank, HIDDEN, generator=generator, dtype=torch.float64)
    padding_T = torch.zeros(len(x_TD), dtype=torch.bool)
    padding_T[-3:] = True
    context = RoutingContext(padding_T=padding_T)
    dense_TD, _, _ = layer(x_TD, context, 0)
    all_rows = dispatcher.sent
    assert all_rows == TOP_K * (len(x_TD) - 3)
    for mu in (0.0, 0.6):
        dispatcher.sent = 0
        layer.prune, whole.prune = pruner(mu), pruner(mu)
        wanted_TD, routing, _ = whole(x_TD, context, 0)
        found_TD, _, _ = layer(x_TD, context, 0)
        torch.testing.assert_close(found_TD, wanted_TD)
        kept = int((routing.expert_TK >= 0).sum())
        assert dispatcher.sent == kept
        if mu:
            assert kept < all_rows
        else:
            assert torch.equal(found_TD, dense_TD)


@pytest.mark.dist
def test_c25_to_c32_dropped_choices_are_not_sent_between_ranks() -> None:
    run_ranks(check)
