"""Low-bit tensors of a folder as the tensors that they stand for: block-scaled fp8 and MXFP4.

    fp8     X (e4m3) and X_scale_inv: a factor for each block of weight_block_size; DeepSeek-V3
    mxfp4   X_blocks and X_scales: 32 numbers of 4 bits (e2m1) share a power of two; gpt-oss

Shapes:  E experts   R outputs   G groups of 32 inputs
Source:  DeepSeek-V3, arXiv:2412.19437, section 3.3; OCP Microscaling Formats 1.0; gpt-oss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.parallel.errors import CheckpointError
from gatewise.training.interop.source import FolderSource, Source, StoredTensor

__all__ = ["DequantisedSource", "open_folder"]

_KEY = "quantization_config"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives
_GROUP = 32  # numbers that share a power of two
_BIAS = 127  # of its exponent


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two stored tensors that make one."""

    values: str
    scales: str
    shape: tuple[int, ...]
    dtype: str  # that holds the result exactly, or as well as the scales do
    decode: Callable[[Tensor, Tensor], Tensor]


class DequantisedSource:
    """A folder whose low-bit tensors are read as what they stand for, one at a time.

    Args:
        folder: with a `quantization_config` of a method that `open_folder` knows.

    Raises:
        CheckpointError: naming the setting or the tensor that does not fit.
    """

    def __init__(self, folder: FolderSource) -> None:
        self.path: Path = folder.path
        self._folder = folder
        settings = folder.config[_KEY]
        find = _METHODS[settings["quant_method"]]
        try:
            self._pairs = find(settings, folder.tensors)
        except ValueError as error:
            raise CheckpointError(f"{folder.path}: {error}") from error
        parts = {name for pair in self._pairs.values() for name in (pair.values, pair.scales)}
        self.tensors: Mapping[str, StoredTensor] = {
            name: stored for name, stored in folder.tensors.items() if name not in parts
        } | {
            name: StoredTensor(pair.shape, pair.dtype, folder.tensors[pair.values].file)
            for name, pair in self._pairs.items()
        }
        self.config: dict[str, Any] = {k: v for k, v in folder.config.items() if k != _KEY}
        if any(pair.dtype == "F32" for pair in self._pairs.values()):
            self.config.pop("torch_dtype", None)
            self.config["dtype"] = "float32"

    def read(self, name: str) -> Tensor:
        """Return one tensor; fp32 where it was of few bits."""
        pair = self._pairs.get(name)
        if pair is None:
            return self._folder.read(name)
        return pair.decode(self._folder.read(pair.values), self._folder.read(pair.scales))


def open_folder(path: Path) -> Source:
    """Open a folder of transformers, dequantising what is stored in fp8 or MXFP4."""
    folder = FolderSource(path)
    settings = folder.config.get(_KEY)
    if isinstance(settings, dict) and settings.get("quant_method") in _METHODS:
        return DequantisedSource(folder)
    return folder  # whose config is refused by name if it is quantised otherwise


def _find_fp8(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, _Pair]:
    """Pair the e4m3 tensors with the factors of their blocks."""
    block = settings.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(size > 0 for size in block)):
        raise ValueError(f"weight_block_size of fp8 is {block!r}; it must be two positive sizes")
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise ValueError(
            f"activation_scheme of fp8 is {settings['activation_scheme']!r}; this version "
            "supports 'dynamic' only"
        )
    rows, columns = int(block[0]), int(block[1])

    def decode(values: Tensor, scales: Tensor) -> Tensor:
        spread = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return values.float() * spread[: values.shape[0], : values.shape[1]]

    found = {}
    for name, stored in tensors.items():
        if stored.dtype != "F8_E4M3":
            continue
        scales = tensors.get(f"{name}_scale_inv")
        blocks = tuple(-(-size // step) for size, step in zip(stored.shape, block, strict=False))
        if scales is None or scales.shape != blocks or scales.dtype not in ("F32", "BF16"):
            what = "absent" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise ValueError(
                f"{name}_scale_inv is {what}; {name} in blocks of {block} needs F32 {list(blocks)}"
            )
        found[name] = _Pair(name, f"{name}_scale_inv", stored.shape, "F32", decode)
    return found


def _find_mxfp4(
    settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, _Pair]:
    """Pair the blocks of 4-bit numbers with their powers of two."""
    del settings
    found = {}
    for values, stored in tensors.items():
        name = values.removesuffix("_blocks")
        if name == values:
            continue
        scales = tensors.get(f"{name}_scales")
        fits = len(stored.shape) == 4 and stored.shape[3] == _GROUP // 2 and stored.dtype == "U8"
        if scales is None or not fits or (scales.shape, scales.dtype) != (stored.shape[:3], "U8"):
            what = "absent" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise ValueError(
                f"{name}_scales is {what} beside {values} ({stored.dtype} {list(stored.shape)}); "
                f"MXFP4 has U8 [E, R, G] beside U8 [E, R, G, {_GROUP // 2}]"
            )
        experts, outputs, groups, _ = stored.shape
        shape = (experts, groups * _GROUP, outputs)
        found[name] = _Pair(values, f"{name}_scales", shape, "BF16", _decode_mxfp4)
    return found


def _decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 (E, 32 G, R) of bytes (E, R, G, 16) and exponents (E, R, G)."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    numbers = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)  # the low half comes first
    values = torch.ldexp(table[numbers.int()], scales.int().unsqueeze(-1) - _BIAS)
    return values.flatten(-2).transpose(1, 2)


_METHODS = {"fp8": _find_fp8, "mxfp4": _find_mxfp4}
