"""The operations of a profile on real groups: collectives, matrix products, attention, memory.

Read `profiler.py` first; sizes are those of `profiles.py`. Collectives move what a layer of
experts moves: whole rows, equally many to each rank, in fp32 unless told otherwise.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.parallel.collectives import Group
from gatewise.parallel.pairwise import PairwiseExchange
from gatewise.parallel.schedule.profiler import Probe, Run

__all__ = ["collective_probes", "compute_probes", "sweep"]

_STEPS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
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
    dtype: torch.dtype = torch.float32,
) -> dict[str, Probe]:
    """Return the probes of the four collectives.

    Args:
        exchange: the ranks that share one set of experts.
        node: the ranks that split each expert.
        gradients: the ranks that sum a gradient.
        width: numbers of a row.
        largest: for `all_to_all`, `all_gather`, `reduce_scatter` and `all_reduce` the most bytes.
        dtype: of the numbers.
    """

    def rows(size: float, members: int) -> Tensor:
        per_member = max(1, round(size / (width * dtype.itemsize * members)))
        return torch.zeros(per_member * members, width, dtype=dtype)

    def all_to_all(size: float) -> tuple[float, Run]:
        x_ND = rows(size, exchange.size)
        y_ND = torch.empty_like(x_ND)
        sent, received = x_ND.chunk(exchange.size), y_ND.chunk(exchange.size)
        return float(x_ND.nbytes), lambda: PairwiseExchange(received, sent, exchange).wait()

    def all_gather(size: float) -> tuple[float, Run]:
        gathered_ND = rows(size, node.size)
        received = gathered_ND.chunk(node.size)
        mine = [torch.zeros_like(received[0])] * node.size
        return float(gathered_ND.nbytes), lambda: PairwiseExchange(received, mine, node).wait()

    def reduce_scatter(size: float) -> tuple[float, Run]:
        x_sN = rows(size, node.size).view(node.size, -1)

        def run() -> None:
            parts_sN = torch.empty_like(x_sN)
            PairwiseExchange(parts_sN.unbind(), x_sN.unbind(), node).wait()
            parts_sN.sum(0)

        return float(x_sN.nbytes), run

    def all_reduce(size: float) -> tuple[float, Run]:
        flat = torch.zeros(max(1, round(size / dtype.itemsize)), dtype=dtype)

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


def compute_probes(
    *, width: int, inner: int, largest: Mapping[str, float], dtype: torch.dtype = torch.float32
) -> dict[str, Probe]:
    """Return the probes of plain computation on this rank.

    Args:
        width: model width, a multiple of 64 or less than that.
        inner: width of an expert on this rank.
        largest: for `experts` and `attention` the most multiply-adds, for `memory` bytes.
        dtype: of the numbers.
    """
    weight_DF = torch.randn(width, inner, dtype=dtype)

    def experts(size: float) -> tuple[float, Run]:
        count = max(1, round(size / (width * inner)))
        x_RD = torch.randn(count, width, dtype=dtype)
        return float(count * width * inner), lambda: _end(x_RD @ weight_DF)

    def attention(size: float) -> tuple[float, Run]:
        heads = max(1, width // _HEAD)
        per_sequence = 2 * _LENGTH * _LENGTH * width
        count = max(1, round(size / per_sequence))
        q_BHLd = torch.randn(count, heads, _LENGTH, width // heads, dtype=dtype)
        attend: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
        return float(count * per_sequence), lambda: _end(attend(q_BHLd, q_BHLd, q_BHLd))

    def memory(size: float) -> tuple[float, Run]:
        x = torch.zeros(max(1, round(size / (2 * dtype.itemsize))), dtype=dtype)
        y = torch.empty_like(x)
        return 2.0 * x.nbytes, lambda: _end(y.copy_(x))

    return {
        "experts": Probe("compute", sweep(largest["experts"]), experts),
        "attention": Probe("compute", sweep(largest["attention"]), attention),
        "memory": Probe("compute", sweep(largest["memory"]), memory),
    }


def _end(_result: Tensor) -> None:
    """Drop the result of an operation that has ended."""
