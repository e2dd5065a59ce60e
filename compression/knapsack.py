"""The multiple-choice knapsack, solved exactly: one option per item, least cost within a budget.

Costs are compared as integers of 2^-40 of the largest, so that ties are real ties. Among plans of
equal cost the first item gets its last option that allows one, then the second item, and so on:
with options of growing width, lower-numbered experts get the wider ones. The result depends on
nothing else.

Shapes:  n items   o options
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Infeasible", "solve_knapsack"]

_RESOLUTION = 1 << 40
_NEVER = np.int64(1) << 61


class Infeasible(ValueError):
    """No choice of options meets the budget and the rules."""


def solve_knapsack(
    costs: Sequence[Sequence[float]],
    weights: Sequence[Sequence[int]],
    budget: int,
    *,
    required: Sequence[int] = (),
) -> list[int]:
    """Choose one option for each item.

    Args:
        costs: cost of each option of each item, at least 0, all items with as many options.
        weights: what each option takes of the budget, in whole units.
        budget: units that all chosen options may take together.
        required: options that at least one item each must take.

    Returns:
        The chosen option of each item; the sum of their costs is the least possible.

    Raises:
        Infeasible: if there is no such choice.
        ValueError: for a cost that is negative or not finite.
    """
    cost_no = _integers(costs)
    weight_no = np.asarray(weights, dtype=np.int64)
    if cost_no.shape != weight_no.shape:
        raise ValueError(f"costs are {cost_no.shape} but weights are {weight_no.shape}")
    least_n = weight_no.min(axis=1)
    weight_no = weight_no - least_n[:, None]
    room = int(budget) - int(least_n.sum())
    if room < 0:
        raise Infeasible(f"the smallest choice takes {int(least_n.sum())} of a budget of {budget}")
    unit = math.gcd(*map(int, weight_no.ravel())) or 1
    weight_no //= unit
    room = min(room // unit, int(weight_no.max(axis=1).sum()))
    chosen = _backward(cost_no, weight_no, room, tuple(required))
    if chosen is None:
        raise Infeasible(
            f"a budget of {budget} for {len(cost_no)} items leaves no room for one item of each "
            "required option"
        )
    return chosen


def _integers(costs: Sequence[Sequence[float]]) -> npt.NDArray[np.int64]:
    cost_no = np.asarray(costs, dtype=np.float64)
    if not np.isfinite(cost_no).all() or (cost_no < 0).any():
        raise ValueError("a cost is negative or not finite")
    largest = float(cost_no.max(initial=0.0))
    return np.rint(cost_no * (_RESOLUTION / largest if largest > 0 else 0)).astype(np.int64)


def _backward(
    cost_no: npt.NDArray[np.int64],
    weight_no: npt.NDArray[np.int64],
    room: int,
    required: tuple[int, ...],
) -> list[int] | None:
    """Fill the tables from the last item to the first, then walk forward through them.

    `best[needs][b]` is the least cost of the items from here on with b units and the required
    options in the bit mask `needs` still missing.
    """
    items, options = cost_no.shape
    masks = 1 << len(required)
    serves = [
        sum(1 << place for place, other in enumerate(required) if other == option)
        for option in range(options)
    ]
    best = np.full((masks, room + 1), _NEVER, dtype=np.int64)
    best[0] = 0
    choice = np.zeros((items, masks, room + 1), dtype=np.uint8)
    for item in range(items - 1, -1, -1):
        after, best = best, np.full_like(best, _NEVER)
        for option in range(options):
            weight, cost = int(weight_no[item, option]), cost_no[item, option]
            if weight > room:
                continue
            for needs in range(masks):
                total = after[needs & ~serves[option], : room + 1 - weight] + cost
                wins = (total <= best[needs, weight:]) & (total < _NEVER)
                np.copyto(best[needs, weight:], total, where=wins)
                np.copyto(choice[item, needs, weight:], np.uint8(option), where=wins)
    needs, left, chosen = masks - 1, room, []
    if best[needs, left] >= _NEVER:
        return None
    for item in range(items):
        option = int(choice[item, needs, left])
        chosen.append(option)
        left -= int(weight_no[item, option])
        needs &= ~serves[option]
    return chosen
