"""Tickets: how one rank's rows are sorted and cut, without any ranks."""

import pytest
import torch
from torch import Tensor

from gatewise.moe.dispatch import (
    AllToAllDispatcher,
    LocalDispatcher,
    _expert_major,
    cut_pieces,
)
from gatewise.moe.ops.permute import gather_rows
from gatewise.parallel.collectives import Group, Traffic


def choices(num_tokens: int, num_experts: int, top_k: int, dropped: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    lost_TK = torch.rand(num_tokens, top_k, generator=generator) < dropped
    return expert_TK.masked_fill(lost_TK, -1)


@pytest.mark.parametrize("dropped", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_ticket_holds_each_kept_pair_once_by_expert_then_token(
    num_tokens: int, dropped: float, chunks: int
) -> None:
    expert_TK = choices(num_tokens, 5, 2, dropped)
    cuts = [slice(num_tokens * i // chunks, num_tokens * (i + 1) // chunks) for i in range(chunks)]
    tickets = LocalDispatcher(5).prepare(cut_pieces(expert_TK, chunks), may_drop=dropped > 0)()
    assert [ticket.tokens for ticket in tickets] == cuts
    for ticket in tickets:
        mine_TK = expert_TK[ticket.tokens]
        wanted = sorted(
            (expert, token, choice)
            for token, row in enumerate(mine_TK.tolist())
            for choice, expert in enumerate(row)
            if expert >= 0
        )
        assert ticket.token_N.tolist() == [token for _, token, _ in wanted]
        assert ticket.order_N.tolist() == [2 * token + choice for _, token, choice in wanted]
        counts = [sum(expert == e for expert, _, _ in wanted) for e in range(5)]
        assert ticket.end_e.tolist() == torch.tensor(counts).cumsum(0).tolist()
        assert ticket.counts in (None, counts)
        for row, (_, token, choice) in enumerate(wanted):
            assert ticket.inverse_TK[token, choice] == row
        assert int((ticket.inverse_TK < 0).sum()) == mine_TK.numel() - len(wanted)


def test_local_rows_are_handed_on_without_a_copy() -> None:
    dispatcher = LocalDispatcher(3)
    (ticket,) = dispatcher.prepare(cut_pieces(choices(4, 3, 1), 1), may_drop=False)()
    rows_ND = gather_rows(torch.randn(4, 2), ticket.token_N)
    assert dispatcher.send(rows_ND, ticket).wait() is rows_ND
    assert dispatcher.give_back(rows_ND, ticket).wait() is rows_ND


def test_expert_major_order_is_by_expert_then_rank_then_token() -> None:
    count_Pe = torch.tensor([[2, 0, 1], [1, 3, 0], [0, 0, 0], [1, 1, 2]])
    received = [
        (expert, rank, row)
        for rank, counts in enumerate(count_Pe.tolist())
        for expert, count in enumerate(counts)
        for row in range(count)
    ]
    arrange_R, restore_R = _expert_major(count_Pe.unsqueeze(1))
    assert [received[i] for i in arrange_R.tolist()] == sorted(received)
    assert arrange_R[restore_R].tolist() == list(range(len(received)))
    for empty_Pe in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)):
        assert all(index_R.shape == (0,) for index_R in _expert_major(empty_Pe.unsqueeze(1)))


def test_experts_that_the_ranks_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts is 6, which the group's 4 ranks"):
        AllToAllDispatcher(6, Group(None, 0, 4, Traffic()))
