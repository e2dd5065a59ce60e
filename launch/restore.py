"""Find a checkpoint by any of its names and build the model that lies in it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from gatewise.compression.artefact import find_artefact, is_artefact, read_plan, verify_artefact
from gatewise.compression.config import Weights
from gatewise.compression.load import ALONE, load_compressed
from gatewise.compression.pruning import apply_pruning, read_pruning
from gatewise.compression.runtime import load_packed
from gatewise.conf.compose import config_from_yaml
from gatewise.moe.model import Decoder, set_precision
from gatewise.moe.ops.native_packed import load_packed_kernels
from gatewise.moe.parallelize import build_model
from gatewise.parallel.dims import ExpertGroups
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.training.checkpoint_folder import read_json
from gatewise.training.checkpointer import find_latest, load, read_meta, verify
from gatewise.training.config import Tokenizer, TrainConfig
from gatewise.training.data import PreparedData, prepare_data
from gatewise.training.resume import check_tokenizer
from gatewise.training.state import OPTIMIZER, model_ranges
from gatewise.training.tokenizer import ByteTokenizer, TextTokenizer, load_tokenizer
from gatewise.training.trainer import resolve_dtype

__all__ = [
    "Stored",
    "check_resume",
    "check_weights",
    "choose_weights",
    "locate_checkpoint",
    "open_checkpoint",
    "restore_data",
    "restore_model",
    "restore_tokenizer",
]

_log = logging.getLogger(__name__)
# Fields of the model that a run may change when it goes on: they shape no tensor.
_FREE_FIELDS = ("top_k", "init_std", "capacity")


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint: where it lies and what it says of itself."""

    path: Path
    config: TrainConfig  # of the run that wrote it
    meta: dict[str, Any]

    @property
    def is_compressed(self) -> bool:
        """Whether `gatewise compress` made it."""
        return is_artefact(self.path)

    @property
    def step(self) -> int:
        """Optimizer steps it has behind it."""
        return int(self.meta["step"])


def check_weights(stored: Stored, weights: Weights | None) -> None:
    """Refuse a way of holding weights that the checkpoint does not have.

    Raises:
        ConfigError: if one was asked of a checkpoint that is not compressed.
    """
    if weights is not None and not stored.is_compressed:
        raise ConfigError(
            f"weights is {weights.name}, but checkpoint {stored.path} is not compressed; leave "
            "weights out, or run `gatewise compress` first"
        )


def choose_weights(stored: Stored, weights: Weights | None, device: torch.device) -> Weights:
    """Return how weights are held: as asked, else packed where kernels multiply them."""
    if weights is not None:
        return weights
    if not stored.is_compressed:
        return Weights.dequantised
    if device.type == "cpu" and load_packed_kernels() is not None:
        return Weights.packed
    _log.warning(
        "no kernels multiply packed weights on this %s: the weights are dequantised, which takes "
        "the memory of an uncompressed model (weights=packed computes slowly instead)",
        "machine" if device.type == "cpu" else device.type,
    )
    return Weights.dequantised


def locate_checkpoint(name: str) -> Path:
    """Return the checkpoint that a path means: itself, or the newest good one below it.

    Args:
        name: a run's folder, its `checkpoints` folder, one `step_*` folder, or a compressed model.

    Raises:
        CheckpointError: if there is none, or the one named is damaged.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint is {name!r}, which is no folder; give a run's folder, its checkpoints "
            "folder or one step_* folder"
        )
    if path.name.startswith("step_"):
        verify(path)
        return path.resolve()
    inner = path / "checkpoints"
    artefact = None if inner.is_dir() else find_artefact(path)
    if artefact is not None:
        verify_artefact(artefact)
        return artefact.resolve()
    latest = find_latest(inner if inner.is_dir() else path)
    if latest is None:
        raise CheckpointError(
            f"checkpoint is {name!r}, which holds no complete checkpoint (step_*); give a run "
            "that has saved one"
        )
    return latest.resolve()


def open_checkpoint(name: str) -> Stored:
    """Find a checkpoint and read its settings.

    Raises:
        CheckpointError: as `locate_checkpoint`, or if its settings cannot be read.
    """
    path = locate_checkpoint(name)
    return Stored(path, _stored_config(path), _meta(path))


def restore_tokenizer(stored: Stored, *, fits: bool = True) -> TextTokenizer:
    """Return the tokenizer that the checkpoint was trained with.

    It lies beside the checkpoints, in the run's folder; where that is gone, it is made again
    from the run's data.

    Args:
        stored: the checkpoint.
        fits: whether each of its ids must have a row in the model's embedding.

    Raises:
        CheckpointError: if what is found is another tokenizer, or does not fit.
    """
    folder = stored.path if stored.is_compressed else stored.path.parent.parent
    beside = folder / "tokenizer.json"
    if beside.exists():
        tokenizer = load_tokenizer(beside)
    elif ByteTokenizer().fingerprint == stored.meta["tokenizer"]:
        tokenizer = ByteTokenizer()
    else:
        tokenizer = prepare_data(stored.config.data).tokenizer
    if tokenizer.fingerprint != stored.meta["tokenizer"]:
        raise CheckpointError(
            f"checkpoint {stored.path} was trained with another tokenizer than the one found; "
            f"put the run's tokenizer.json to {beside}"
        )
    rows = int(stored.meta["vocab_size"])
    if fits and tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"checkpoint {stored.path} has {rows} rows in its embedding but its tokenizer has "
            f"{tokenizer.vocab_size} ids; convert it again with tokenizer=PATH, its own"
        )
    return tokenizer


def restore_data(stored: Stored, folder: Path) -> PreparedData:
    """Return the text that the settings name, in the checkpoint's tokens.

    Args:
        stored: the checkpoint; `stored.config.data` may name another text than it was trained on.
        folder: of the command; gets the tokenizer where the text alone would lead to another.

    Raises:
        CheckpointError: as `restore_tokenizer`.
        ConfigError, DataError: as `prepare_data`.
    """
    tokenizer, settings = restore_tokenizer(stored), stored.config.data
    of_bytes = settings.tokenizer is Tokenizer.bytes and settings.tokenizer_path is None
    # a model that was taken in has a tokenizer that its settings do not tell of
    if not of_bytes or isinstance(tokenizer, ByteTokenizer):
        data = prepare_data(settings)
        if data.tokenizer.fingerprint == tokenizer.fingerprint:
            return data
    # another text would train another BPE: tokenise it with the checkpoint's
    tokenizer.save(folder / "tokenizer.json")
    path = str(folder / "tokenizer.json")
    return prepare_data(replace(settings, tokenizer_path=path))


def restore_model(
    stored: Stored,
    *,
    device: torch.device,
    weights: Weights = Weights.dequantised,
    groups: ExpertGroups = ALONE,
) -> Decoder:
    """Build the model and fill it.

    Args:
        stored: the checkpoint; `stored.config.precision` chooses the type of its matrices.
        device: where the model goes.
        weights: how those of a compressed model are held; others have only one way.
        groups: the ranks over which experts are spread, whole; by default all are here.
    """
    config, vocab_size = stored.config, int(stored.meta["vocab_size"])
    if stored.is_compressed:
        read = load_packed if weights is Weights.packed else load_compressed
        model = read(config, vocab_size, stored.path, read_plan(stored.path), device, groups)
        set_precision(model, resolve_dtype(config.precision, device))
        pruning = read_pruning(stored.path)
        if pruning is not None:
            apply_pruning(model, pruning)
        return model
    model = build_model(
        config.model,
        config.router,
        vocab_size=vocab_size,
        group=groups,
        device=device,
        dtype=torch.float32,
        seed=config.seed,
    )
    load(stored.path, model_ranges(model), optional_prefixes=OPTIMIZER)
    set_precision(model, resolve_dtype(config.precision, device))
    return model.eval()


def check_resume(config: TrainConfig, folder: Path, data: PreparedData) -> None:
    """Refuse a run that would go on from a checkpoint of another model or tokenizer.

    The trainer checks every tensor again; this look at the newest checkpoint finds a mistake
    before any rank starts.

    Args:
        config: of the run.
        folder: of the run.
        data: prepared for the run.

    Raises:
        CheckpointError: with the first field that differs.
    """
    path = _newest(folder / "checkpoints") if config.checkpoint.resume else None
    if path is None and config.checkpoint.load is not None:
        path = Path(config.checkpoint.load)
    if path is None:
        return
    stored = _stored_config(path)
    for field in fields(config.model):
        if field.name in _FREE_FIELDS:
            continue
        ours, theirs = getattr(config.model, field.name), getattr(stored.model, field.name)
        if ours != theirs:
            raise CheckpointError(
                f"model.{field.name} is {_shown(ours)} but checkpoint {path} was trained with "
                f"{_shown(theirs)}; set it back, or start in another run.dir"
            )
    check_tokenizer(path, read_meta(path)["meta"], data)


def _newest(folder: Path) -> Path | None:
    """Return the last finished checkpoint by name, without reading its tensors."""
    steps: Sequence[Path] = sorted(folder.glob("step_*")) if folder.is_dir() else []
    for path in reversed(steps):
        try:
            read_meta(path)
        except CheckpointError:
            continue  # the trainer says what is wrong with it, and uses the one before
        return path
    return None


def _stored_config(path: Path) -> TrainConfig:
    text = json.dumps(_meta(path)["config"])  # JSON is YAML too
    return config_from_yaml(text, source=f"checkpoint {path}")


def _meta(path: Path) -> dict[str, Any]:
    """Return what a checkpoint or a compressed model says of itself."""
    record = read_json(path, "config.json") if is_artefact(path) else read_meta(path)
    meta: dict[str, Any] = record["meta"]
    return meta


def _shown(value: object) -> str:
    return str(getattr(value, "name", value))
