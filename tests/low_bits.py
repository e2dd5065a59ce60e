"""Folders of transformers whose weights are stored in few bits, drawn at random."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["store_fp8", "store_mxfp4"]


def store_fp8(folder: Path, block: int) -> None:
    """Replace matrices by e4m3 numbers with a factor for each block, as DeepSeek-V3 has them."""
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith(("proj.weight", "_mqa.weight")):
            blocks = [-(-size // block) for size in weight.shape]
            scales = torch.rand(blocks, generator=_generator(name)) * 0.02 + 0.001
            tensors[name] = (weight * 100).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    _rewrite(folder, tensors, settings)


def store_mxfp4(folder: Path) -> None:
    """Replace experts by drawn 4-bit numbers in groups of 32, as gpt-oss has them."""
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            del tensors[name]
            experts, inputs, outputs = weight.shape
            size = (experts, outputs, inputs // 32)
            generator = _generator(name)
            tensors[f"{name}_blocks"] = torch.randint(
                256, (*size, 16), dtype=torch.uint8, generator=generator
            )
            tensors[f"{name}_scales"] = torch.randint(
                121, 126, size, dtype=torch.uint8, generator=generator
            )
    _rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def _rewrite(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((folder / "config.json").read_text())
    record["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(record))
