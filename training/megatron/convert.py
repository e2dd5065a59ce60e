"""Turn Megatron-core's distributed checkpoints into ours and back; read `names.py` first."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import CheckpointError
from gatewise.routers.config import RouterConfig
from gatewise.training.checkpoint_weights import WeightReader, write_weights
from gatewise.training.megatron.files import MegatronFiles, write_files
from gatewise.training.megatron.names import Place, find_places
from gatewise.training.state import model_ranges

__all__ = ["hand_out", "take_in"]

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

# of a checkpoint of training, beside the weights
_OTHER = re.compile(r"(optimizer|chained_\d+\.optimizer|rng_state|rerun_state|.*_extra_state)")
_SHOWN = 5


def take_in(
    source: Path,
    model: ModelConfig,
    router: RouterConfig,
    vocab_size: int,
    *,
    folder: Path,
    meta: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Path:
    """Write a checkpoint of ours from one of Megatron's, a tensor at a time.

    Args:
        source: Megatron's folder.
        model: sizes of the model.
        router: its router.
        vocab_size: rows of the embedding that are kept; Megatron pads to round numbers.
        folder: of the run's checkpoints.
        meta: of the checkpoint.
        progress: told of every finished tensor.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape; nothing is written.
    """
    files = MegatronFiles(source)
    shapes = _our_shapes(model, router, vocab_size)
    local = not any("pre_mlp_layernorm" in name for name in files.shapes)
    places = find_places(shapes, model, router, local=local)
    _check(files, shapes, places, model.layers)
    done = 0

    def make(name: str) -> Tensor:
        nonlocal done
        shape, dtype = shapes[name]
        tensor = torch.zeros(shape, dtype=dtype)
        place = places.get(name)
        if place is not None:
            found = _read(files, place)
            found = found if place.to_ours is None else place.to_ours(found)
            tensor.copy_(found[: shape[0]])
        done += 1
        progress(done, len(shapes))
        return tensor

    return write_weights(folder, shapes, make, meta=meta)


def hand_out(
    checkpoint: Path,
    model: ModelConfig,
    router: RouterConfig,
    vocab_size: int,
    *,
    out: Path,
    local: bool = False,
) -> int:
    """Write a checkpoint for Megatron and return the number of its tensors.

    Layers that are all alike become one tensor each, as Megatron has them by default; else each
    layer has its own, as with a list for `moe_layer_freq`.

    Args:
        checkpoint: of ours.
        model: sizes of the model.
        router: its router.
        vocab_size: rows of the embedding.
        out: the folder to make.
        local: for layers without TransformerEngine.

    Raises:
        CheckpointError: if Megatron's layout has no place for a tensor.
    """
    shapes = _our_shapes(model, router, vocab_size)
    places = find_places(shapes, model, router, local=local)
    reader = WeightReader(checkpoint)
    layers: dict[str, dict[int, Tensor]] = defaultdict(dict)
    tensors: dict[str, Tensor] = {}
    for name, place in places.items():
        tensor = reader.read(name)
        tensor = tensor.clone() if place.to_theirs is None else place.to_theirs(tensor)
        if place.together is None:
            tensors[place.theirs] = tensor
        else:
            layers[place.together][place.layer] = tensor
    alike = all(len(found) == model.layers for found in layers.values())
    stacked = {}
    for name, found in layers.items():
        if alike:
            tensors[name] = torch.stack([found[layer] for layer in range(model.layers)])
            stacked[name] = model.layers
        else:
            part = name.removeprefix("decoder.layers.")
            tensors |= {f"decoder.layers.{layer}.{part}": t for layer, t in found.items()}
    write_files(out, tensors, stacked=stacked)
    return len(tensors)


def _our_shapes(model: ModelConfig, router: RouterConfig, vocab_size: int) -> Shapes:
    with torch.device("meta"):
        ranges = model_ranges(Decoder(model, router, vocab_size))
    return {name: (part.shape, part.data.dtype) for name, part in ranges.items()}


def _read(files: MegatronFiles, place: Place) -> Tensor:
    if place.theirs in files.shapes:
        return files.read(place.theirs)
    assert place.together is not None
    return files.read(place.together)[place.layer]


def _check(files: MegatronFiles, shapes: Shapes, places: Mapping[str, Place], layers: int) -> None:
    """Compare names and shapes of both sides."""
    problems, used = [], set()
    for name, place in places.items():
        wanted = shapes[name][0]  # turns move rows within a tensor
        if place.theirs in files.shapes:
            used.add(place.theirs)
            found = files.shapes[place.theirs]
        elif place.together in files.shapes:
            assert place.together is not None
            used.add(place.together)
            stack = files.shapes[place.together]
            if stack[0] != layers:
                problems.append(f"{place.together} has {stack[0]} layers, not {layers}")
                continue
            found = stack[1:]
        else:
            problems.append(f"{place.theirs} is missing")
            continue
        padded = place.together is None and found[1:] == wanted[1:] and found[0] >= wanted[0]
        if found != wanted and not padded:
            problems.append(f"{place.theirs} is {list(found)}, not {list(wanted)}")
    extra = [name for name in files.shapes if name not in used and not _OTHER.match(name)]
    problems += [f"{name} {list(files.shapes[name])} is not known" for name in sorted(extra)]
    if problems:
        problems = list(dict.fromkeys(problems))
        more = len(problems) - _SHOWN
        raise CheckpointError(
            f"{files.path} is not a checkpoint of this model: {'; '.join(problems[:_SHOWN])}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Give the settings of its model (model.*, router.*)"
        )
