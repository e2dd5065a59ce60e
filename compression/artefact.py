"""A compressed model on disk: written a block at a time, read like any checkpoint.

    compressed/  config.json   settings and tokenizer of the training run, format
                 plan.json     width, group and zero of every quantised matrix
                 report.json   what was measured
                 model-*.safetensors   0: outside of the blocks, l + 1: block l
                 tokenizer.json
                 manifest.json size and SHA-256 of every file, written last

While it is made the folder is called `.compressed.partial`; each file in it is complete.

`read_parts` gives the codes as they are. `fill_model` puts dequantised weights into an ordinary
model; `runtime.py` builds one that computes with the codes.

Read first: `plan.py`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.compression.packing import pack_codes, unpack_codes
from gatewise.compression.plan import Entry, Part, Plan, file_entries, file_name
from gatewise.compression.quantize import Quantized
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_folder import (
    DurableFile,
    FileRecord,
    read_json,
    sync_folder,
    write_durable,
)
from gatewise.training.checkpoint_format import encode_header
from gatewise.training.state import model_ranges

__all__ = [
    "ARTEFACT",
    "PARTIAL",
    "fill_model",
    "find_artefact",
    "finish_artefact",
    "header_bytes",
    "is_artefact",
    "place_kept",
    "place_part",
    "read_parts",
    "read_plan",
    "read_tensors",
    "replace_file",
    "take_part",
    "verify_artefact",
    "write_layer",
]

ARTEFACT = "compressed"
PARTIAL = ".compressed.partial"
MANIFEST = "manifest.json"
FORMAT = 1


def header_bytes(entries: Iterable[Entry]) -> bytes:
    """Return the head of a safetensors file of these tensors, in the order of their bytes."""
    return encode_header(
        ((entry.name, entry.dtype, entry.shape) for entry in entries),
        content="gatewise compressed",
    )


def write_layer(
    folder: Path,
    plan: Plan,
    number: int,
    *,
    parts: Mapping[str, Quantized],
    kept: Mapping[str, Tensor],
) -> None:
    """Write one file of the artefact; it has its name only once it is complete.

    Args:
        folder: exists.
        plan: names, order and sizes of all tensors.
        number: of the file.
        parts: the quantised matrices of this block by the names of their parts.
        kept: the other tensors by the names of training checkpoints, of any floating type.
    """
    tensors: dict[str, Tensor] = dict(kept)
    for name, matrix in parts.items():
        tensors[f"{name}.codes"] = pack_codes(matrix.code_NK, matrix.format.bits)
        tensors[f"{name}.scale"] = matrix.scale_NG
        if matrix.zero_NG is not None:
            tensors[f"{name}.zero"] = matrix.zero_NG
    entries = file_entries(plan, number)
    assert {entry.name for entry in entries} == set(tensors), "a planned tensor was not made"
    temporary = folder / f".{file_name(number)}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    with DurableFile(temporary) as file:
        file.write(header_bytes(entries))
        for entry in entries:
            tensor = tensors[entry.name].detach().to(entry.dtype).contiguous().cpu()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)}"
            if entry.bytes:
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    temporary.replace(folder / file_name(number))
    sync_folder(folder)


def replace_file(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    write_durable(temporary, text.encode())
    temporary.replace(path)


def finish_artefact(partial: Path) -> Path:
    """Write the manifest and give the folder its name."""
    for left in partial.glob(".*"):  # of a process that was killed
        left.unlink()
    records = {
        path.name: asdict(FileRecord(path.stat().st_size, _digest_of_file(path)))
        for path in sorted(partial.iterdir())
        if path.name != MANIFEST
    }
    body = {"format": FORMAT, "files": records}
    replace_file(partial / MANIFEST, json.dumps({**body, "sha256": _digest(body)}, indent=1))
    sync_folder(partial)
    final = partial.with_name(ARTEFACT)
    partial.rename(final)
    sync_folder(final.parent)
    return final


def is_artefact(path: Path) -> bool:
    """Tell whether a folder is a finished compressed model, damaged or not."""
    return (path / MANIFEST).is_file() and (path / "plan.json").is_file()


def find_artefact(path: Path) -> Path | None:
    """Return the compressed model that a path means, or None.

    Args:
        path: the model itself, or the run folder of `gatewise compress`.

    Raises:
        CheckpointError: for a run of `gatewise compress` that did not finish.
    """
    for candidate in (path, path / ARTEFACT):
        if is_artefact(candidate):
            return candidate
    if (path / PARTIAL).is_dir() or (path / ARTEFACT).is_dir():
        raise CheckpointError(
            f"checkpoint is {str(path)!r}, a compression that did not finish; start the same "
            "command again, and it goes on"
        )
    return None


def verify_artefact(path: Path) -> None:
    """Check every file against the manifest.

    Raises:
        CheckpointError: naming the folder and the first file that is missing or differs.
    """
    manifest = read_json(path, MANIFEST)
    try:
        body = {"format": manifest["format"], "files": manifest["files"]}
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {body['format']}; this version reads {FORMAT}"
            )
        if manifest["sha256"] != _digest(body):
            raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} was changed")
        records = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} lacks entries") from error
    for name, record in records.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != record.size:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} is {file.stat().st_size} bytes long, not "
                f"{record.size} bytes"
            )
        if _digest_of_file(file) != record.sha256:
            raise CheckpointError(
                f"checkpoint {path} is damaged: the SHA-256 of {name} is not the one in {MANIFEST}"
            )


def read_plan(path: Path) -> Plan:
    """Read the plan of an artefact.

    Raises:
        CheckpointError: if it is missing or is not a plan.
    """
    file = path / "plan.json"
    if not file.is_file():
        raise CheckpointError(f"checkpoint {path} is damaged: plan.json is missing")
    return Plan.from_json(file.read_bytes(), source=str(file))


def read_parts(
    path: Path, plan: Plan, number: int
) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """Read one file: the quantised matrices by the names of their parts, and the kept tensors.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    tensors = read_tensors(path, plan, number)
    parts = plan.of_layer(number - 1) if number else ()
    return {part.name: take_part(tensors, part) for part in parts}, tensors


def read_tensors(path: Path, plan: Plan, number: int) -> dict[str, Tensor]:
    """Read one file as it is, codes packed.

    Raises:
        CheckpointError: if a planned tensor is missing or of another shape, or one is not planned.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = file_name(number)
    try:
        tensors = load_file(path / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {name}: {error}") from error
    entries = {entry.name: entry for entry in file_entries(plan, number)}
    for known in sorted(entries.keys() | tensors.keys()):
        if known not in tensors:
            raise CheckpointError(f"{path / name}: planned tensor '{known}' is missing")
        if known not in entries:
            raise CheckpointError(f"{path / name}: unknown tensor '{known}', which is not planned")
        here, there = tensors[known], entries[known]
        if (tuple(here.shape), here.dtype) != (there.shape, there.dtype):
            raise CheckpointError(
                f"{path / name}: '{known}' is {here.dtype}{list(here.shape)}, but planned as "
                f"{there.dtype}{list(there.shape)}"
            )
    return tensors


def take_part(tensors: dict[str, Tensor], part: Part) -> Quantized:
    """Take one matrix out of what `read_tensors` returned."""
    shape = part.shape
    code_NK = unpack_codes(tensors.pop(f"{part.name}.codes"), shape.bits, shape.columns)
    scale_NG = tensors.pop(f"{part.name}.scale")
    zero_NG = tensors.pop(f"{part.name}.zero") if shape.has_zero else None
    return Quantized(shape, code_NK, scale_NG, zero_NG)


def fill_model(model: Decoder, path: Path, plan: Plan, numbers: Iterable[int]) -> None:
    """Put the weights of some files, dequantised, into a model of fp32 parameters.

    Args:
        model: the parameters of these files are on a real device.
        path: folder of the files.
        plan: of the folder.
        numbers: of the files.

    Raises:
        CheckpointError: as `read_parts`, or if the plan names what the model does not have.
    """
    ranges = model_ranges(model)
    by_name = {part.name: part for part in plan.parts}
    for number in numbers:
        parts, kept = read_parts(path, plan, number)
        for name, matrix in parts.items():
            place_part(ranges, by_name[name], matrix, path)
        place_kept(ranges, kept, path)


def place_kept(ranges: Mapping[str, Any], kept: Mapping[str, Tensor], path: Path) -> None:
    """Write the tensors that are not quantised to their places.

    Raises:
        CheckpointError: if the model has no such place.
    """
    for name, tensor in kept.items():
        if name not in ranges or ranges[name].shape != tuple(tensor.shape):
            raise CheckpointError(f"checkpoint {path}: the model has no '{name}' of this shape")
        ranges[name].data.copy_(tensor.reshape(-1))


def place_part(ranges: Mapping[str, Any], part: Part, matrix: Quantized, path: Path) -> None:
    """Write one dequantised matrix to its place; one of another rank's expert is left out.

    Raises:
        CheckpointError: if the model has no such place.
    """
    found = ranges.get(f"model/{part.source}")
    shape = (part.shape.rows, part.shape.columns)
    if found is None or tuple(found.shape[-2:]) != shape:
        raise CheckpointError(
            f"checkpoint {path}: planned matrix '{part.name}' has no place in the model"
        )
    size = part.shape.elements
    first = size * (part.expert or 0) - found.start
    if 0 <= first < found.data.numel():
        found.data[first : first + size].copy_(matrix.dequantise().reshape(-1))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
