"""The C++ products with packed weights, called through ctypes.

They compute with AVX-512 VNNI or with AVX2, as the caller says or as the processor can; on other
processors `load_packed_kernels` returns None, and `packed.py` computes with torch.

Shapes:  as in `packed.py`
"""

import ctypes
import functools
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops.native import ACTIVATIONS, load_kernels
from gatewise.moe.ops.panels import PackedWeight

__all__ = ["InstructionSet", "PackedKernels", "PackedTable", "load_packed_kernels"]


class InstructionSet(Enum):
    """What the inner loops are written for; the values are bits of `gatewise_packed_sets`."""

    avx2 = 1
    avx512_vnni = 2


class _Matrix(ctypes.Structure):
    """The same struct as in `csrc/packed.h`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "bits", "has_zero")),
        ("zero", ctypes.c_double),
    )


class _FfnCall(ctypes.Structure):
    """The same struct as in `csrc/packed.h`."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "tokens",
                "top_k",
                "experts",
                "width",
                "expert_width",
                "activation",
                "threads",
                "set",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("x", "expert", "weight", "w_in", "w_out", "y")),
    )


class PackedTable:
    """Matrices of one shape and group, widths as they like, as the kernels read them.

    Args:
        weights: on one device; their memory must stay where it is.

    Raises:
        ValueError: if there are none, or they differ in more than their widths.
    """

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self.weights = tuple(weights)
        kinds = {(w.rows, w.columns, w.group, str(w.data.device)) for w in self.weights}
        if len(kinds) != 1:
            raise ValueError(
                f"the matrices have different (rows, columns, group, device): {sorted(kinds)}; "
                "the experts of a layer must be alike but for their widths"
            )
        self._matrices = (_Matrix * len(self.weights))(*map(_matrix, self.weights))
        self.address = ctypes.addressof(self._matrices)

    def __reduce__(self) -> tuple[type["PackedTable"], tuple[tuple[PackedWeight, ...]]]:
        return PackedTable, (self.weights,)  # a copy has other addresses


class PackedKernels:
    """The functions of one compiled library for one instruction set."""

    def __init__(self, library: ctypes.CDLL, instructions: InstructionSet) -> None:
        self.instructions = instructions
        self._library = library

    @staticmethod
    def sets(library: ctypes.CDLL) -> list[InstructionSet]:
        """Return what the library holds and this processor has, the fastest first."""
        mask = int(library.gatewise_packed_sets())
        return [found for found in reversed(InstructionSet) if mask & found.value]

    def linear(self, x_MK: Tensor, weight: PackedWeight) -> Tensor:
        """Do `packed.packed_linear` for contiguous fp32 rows."""
        y_MN = x_MK.new_empty(x_MK.shape[0], weight.rows)
        matrix = _matrix(weight)
        self._library.gatewise_packed_linear(
            ctypes.byref(matrix),
            ctypes.c_void_p(x_MK.data_ptr()),
            ctypes.c_int64(x_MK.shape[0]),
            ctypes.c_void_p(y_MN.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
            ctypes.c_int64(self.instructions.value),
        )
        return y_MN

    def ffn(  # noqa: PLR0917 - the operands of one kernel
        self,
        x_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        w_in: PackedTable,
        w_out: PackedTable,
        activation: Activation,
    ) -> Tensor:
        """Do `packed.packed_ffn` for contiguous tensors, fp32 but for the int64 experts."""
        y_TD = torch.empty_like(x_TD)
        call = _FfnCall(
            expert_TK.shape[0],
            expert_TK.shape[1],
            len(w_in.weights),
            x_TD.shape[1],
            w_out.weights[0].columns,
            ACTIVATIONS[activation],
            torch.get_num_threads(),
            self.instructions.value,
            x_TD.data_ptr(),
            expert_TK.data_ptr(),
            weight_TK.data_ptr(),
            w_in.address,
            w_out.address,
            y_TD.data_ptr(),
        )
        self._library.gatewise_packed_ffn(ctypes.byref(call))
        return y_TD

    def unpack(self, weight: PackedWeight, out_NK: Tensor) -> None:
        """Write the values of a matrix into a contiguous fp32 or bf16 tensor."""
        matrix = _matrix(weight)
        self._library.gatewise_packed_unpack(
            ctypes.byref(matrix),
            ctypes.c_int64(out_NK.dtype == torch.bfloat16),
            ctypes.c_void_p(out_NK.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )


@functools.lru_cache(maxsize=1)
def load_packed_kernels() -> PackedKernels | None:
    """Return the kernels for the best instruction set of this machine; None where there is none."""
    kernels = load_kernels()
    if kernels is None:
        return None
    sets = PackedKernels.sets(kernels.library)
    return PackedKernels(kernels.library, sets[0]) if sets else None


def _matrix(weight: PackedWeight) -> _Matrix:
    return _Matrix(
        weight.data.data_ptr(),
        weight.rows,
        weight.columns,
        weight.group,
        weight.bits,
        weight.zero is None,
        weight.zero or 0.0,
    )
