"""A checkpoint of ours as a folder that transformers loads, a tensor at a time.

    <folder>/  config.json
               model.safetensors, or model-*-of-*.safetensors and model.safetensors.index.json
               gatewise.safetensors   state that the layout has no place for (`sidecar.py`)
               tokenizer.json, tokenizer_config.json and what else came with the tokenizer

The folder has its name only once it is complete. Read first: `names.py`, `families.py`.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.moe.config import ModelConfig
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.training.checkpoint_weights import WeightReader
from gatewise.training.config import TrainConfig
from gatewise.training.interop.families import choose_family
from gatewise.training.interop.names import Piece, list_pieces
from gatewise.training.interop.read_config import read_config
from gatewise.training.interop.sidecar import KEY, sidecar_record, write_sidecar
from gatewise.training.interop.source import INDEX
from gatewise.training.interop.take_in import empty_model
from gatewise.training.interop.write_config import write_config
from gatewise.training.state import model_ranges

__all__ = ["HandedOut", "hand_out"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class HandedOut:
    """What was written."""

    architecture: str
    tensors: int
    files: int
    payload_bytes: int
    dtype: str
    sidecar: tuple[str, ...]  # tensors in it
    differences: tuple[str, ...]  # what transformers computes otherwise


def hand_out(
    checkpoint: Path,
    config: TrainConfig,
    meta: Mapping[str, Any],
    *,
    folder: Path,
    settings: Mapping[str, Any],
    extras: Mapping[str, str | Path],
    end_of_text: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 << 30,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> HandedOut:
    """Write a checkpoint for transformers.

    Args:
        checkpoint: complete and verified.
        config: of its run.
        meta: of the checkpoint.
        folder: to make; it must not exist.
        settings: of the run as JSON holds them, for the sidecar.
        extras: further files by name: their text, or where to copy them from.
        end_of_text: id that ends a text; None where the tokenizer has none that is known.
        dtype: "F32", "BF16" or "F16"; None: as it came, or F32 where it was trained since.
        shard_bytes: a file holds at most so much, but at least one tensor.
        progress: told of every finished file.

    Raises:
        ConfigError: if no layout has the model's body, or the folder exists.
        CheckpointError: if the checkpoint's tensors are not those of its settings.
    """
    if folder.exists():
        raise ConfigError(f"out is {folder}, which exists; remove it or choose another folder")
    reader, vocab_size = WeightReader(checkpoint), int(meta["vocab_size"])
    model = replace(config.model, vocab_size=vocab_size)
    _check_complete(reader, model, config, checkpoint)
    family, differences = choose_family(model, config.router)
    pieces = list_pieces(family, model, config.router, vocab_size)
    taken = {piece.ours for piece in pieces}
    own = {}
    for name in reader.specs:
        if name not in taken:
            tensor = reader.read(name).clone()
            if not name.startswith("bias/") or bool(tensor.any()):
                own[name] = tensor
    differences += _state_differences(own)
    origin = dict(meta.get("hf") or {}) if not int(meta["step"]) else {}
    kinds = _Kinds(dtype, origin.get("dtypes") or {})
    record = _config_record(config, model, meta, end_of_text) | {"dtype": _NAMES[kinds.usual]}
    if origin and kinds.as_it_came and _is_same(origin["config"], model, config):
        record = dict(origin["config"])
    if own or differences:
        record[KEY] = sidecar_record(settings, has_tensors=bool(own))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        shards = _cut(pieces, kinds, shard_bytes)
        size = _write_shards(partial, shards, reader, kinds, progress)
        write_sidecar(partial, own)
        for name, content in extras.items():
            if isinstance(content, Path):
                shutil.copyfile(content, partial / name)
            else:
                (partial / name).write_text(content, encoding="utf-8")
        text = json.dumps(record, indent=2) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(f"out is {folder}, which cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return HandedOut(
        family.architecture,
        len(pieces),
        len(shards),
        size,
        _NAMES[kinds.usual],
        tuple(own),
        tuple(differences),
    )


class _Kinds:
    """The type of each tensor: one that was asked for, or those that it came with."""

    def __init__(self, asked: str | None, stored: Mapping[str, Any]) -> None:
        self.as_it_came = asked is None or asked == stored.get("usual")
        self.usual: str = asked or stored.get("usual") or "F32"
        self._others: dict[str, str] = stored.get("others") or {} if self.as_it_came else {}

    def of(self, piece: Piece) -> torch.dtype:
        if piece.ours.startswith("bias/") and piece.theirs not in self._others:
            return torch.float32 if not self.as_it_came else _DTYPES[self.usual]
        return _DTYPES[self._others.get(piece.theirs, self.usual)]


def _check_complete(
    reader: WeightReader, model: ModelConfig, config: TrainConfig, checkpoint: Path
) -> None:
    """Compare the checkpoint's tensors with those of its settings, both ways."""
    assert model.vocab_size is not None
    ranges = model_ranges(empty_model(model, config.router, model.vocab_size))
    wanted = {name: (part.shape, part.data.dtype) for name, part in ranges.items()}
    differing = sorted(
        name
        for name in wanted.keys() | reader.specs.keys()
        if wanted.get(name) != reader.specs.get(name)
    )
    if differing:
        raise CheckpointError(
            f"{checkpoint} does not hold the model of its settings: {differing[0]} differs"
            + (f", and {len(differing) - 1} more" if len(differing) > 1 else "")
        )


def _state_differences(own: Mapping[str, Tensor]) -> list[str]:
    moved = [name for name in own if name.startswith("bias/")]
    return [f"the routers choose with a bias ({moved[0]})"] if moved else []


def _config_record(
    config: TrainConfig, model: ModelConfig, meta: Mapping[str, Any], end_of_text: int | None
) -> dict[str, Any]:
    family, _ = choose_family(model, config.router)
    assert model.vocab_size is not None
    came = (meta.get("hf") or {}).get("config") or {}
    record = write_config(
        family,
        model,
        config.router,
        vocab_size=model.vocab_size,
        positions=int(came.get("max_position_embeddings") or config.data.sequence_length),
    )
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": None}
    return record | {name: came.get(name, value) for name, value in ids.items()}


def _is_same(came: Mapping[str, Any], model: ModelConfig, config: TrainConfig) -> bool:
    """Tell whether the settings that the model came with still are its settings."""
    _, before, router = read_config(came, "the checkpoint's source")
    before = replace(before, capacity=model.capacity, vocab_size=model.vocab_size)
    return before == model and (
        not model.num_experts or replace(router, ahead=config.router.ahead) == config.router
    )


def _cut(pieces: Sequence[Piece], kinds: _Kinds, shard_bytes: int) -> list[list[Piece]]:
    """Spread the tensors over files, in their order."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        own = torch.Size(piece.shape).numel() * kinds.of(piece).itemsize
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += own
    return shards


def _write_shards(
    folder: Path,
    shards: Sequence[Sequence[Piece]],
    reader: WeightReader,
    kinds: _Kinds,
    progress: Callable[[int, int], None],
) -> int:
    """Write the files and, of several, their index; return the bytes of the tensors."""
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    size = 0
    for name, shard in _named(shards):
        tensors = {}
        for piece in shard:
            ours = piece.turn.to_theirs(piece.place(reader.read(piece.ours)))
            assert tuple(ours.shape) == piece.shape, piece.theirs
            # a copy: views of one tensor would be stored as one
            tensors[piece.theirs] = ours.to(kinds.of(piece), copy=True).contiguous()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in tensors.values())
        where |= dict.fromkeys(tensors, name)
        progress(len(set(where.values())), len(shards))
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size


def _named(shards: Sequence[Sequence[Piece]]) -> Iterator[tuple[str, Sequence[Piece]]]:
    if len(shards) == 1:
        yield "model.safetensors", shards[0]
        return
    for number, shard in enumerate(shards, 1):
        yield f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard
