"""Ways for rows to travel among ranks of several nodes; all give the same rows in the same order.

`direct` is one all-to-all. Where a node has several ranks of the group, fewer and larger messages
between nodes can be faster. `2dh` sends rows within the node to the rank whose place in its node
is that of the rank they are meant for, and from there to the other nodes; between nodes a message
then holds the rows of all ranks of a node. `1dh` passes everything through the first rank of each
node. Both copy rows between their stages.

Only the first stage starts at once; the others start when the rows are waited for, on every rank
in the same order.

Shapes:  N rows sent   R rows received   D width   n nodes   L ranks of the group on a node
Source:  1DH: HetuMoE, arXiv:2203.14685; 2DH: Tutel, arXiv:2206.03382.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

from gatewise.parallel.collectives import Group, RowExchange, Rows
from gatewise.parallel.dims import ExpertGroups

__all__ = ["exchange_rows"]

Key = TypeVar("Key")


def exchange_rows(
    x_ND: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    between: Sequence[Sequence[int]] | None,
    groups: ExpertGroups,
) -> Rows:
    """Start sending rows to the ranks of `groups.rows`.

    Args:
        x_ND: ordered by destination rank.
        send: rows for each rank.
        receive: rows from each rank.
        between: rows from each rank to each, [source][destination]; None where `groups.dispatch`
            is direct, which needs our own only.
        groups: who, and by which way.

    Returns:
        A handle; the rows are ordered by source rank.
    """
    if between is None:
        return RowExchange(x_ND, send, receive, groups.rows)
    return _ROUTES[groups.dispatch](x_ND, between, groups.local, groups.across)


class _Stages:
    """Exchanges of which each takes the rows of the one before."""

    def __init__(self, first: Rows, *others: Callable[[Tensor], Rows]) -> None:
        self._last = first
        self._others = list(others)

    def wait(self) -> Tensor:
        rows = self._last.wait()
        while self._others:
            self._last = self._others.pop(0)(rows)
            rows = self._last.wait()
        return rows


def _two_stages(
    x_ND: Tensor, between: Sequence[Sequence[int]], local: Group, across: Group
) -> Rows:
    nodes, places = range(across.size), range(local.size)
    node, place = across.rank, local.rank

    def count(source: tuple[int, int], target: tuple[int, int]) -> int:
        return between[source[0] * local.size + source[1]][target[0] * local.size + target[1]]

    me = (node, place)
    near_ND = _reorder(
        x_ND,
        {target: count(me, target) for target in product(nodes, places)},
        [(n, p) for p in places for n in nodes],
    )
    first = RowExchange(
        near_ND,
        [sum(count(me, (n, p)) for n in nodes) for p in places],
        [sum(count((node, p), (n, place)) for n in nodes) for p in places],
        local,
    )

    def onward(rows: Tensor) -> Rows:
        sizes = {(p, n): count((node, p), (n, place)) for p in places for n in nodes}
        return RowExchange(
            _reorder(rows, sizes, [(p, n) for n in nodes for p in places]),
            [sum(sizes[p, n] for p in places) for n in nodes],
            [sum(count((n, p), me) for p in places) for n in nodes],
            across,
        )

    return _Stages(first, onward)


def _one_leader(
    x_ND: Tensor, between: Sequence[Sequence[int]], local: Group, across: Group
) -> Rows:
    nodes, places = range(across.size), range(local.size)
    node, place = across.rank, local.rank
    leads = place == 0

    def count(source: tuple[int, int], target: tuple[int, int]) -> int:
        return between[source[0] * local.size + source[1]][target[0] * local.size + target[1]]

    everybody = list(product(nodes, places))
    mine = [sum(count((node, p), target) for target in everybody) for p in places]
    theirs = [sum(count(source, (node, p)) for source in everybody) for p in places]
    others = [0] * (local.size - 1)
    first = RowExchange(x_ND, [mine[place], *others], mine if leads else [0] * local.size, local)

    def between_leaders(rows: Tensor) -> Rows:
        sizes = {(p, n, q): count((node, p), (n, q)) for p in places for n, q in everybody}
        return RowExchange(
            _reorder(rows, sizes, [(p, n, q) for n in nodes for p in places for q in places]),
            [sum(sizes[p, n, q] for p in places for q in places) for n in nodes],
            [sum(count((n, p), (node, q)) for p in places for q in places) for n in nodes],
            across,
        )

    def from_leader(rows: Tensor) -> Rows:
        if leads:
            sizes = {(n, p, q): count((n, p), (node, q)) for n, p in everybody for q in places}
            rows = _reorder(rows, sizes, [(n, p, q) for q in places for n, p in everybody])
        return RowExchange(
            rows, theirs if leads else [0] * local.size, [theirs[place], *others], local
        )

    return _Stages(first, *([between_leaders] if leads else []), from_leader)


def _reorder(rows: Tensor, sizes: dict[Key, int], order: Sequence[Key]) -> Tensor:
    """Put blocks of rows, which lie in the order of `sizes`, into another order."""
    blocks = dict(zip(sizes, rows.split(list(sizes.values())), strict=True))
    return torch.cat([blocks[key] for key in order])


_ROUTES = {"1dh": _one_leader, "2dh": _two_stages}
