"""The stages of a compression that fit routers to quantised weights.

    calibration/logits_*       what uncompressed routers said, a file per layer (topk_mse)
                repaired.*     trained routers, and the loss before and after (cross_entropy)

Read first: `repair.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.compression.artefact import replace_file
from gatewise.compression.config import RepairConfig
from gatewise.compression.plan import Plan
from gatewise.compression.repair import RouterTarget, fit_by_loss, put_tensors
from gatewise.compression.stream import BlockStream
from gatewise.moe.model import Decoder

__all__ = ["keep_reference_logits", "read_target", "repair_by_loss"]


def keep_reference_logits(
    stream: BlockStream,
    inputs: Sequence[Tensor],
    files: Mapping[int, Path],
    progress: Callable[[int, int], None],
) -> None:
    """Write what each router of the uncompressed model says of the calibration tokens.

    Args:
        stream: of the uncompressed model, not begun.
        inputs: token ids (B, S) of the batches.
        files: by MoE layer.
        progress: told of every finished layer.
    """
    layers = stream.model.config.layers
    stream.begin(inputs)
    for layer in range(layers):
        with stream.resident(layer) as block:
            routings = [routing for routing in stream.advance(block) if routing is not None]
        if layer in files:
            logits = [part.logits_TE for part in routings if part.logits_TE is not None]
            experts = [part.expert_TK for part in routings]
            _save(files[layer], {"expert": torch.cat(experts), "logits": torch.cat(logits)})
        progress(layer + 1, layers)


def read_target(file: Path, device: torch.device) -> RouterTarget:
    """Return what `keep_reference_logits` wrote of a layer."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    return RouterTarget(tensors["expert"].to(device), tensors["logits"].to(device))


def repair_by_loss(
    load_model: Callable[[], Decoder],
    batches: Sequence[Tensor],
    config: RepairConfig,
    *,
    plan: Plan,
    calibration: Path,
    partial: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Train the routers of the finished model and put them into its files.

    Args:
        load_model: returns it, dequantised.
        batches: int64 (B, S + 1).
        config: rate and epochs.
        plan: of the files.
        calibration: gets what was trained.
        partial: folder of the files.
        progress: told of every step.
    """
    from safetensors.torch import load_file

    file, note = calibration / "repaired.safetensors", calibration / "repaired.json"
    if not note.exists():
        tensors, record = fit_by_loss(
            load_model(), batches, rate=config.rate, epochs=config.epochs, progress=progress
        )
        _save(file, {name: tensor.cpu() for name, tensor in tensors.items()})
        replace_file(note, json.dumps(record, indent=1) + "\n")
    put_tensors(partial, plan, load_file(file))


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    temporary = file.with_name(f".{file.name}")
    contents: dict[str, Any] = dict(tensors)
    save_file(contents, temporary)
    temporary.replace(file)
