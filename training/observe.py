"""Count what a step does across ranks and between device and host, by watching the calls.

For tests and benchmarks. While `observe` is active, exchanges (`parallel/collectives.py`), the
other collectives of torch.distributed and the methods by which a host reads a tensor are counted;
reads inside MoE layers (both passes) apart, because each would make the host wait for a GPU in the
middle of a step.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from gatewise.moe import compute
from gatewise.moe.layer import MoELayer
from gatewise.parallel import collectives

__all__ = ["Observed", "observe"]

_COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "barrier",
    "broadcast",
    "reduce_scatter_tensor",
)
_READS = (
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "cpu",
    "item",
    "nonzero",
    "numpy",
    "tolist",
)


@dataclass(slots=True)
class Observed:
    """Numbers of calls."""

    metadata: int = 0  # exchanges of counts: all-to-alls of integers
    rows: int = 0  # exchanges of rows: all-to-alls of floating-point numbers
    others: Counter[str] = field(default_factory=Counter)  # by name of the collective
    reads_in_layers: int = 0  # host reads inside MoE layers
    metadata_in_layers: int = 0
    depth: int = 0  # above 0 inside a layer


@contextmanager
def observe() -> Iterator[Observed]:
    """Count until the context ends."""
    seen = Observed()
    with ExitStack() as stack:
        for name in _COLLECTIVES:
            if hasattr(dist, name):
                watched = _watch_collective(seen, name, getattr(dist, name))
                stack.enter_context(patch.object(dist, name, watched))
        exchange = _watch_exchange(seen, collectives.start_exchange)
        stack.enter_context(patch.object(collectives, "start_exchange", exchange))
        for name in _READS:
            read = _watch_read(seen, getattr(torch.Tensor, name))
            stack.enter_context(patch.object(torch.Tensor, name, read))
        backward = compute._MoECompute.backward
        stack.enter_context(patch.object(MoELayer, "forward", _inside(seen, MoELayer.forward)))
        stack.enter_context(
            patch.object(compute._MoECompute, "backward", staticmethod(_inside(seen, backward)))
        )
        yield seen


def _watch_collective(seen: Observed, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:  # whatever the collective takes
        seen.others[name] += 1
        return call(*args, **kwargs)

    return watched


def _watch_exchange(seen: Observed, call: Callable[..., Any]) -> Callable[..., Any]:
    def watched(received: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # as the exchange
        if received.is_floating_point():
            seen.rows += 1
        else:
            seen.metadata += 1
            seen.metadata_in_layers += seen.depth > 0
        return call(received, *args, **kwargs)

    return watched


def _watch_read(seen: Observed, read: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:  # whatever the method takes
        seen.reads_in_layers += seen.depth > 0
        return read(*args, **kwargs)

    return watched


def _inside(seen: Observed, run: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:  # whatever the layer takes
        seen.depth += 1
        try:
            return run(*args, **kwargs)
        finally:
            seen.depth -= 1

    return watched
