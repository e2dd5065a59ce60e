"""Write an artefact in another program's format, a block at a time.

    <folder>/  config.json   architecture, sizes, quantisation
               model-*-of-*.safetensors, model.safetensors.index.json
               tokenizer.json   where it is of a form that `tokenizers` reads

The folder has its name only once it is complete.

Read first: `layout.py`.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.compression.artefact import read_parts, read_plan, replace_file
from gatewise.compression.export.formats import Bfloat16, Format
from gatewise.compression.export.gptq import Gptq
from gatewise.compression.export.layout import Layout, choose_layout
from gatewise.compression.export.packed import PackQuantized
from gatewise.compression.formats import MatrixFormat
from gatewise.compression.plan import Plan, file_name
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig

__all__ = ["FORMATS", "export_artefact"]

_EXPORTED = re.compile(
    r"config\.json|tokenizer\.json|model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors"
)

FORMATS: dict[str, Callable[[], Format]] = {
    "hf": Bfloat16,
    "gptq": lambda: Gptq(1),
    "gptq_v2": lambda: Gptq(2),
    "compressed_tensors": PackQuantized,
}


def export_artefact(
    artefact: Path,
    config: TrainConfig,
    vocab_size: int,
    end_of_text: int,
    *,
    format_name: str,
    folder: Path,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> dict[str, Any]:
    """Write a compressed model for another program.

    Args:
        artefact: complete and verified.
        config: of the training run.
        vocab_size: rows of the embedding.
        end_of_text: id that ends a text.
        format_name: one of `FORMATS`.
        folder: of the result; an earlier export there is replaced.
        progress: told of every finished file.

    Returns:
        What was written: architecture, files, tensors, bytes.

    Raises:
        ConfigError: with the reason, if the model or its plan has no place in the format, or the
            folder holds what no export has written.
        CheckpointError: if the artefact lacks a planned tensor.
    """
    _check_replaceable(folder)
    kind, plan = FORMATS[format_name](), read_plan(artefact)
    layout = choose_layout(config, _states(artefact, plan))
    kind.check(plan)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        record = _write(artefact, plan, layout, kind, partial, progress)
        settings = layout.settings(config, vocab_size)
        settings |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        quantisation = kind.settings(record.pop("modules"), record.pop("plain"))
        if quantisation is not None:
            settings["quantization_config"] = quantisation
        replace_file(partial / "config.json", json.dumps(settings, indent=2) + "\n")
        _copy_tokenizer(artefact, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _check_replaceable(folder)  # once more: that was long ago
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return {"architecture": settings["architectures"][0], **record}


def _check_replaceable(folder: Path) -> None:
    """Refuse to delete anything but an earlier export."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder of an export; remove it, or choose another run.dir"
        )
    for path in sorted(folder.iterdir()):
        if not _EXPORTED.fullmatch(path.name) or path.is_dir():
            raise ConfigError(
                f"{folder} holds {path.name!r}, which no export wrote, so it is not replaced; "
                "choose another run.dir"
            )


def _write(  # noqa: PLR0917 - what one export is made of
    artefact: Path,
    plan: Plan,
    layout: Layout,
    kind: Format,
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    from safetensors.torch import save_file

    by_name = {part.name: part for part in plan.parts}
    modules: dict[str, MatrixFormat] = {}
    plain: list[str] = []
    where: dict[str, str] = {}
    size, files = 0, plan.layers + 1
    for number in range(files):
        parts, kept = read_parts(artefact, plan, number)
        tensors: dict[str, Tensor] = {}
        for name, matrix in parts.items():
            part = by_name[name]
            for place in layout.places(part.source, part.shape.rows, part.expert):
                tensors |= kind.tensors(place, matrix)
                modules[place.module] = part.shape
        for name, tensor in kept.items():
            group, _, parameter = name.partition("/")
            if group != "model":  # a router's state, which is 0 (`choose_layout`)
                continue
            for place in layout.places(parameter, tensor.shape[0]):
                tensors[place.weight] = tensor[place.rows].to(torch.bfloat16).contiguous()
                if tensor.dim() > 1 and not place.module.endswith("embed_tokens"):
                    plain.append(place.module)
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
        progress(number + 1, files)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    text = json.dumps(index, indent=2) + "\n"
    replace_file(folder / "model.safetensors.index.json", text)
    return {
        "files": files,
        "tensors": len(where),
        "payload_bytes": size,
        "modules": modules,
        "plain": plain,
    }


def _states(artefact: Path, plan: Plan) -> dict[str, bool]:
    """Tell of each router state beside the parameters whether any of it is not 0."""
    from safetensors import safe_open

    found = {}
    for number in range(plan.layers + 1):
        names = [
            item.name for item in plan.kept_of_file(number) if not item.name.startswith("model/")
        ]
        with safe_open(artefact / file_name(number), framework="pt") as tensors:
            for name in names:
                found[name] = bool(tensors.get_tensor(name).any())
    return found


def _copy_tokenizer(artefact: Path, folder: Path) -> None:
    """Copy the tokenizer where it is one of the `tokenizers` library; bytes need none."""
    file = artefact / "tokenizer.json"
    try:
        known = "model" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if known:
        shutil.copyfile(file, folder / "tokenizer.json")
