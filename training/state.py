"""A run's whole state as named ranges of flattened tensors, for checkpoints of any layout.

Names: `model/<parameter>` fp32 master weights, `adam_m/` and `adam_v/` moments, `bias/<router>` the
balancing biases (and `<name>/<router>` whatever else balances). A rank lists only what it owns
(`parallel/buckets.py`); `checkpoint_format.py` puts ranges together.
"""

import io
import random
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gatewise.moe.model import Decoder, parameter_specs
from gatewise.routers.weights import RouterWeights
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.optim import Held

__all__ = [
    "OPTIMIZER",
    "Updater",
    "model_ranges",
    "rank_state",
    "restore_rank_state",
    "training_ranges",
]

OPTIMIZER = ("adam_m/", "adam_v/")  # how the names of its state start


class Updater(Protocol):
    """Whoever updates the weights, as far as checkpoints ask."""

    @property
    def updates(self) -> int:
        """Number of updates applied; setting it goes on from there."""
        ...

    @updates.setter
    def updates(self, count: int) -> None: ...

    def held(self) -> list[Held]:
        """Return what this rank updates."""
        ...

    def publish(self) -> None:
        """Bring every rank's parameters up to date with the weights that are held."""
        ...


def training_ranges(model: Decoder, updater: Updater) -> dict[str, FlatRange]:
    """List the ranges of weights, moments and biases that this rank owns.

    The tensors are views: loading into them changes what is held; `updater.publish()` must follow.
    """
    ranges = _router_ranges(model)
    for held in updater.held():
        for part in held.parts:
            spans = part.spec.cut(part.start, part.end)
            for prefix, flat in (
                ("model", held.master),
                ("adam_m", held.first),
                ("adam_v", held.second),
            ):
                ranges[f"{prefix}/{part.spec.name}"] = FlatRange.spread(
                    part.of(flat.detach()), spans, part.spec.shape
                )
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


def _router_ranges(model: Decoder) -> dict[str, FlatRange]:
    return {
        f"{kind}/{name}": FlatRange.whole(tensor)
        for name, module in model.named_modules()
        if isinstance(module, RouterWeights)
        for kind, tensor in module.state().items()
    }
