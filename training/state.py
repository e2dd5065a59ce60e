"""A run's whole state as named ranges of flattened tensors, for checkpoints of any layout.

Names: `model/<parameter>` fp32 master weights, `adam_m/` and `adam_v/` moments, `bias/<router>` the
balancing biases (and `<name>/<router>` whatever else balances). A rank lists only what it owns
(`parallel/buckets.py`); `checkpoint_format.py` puts ranges together.
"""

import io
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gatewise.moe.model import Decoder, parameter_specs
from gatewise.parallel.buckets import Bucket
from gatewise.routers.weights import RouterWeights
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.optim import ShardedAdamW

__all__ = ["model_ranges", "rank_state", "restore_rank_state", "training_ranges"]


def training_ranges(model: Decoder, optimizer: ShardedAdamW) -> dict[str, FlatRange]:
    """List the ranges of weights, moments and biases that this rank owns.

    The tensors are views: loading into them changes the optimizer; `optimizer.publish()` must
    follow.
    """
    ranges = _router_ranges(model)
    for index, bucket in enumerate(optimizer.buckets):
        first, second = optimizer.moments(index)
        for prefix, flat in (
            ("model", optimizer.masters[index]),
            ("adam_m", first),
            ("adam_v", second),
        ):
            ranges |= _owned(bucket, flat, prefix)
    return ranges


def model_ranges(model: Decoder) -> dict[str, FlatRange]:
    """List the weights and biases of a model without an optimizer; its parameters are fp32."""
    ranges = _router_ranges(model)
    for spec in parameter_specs(model):
        flat = spec.local()
        ranges[f"model/{spec.name}"] = FlatRange.spread(flat, spec.cut(0, flat.numel()), spec.shape)
    return ranges


def rank_state(window: Mapping[str, Tensor]) -> bytes:
    """Pack what belongs to this rank alone.

    That is the states of Python's, NumPy's and torch's generators, and the sums of the logging
    window that is not written yet.
    """
    buffer = io.BytesIO()
    states = {
        "window": {name: tensor.cpu() for name, tensor in window.items()},
        "python": repr(random.getstate()),
        "numpy": repr(_numpy_state()),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    torch.save(states, buffer)
    return buffer.getvalue()


def restore_rank_state(packed: bytes) -> dict[str, Tensor]:
    """Put the generators back and return the sums of the window."""
    import ast

    states = torch.load(io.BytesIO(packed), weights_only=True)
    random.setstate(ast.literal_eval(states["python"]))
    name, keys, position, has_gauss, gauss = ast.literal_eval(states["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    window: dict[str, Tensor] = states["window"]
    return window


def _numpy_state() -> tuple[str, list[int], int, int, float]:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)  # the legacy form
    name, keys, position, has_gauss, gauss = state
    return name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)


def _owned(bucket: Bucket, flat: Tensor, prefix: str) -> dict[str, FlatRange]:
    """Cut the owned slice of a bucket into the parts of its parameters."""
    owned, ranges = bucket.owned, {}
    for slot in bucket.slots:
        start, end = max(slot.offset, owned.start), min(slot.end, owned.stop)
        if start < end:
            ranges[f"{prefix}/{slot.spec.name}"] = FlatRange.spread(
                flat[start - owned.start : end - owned.start].detach(),
                slot.spec.cut(start - slot.offset, end - slot.offset),
                slot.spec.shape,
            )
    return ranges


def _router_ranges(model: Decoder) -> dict[str, FlatRange]:
    return {
        f"{kind}/{name}": FlatRange.whole(tensor)
        for name, module in model.named_modules()
        if isinstance(module, RouterWeights)
        for kind, tensor in module.state().items()
    }
