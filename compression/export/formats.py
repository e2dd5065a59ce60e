"""What a file format makes of one matrix: the protocol, and plain bf16 weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gatewise.compression.export.layout import Place
from gatewise.compression.formats import MatrixFormat
from gatewise.compression.plan import Plan
from gatewise.compression.quantize import Quantized

__all__ = ["Bfloat16", "Format"]


class Format(Protocol):
    """One file format."""

    name: str

    def check(self, plan: Plan) -> None:
        """Raise `ConfigError` with the reason if a plan has no place in the format."""
        ...

    def tensors(self, place: Place, matrix: Quantized) -> dict[str, Tensor]:
        """Return the tensors of the module at a place, from its rows of the matrix."""
        ...

    def settings(
        self, modules: Mapping[str, MatrixFormat], plain: Sequence[str]
    ) -> dict[str, Any] | None:
        """Return the quantisation of config.json.

        Args:
            modules: the quantised ones.
            plain: linear modules that are not quantised.
        """
        ...


class Bfloat16:
    """Dequantised weights, rounded to bf16."""

    name = "hf"

    def check(self, plan: Plan) -> None:
        """Take any plan."""

    def tensors(self, place: Place, matrix: Quantized) -> dict[str, Tensor]:
        """Return the weight."""
        return {place.weight: matrix.dequantise()[place.rows].to(torch.bfloat16)}

    def settings(
        self, modules: Mapping[str, MatrixFormat], plain: Sequence[str]
    ) -> dict[str, Any] | None:
        """Return nothing: the weights are ordinary ones."""
        del modules, plain
        return None
