"""Weights that are stored in few bits are read as the numbers that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gatewise.parallel.errors import CheckpointError
from gatewise.training.interop.dequantise import open_folder

FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [4, 2]}
MXFP4: dict[str, Any] = {"quant_method": "mxfp4"}
_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def folder_of(path: Path, settings: dict[str, Any], **tensors: torch.Tensor) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    record = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(record))
    return path


def fp8_tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 5, generator=generator).mul(30).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3, generator=generator)
    return {"w": weight, "w_scale_inv": scales, "norm": torch.ones(3).bfloat16(), **changes}


def mxfp4_tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 3, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (2, 3, 2), dtype=torch.uint8, generator=generator)
    return {"w_blocks": blocks, "w_scales": scales, **changes}


def test_fp8_is_multiplied_block_by_block_also_where_the_last_blocks_are_short(
    tmp_path: Path,
) -> None:
    stored = fp8_tensors()
    source = open_folder(folder_of(tmp_path / "a", FP8, **stored))
    wanted = torch.empty(9, 5)
    for row in range(9):
        for column in range(5):
            scale = stored["w_scale_inv"][row // 4, column // 2]
            wanted[row, column] = stored["w"][row, column].float() * scale
    assert torch.equal(source.read("w"), wanted)
    assert torch.equal(source.read("norm"), stored["norm"])
    assert {n: (t.shape, t.dtype) for n, t in source.tensors.items()} == {
        "w": ((9, 5), "F32"),
        "norm": ((3,), "BF16"),
    }
    assert source.config == {"model_type": "llama", "dtype": "float32"}


def test_mxfp4_is_decoded_number_by_number(tmp_path: Path) -> None:
    stored = mxfp4_tensors()
    source = open_folder(folder_of(tmp_path / "a", MXFP4, **stored))
    found = source.read("w")
    assert source.tensors["w"].shape == found.shape == (2, 64, 3)
    for expert in range(2):
        for output in range(3):
            for place in range(64):
                group, inside = divmod(place, 32)
                byte = int(stored["w_blocks"][expert, output, group, inside // 2])
                value = _E2M1[byte >> 4 if inside % 2 else byte & 15]
                scale = 2.0 ** (int(stored["w_scales"][expert, output, group]) - 127)
                assert float(found[expert, place, output]) == value * scale
    assert torch.equal(found.bfloat16().float(), found)  # what it is handed out as
    assert source.config == {"model_type": "llama", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        (FP8 | {"weight_block_size": None}, fp8_tensors, "weight_block_size of fp8 is None"),
        (FP8 | {"activation_scheme": "static"}, fp8_tensors, "activation_scheme of fp8 is"),
        (
            FP8,
            lambda: fp8_tensors(w_scale_inv=torch.ones(2, 3)),
            r"w_scale_inv is F32 \[2, 3\]; w in blocks of \[4, 2\] needs F32 \[3, 3\]",
        ),
        (FP8, lambda: {"w": fp8_tensors()["w"]}, "w_scale_inv is absent"),
        (MXFP4, lambda: {"w_blocks": mxfp4_tensors()["w_blocks"]}, "w_scales is absent beside"),
        (
            MXFP4,
            lambda: mxfp4_tensors(w_scales=torch.ones(2, 3, 1, dtype=torch.uint8)),
            r"w_scales is U8 \[2, 3, 1\]",
        ),
    ],
)
def test_scales_that_do_not_fit_are_named(
    settings: dict[str, Any],
    tensors: Callable[[], dict[str, torch.Tensor]],
    words: str,
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path / "a", settings, **tensors())
    with pytest.raises(CheckpointError, match=words):
        open_folder(folder)
