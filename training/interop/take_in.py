"""A model of another program as a checkpoint of ours, a tensor at a time.

Read first: `names.py` (which tensor goes where), `source.py` (what is read), and
`checkpoint_weights.py` (what is written).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import CheckpointError
from gatewise.routers.config import RouterConfig
from gatewise.training.checkpoint_weights import write_weights
from gatewise.training.interop.families import Family
from gatewise.training.interop.names import Piece, list_pieces
from gatewise.training.interop.source import Source, StoredTensor, check_tensors
from gatewise.training.state import model_ranges

__all__ = ["Account", "empty_model", "take_in"]

_TIED = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Account:
    """What became of a source's tensors; each is counted once."""

    consumed: int
    total: int
    sidecar: int  # beside them, of ours

    def __str__(self) -> str:
        """Say it in one line."""
        beside = f", and {self.sidecar} of gatewise's own" if self.sidecar else ""
        unused = self.total - self.consumed
        return f"{self.consumed} of {self.total} tensors consumed, {unused} unused{beside}"


def empty_model(model: ModelConfig, router: RouterConfig, vocab_size: int) -> Decoder:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        return Decoder(model, router, vocab_size)


def take_in(
    source: Source,
    family: Family,
    model: ModelConfig,
    router: RouterConfig,
    *,
    own: Mapping[str, Tensor],
    folder: Path,
    meta: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[Path, Account]:
    """Write a checkpoint from a source.

    Args:
        source: its tensors, under transformers' names.
        family: their layout.
        model: sizes, from its config; `vocab_size` is set.
        router: of its layers with experts.
        own: tensors of ours from the sidecar.
        folder: of the run's checkpoints.
        meta: of the checkpoint; what the source is made of is added.
        progress: told of every finished tensor.

    Returns:
        The checkpoint, and the account of the tensors.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape; nothing is written.
    """
    vocab_size = model.vocab_size
    assert vocab_size is not None
    pieces = list_pieces(family, model, router, vocab_size)
    ranges = model_ranges(empty_model(model, router, vocab_size))
    shapes = {name: (part.shape, part.data.dtype) for name, part in ranges.items()}
    aliases = _aliases(source, model)
    expected = {piece.theirs: piece.shape for piece in pieces} | aliases
    check_tensors(expected, source.tensors, str(source.path))
    _check_aliases(source, aliases)
    by_ours: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_ours[piece.ours].append(piece)
    _check_own(shapes, by_ours, own, str(source.path))
    total = len(shapes)
    done = 0

    def make(name: str) -> Tensor:
        nonlocal done
        shape, dtype = shapes[name]
        tensor = torch.zeros(shape, dtype=dtype)
        if name in by_ours:
            for piece in by_ours[name]:
                piece.place(tensor).copy_(piece.turn.to_ours(source.read(piece.theirs)))
        elif name in own:
            tensor.copy_(own[name])
        done += 1
        progress(done, total)
        return tensor

    origin = {"config": source.config, "dtypes": _dtypes(source.tensors)}
    path = write_weights(folder, shapes, make, meta={**meta, "hf": origin})
    return path, Account(len(expected), len(source.tensors), len(own))


def _aliases(source: Source, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return tensors that say again what others say: tied output weights, rotary tables."""
    found: dict[str, tuple[int, ...]] = {}
    for name, stored in source.tensors.items():
        tied = name == _TIED and model.tie_embeddings
        if tied or name.endswith(".rotary_emb.inv_freq"):
            found[name] = stored.shape
    return found


def _check_aliases(source: Source, aliases: Mapping[str, tuple[int, ...]]) -> None:
    if _TIED in aliases and not torch.equal(
        source.read(_TIED), source.read("model.embed_tokens.weight")
    ):
        raise CheckpointError(
            f"{source.path}: config.json has tie_word_embeddings, but {_TIED} differs from the "
            "embedding; set tie_word_embeddings to false"
        )


def _check_own(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    by_ours: Mapping[str, list[Piece]],
    own: Mapping[str, Tensor],
    source: str,
) -> None:
    """Check that what the layout lacks is in the sidecar, and nothing else; biases may be 0."""
    lacking = [name for name in shapes if name not in by_ours]
    missing = [name for name in lacking if name not in own and not name.startswith("bias/")]
    extra = [name for name in own if name not in lacking]
    wrong = [
        name
        for name, tensor in own.items()
        if name in lacking and (tuple(tensor.shape), tensor.dtype) != shapes[name]
    ]
    for what, names in (("lacks", missing), ("should not hold", extra), ("misshapes", wrong)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{source}: the sidecar {what} {names[0]}{more}")


def _dtypes(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return the commonest type, and the tensors that have another."""
    kinds = [stored.dtype for stored in tensors.values()]
    usual = max(set(kinds), key=kinds.count)
    others = {name: t.dtype for name, t in tensors.items() if t.dtype != usual}
    return {"usual": usual, "others": others}
