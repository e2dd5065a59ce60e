"""The operations of a profile on real groups: collectives, attention, memory.

Read `profiler.py` first; sizes are those of `profiles.py`. Collectives move what a layer of
experts moves, as it moves them: whole rows of fp32 numbers, equally many to each rank.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.parallel.collectives import Group, RowExchange, RowSum, gather_uneven
from gatewise.parallel.schedule.profiler import Probe, Run

__all__ = ["collective_probes", "compute_probes", "drop", "sweep"]

_STEPS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
_NUMBER_BYTES = 4  # fp32
_HEAD = 64  # width of an attention head
_LENGTH = 128  # tokens of a sequence


def sweep(largest: float) -> tuple[float, ...]:
    """Return the sizes to measure up to `largest`: enough of them for two segments."""
    return tuple(largest * step for step in _STEPS)


def collective_probes(
    exchange: Group,
    node: Group,
    gradients: Group,
    *,
    width: int,
    largest: Mapping[str, float],
) -> dict[str, Probe]:
    """Return the probes of the four collectives.

    Args:
        exchange: the ranks that share one set of experts.
        node: the ranks that split each expert.
        gradients: the ranks that sum a gradient.
        width: numbers of a row.
        largest: for `all_to_all`, `all_gather`, `reduce_scatter` and `all_reduce` the most bytes.
    """

    def counts(size: float, members: int) -> list[int]:
        return [max(1, round(size / (width * _NUMBER_BYTES * members)))] * members

    def all_to_all(size: float) -> tuple[float, Run]:
        each = counts(size, exchange.size)
        x_ND = torch.zeros(sum(each), width)
        return float(x_ND.nbytes), lambda: drop(RowExchange(x_ND, each, each, exchange).wait())

    def all_gather(size: float) -> tuple[float, Run]:
        each = counts(size, node.size)
        x_RD = torch.zeros(each[0], width)
        return float(x_RD.nbytes * node.size), lambda: drop(gather_uneven(x_RD, each, node).wait())

    def reduce_scatter(size: float) -> tuple[float, Run]:
        each = counts(size, node.size)
        x_ND = torch.zeros(sum(each), width)
        return float(x_ND.nbytes), lambda: drop(RowSum(x_ND, each, node).wait())

    def all_reduce(size: float) -> tuple[float, Run]:
        flat = torch.zeros(max(1, round(size / _NUMBER_BYTES)))

        def run() -> None:
            if gradients.handle is not None:
                dist.all_reduce(flat, group=gradients.handle)

        return float(flat.nbytes), run

    return {
        "all_to_all": Probe("inter", sweep(largest["all_to_all"]), all_to_all),
        "all_gather": Probe("intra", sweep(largest["all_gather"]), all_gather),
        "reduce_scatter": Probe("intra", sweep(largest["reduce_scatter"]), reduce_scatter),
        "all_reduce": Probe("inter", sweep(largest["all_reduce"]), all_reduce),
    }


def compute_probes(*, width: int, largest: Mapping[str, float]) -> dict[str, Probe]:
    """Return the probes of attention and of memory on this rank.

    Args:
        width: model width, a multiple of 64 or less than that.
        largest: for `attention` the most multiply-adds, for `memory` bytes.
    """

    def attention(size: float) -> tuple[float, Run]:
        heads = max(1, width // _HEAD)
        per_sequence = 2 * _LENGTH * _LENGTH * width
        count = max(1, round(size / per_sequence))
        q_BHLd = torch.randn(count, heads, _LENGTH, width // heads)
        attend: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
        return float(count * per_sequence), lambda: drop(attend(q_BHLd, q_BHLd, q_BHLd))

    def memory(size: float) -> tuple[float, Run]:
        x = torch.zeros(max(1, round(size / (2 * _NUMBER_BYTES))))
        y = torch.empty_like(x)
        return 2.0 * x.nbytes, lambda: drop(y.copy_(x))

    return {
        "attention": Probe("compute", sweep(largest["attention"]), attention),
        "memory": Probe("compute", sweep(largest["memory"]), memory),
    }


def drop(_result: Tensor) -> None:
    """Let go of the result of an operation that has ended."""
