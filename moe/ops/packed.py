"""Products with weights of 1 to 8 bits and int8 activations.

A row of activations is quantised once per group of columns: its scale is the largest |x| of the
group / 127. A group's contribution is then scale_w * scale_x * (codes . x - zero * sum of x), with
integers inside of the brackets but for the zero. The C++ kernels (`native_packed.py`) compute that;
the torch versions here dequantise both and multiply, which is the same up to rounding in fp32.

Read first: `panels.py`.

Shapes:  M rows   N outputs   K inputs   G groups of a row   T tokens   K experts per token
         D model width   F expert width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops.activate import activate
from gatewise.moe.ops.native_packed import PackedKernels, PackedTable, load_packed_kernels
from gatewise.moe.ops.panels import PackedWeight, unpack_panels

__all__ = [
    "QuantisedRows",
    "check_choices",
    "check_rows",
    "check_tables",
    "packed_ffn",
    "packed_ffn_reference",
    "packed_linear",
    "packed_linear_reference",
    "quantise_rows",
    "unpack_weight",
    "unpack_weight_reference",
]

_LARGEST_CODE = 127
_SMALLEST = 1e-30  # a group whose numbers are all below it counts as zeros


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows as int8 codes with a scale for each group of columns."""

    code_MK: Tensor  # int8
    scale_MG: Tensor
    group: int

    def dequantise(self) -> Tensor:
        """Return the values (M, K) in the dtype of the scales."""
        columns = self.code_MK.shape[1]
        scale_MK = self.scale_MG.repeat_interleave(self.group, 1)[:, :columns]
        return scale_MK * self.code_MK.to(scale_MK.dtype)


def quantise_rows(x_MK: Tensor, group: int) -> QuantisedRows:
    """Quantise rows as the kernels do; fp64 rows in fp64, others in fp32."""
    x_MK = x_MK.to(torch.promote_types(x_MK.dtype, torch.float32))
    columns = x_MK.shape[1]
    x_MGg = F.pad(x_MK, (0, -columns % group)).unflatten(1, (-1, group))
    largest_MG1 = x_MGg.abs().amax(2, keepdim=True)
    is_zero_MG1 = largest_MG1 < _SMALLEST
    inverse_MG1 = _LARGEST_CODE / torch.where(is_zero_MG1, 1.0, largest_MG1)
    code_MGg = torch.where(is_zero_MG1, 0.0, x_MGg * inverse_MG1).round()
    scale_MG = torch.where(is_zero_MG1, 0.0, largest_MG1 / _LARGEST_CODE).squeeze(2)
    return QuantisedRows(code_MGg.flatten(1)[:, :columns].to(torch.int8), scale_MG, group)


def unpack_weight(weight: PackedWeight, out_NK: Tensor) -> Tensor:
    """Write a matrix's values, computed in fp32 (fp64 for fp64), into `out_NK` and return it.

    Raises:
        ValueError: if `out_NK` is not of the matrix's shape, a floating type and its device.
    """
    if out_NK.shape != (weight.rows, weight.columns):
        raise ValueError(
            f"out_NK is {list(out_NK.shape)}; the matrix is {[weight.rows, weight.columns]}"
        )
    _check_numbers("out_NK", out_NK, weight)
    kernels = _kernels_for(out_NK)
    if kernels is not None and out_NK.is_contiguous():
        kernels.unpack(weight, out_NK)
        return out_NK
    wide = torch.promote_types(out_NK.dtype, torch.float32)
    return out_NK.copy_(unpack_weight_reference(weight, wide))


def unpack_weight_reference(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a matrix's values (N, K); `dtype` is fp32 or fp64."""
    code_NK, scale_NG, zero_NG = unpack_panels(weight)
    scale_NK = scale_NG.to(dtype).repeat_interleave(weight.group, 1)[:, : weight.columns]
    if zero_NG is None:
        assert weight.zero is not None
        return scale_NK * (code_NK.to(dtype) - weight.zero)
    zero_NK = zero_NG.to(dtype).repeat_interleave(weight.group, 1)[:, : weight.columns]
    return scale_NK * (code_NK.to(dtype) - zero_NK)


def packed_linear(x_MK: Tensor, weight: PackedWeight) -> Tensor:
    """Return x W^T (M, N) with x quantised to int8, in the dtype of `x_MK`.

    Made for few rows: every row reads the codes again, from the caches.

    Raises:
        ValueError: as `check_rows`.
    """
    check_rows(x_MK, weight)
    kernels = _kernels_for(x_MK)
    if kernels is None:
        return packed_linear_reference(x_MK, weight)
    return kernels.linear(x_MK.float().contiguous(), weight).to(x_MK.dtype)


def packed_linear_reference(x_MK: Tensor, weight: PackedWeight) -> Tensor:
    """Do `packed_linear` with dequantised numbers."""
    row_MK = quantise_rows(x_MK, weight.group).dequantise()
    return F.linear(row_MK, unpack_weight_reference(weight, row_MK.dtype)).to(x_MK.dtype)


def packed_ffn(  # noqa: PLR0917 - the operands of one kernel
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    w_in: PackedTable,
    w_out: PackedTable,
    activation: Activation,
) -> Tensor:
    """Apply each token's experts and sum their outputs with the weights, in one call.

    A token is quantised once for all its experts. Made for few tokens.

    Args:
        x_TD: tokens.
        expert_TK: int64; -1 is left out.
        weight_TK: combine weights.
        w_in: first matrices of all experts, of one shape and group.
        w_out: second matrices, likewise.
        activation: the non-linearity between them.

    Returns:
        (T, D) of the dtype of `x_TD`; the result for a token depends on no other token and not on
        the number of threads.

    Raises:
        ValueError: as `check_tables` and `check_choices`.
    """
    check_tables(w_in, w_out, activation)
    check_choices(x_TD, expert_TK, weight_TK, w_in.weights[0], len(w_in.weights))
    kernels = _kernels_for(x_TD)
    if kernels is None:
        return packed_ffn_reference(
            x_TD, expert_TK, weight_TK, w_in.weights, w_out.weights, activation
        )
    x_fp32_TD = x_TD.float().contiguous()
    weight_TK = weight_TK.float().contiguous()
    expert_TK = expert_TK.contiguous()
    return kernels.ffn(x_fp32_TD, expert_TK, weight_TK, w_in, w_out, activation).to(x_TD.dtype)


def packed_ffn_reference(  # noqa: PLR0917 - the operands of one kernel
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    w_in: Sequence[PackedWeight],
    w_out: Sequence[PackedWeight],
    activation: Activation,
) -> Tensor:
    """Do `packed_ffn` expert by expert with dequantised numbers."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=wide)
    for expert in expert_TK.unique().tolist():
        if expert < 0:
            continue
        token_R, choice_R = (expert_TK == expert).nonzero(as_tuple=True)
        hidden_RG = packed_linear_reference(x_TD[token_R].to(wide), w_in[expert])
        out_RD = packed_linear_reference(activate(hidden_RG, activation), w_out[expert])
        weight_R1 = weight_TK[token_R, choice_R].to(wide).unsqueeze(1)
        y_TD.index_add_(0, token_R, weight_R1 * out_RD)
    return y_TD.to(x_TD.dtype)


def check_rows(x_MK: Tensor, weight: PackedWeight) -> None:
    """Refuse rows that a matrix cannot multiply.

    Raises:
        ValueError: for another width, type or device.
    """
    if x_MK.dim() != 2 or x_MK.shape[1] != weight.columns:
        raise ValueError(
            f"x is {list(x_MK.shape)}; the matrix multiplies rows of {weight.columns} numbers"
        )
    _check_numbers("x", x_MK, weight)


def check_tables(w_in: PackedTable, w_out: PackedTable, activation: Activation) -> None:
    """Refuse matrices that are not the two of each expert.

    Raises:
        ValueError: if their number or their shapes do not fit together.
    """
    first, second = w_in.weights[0], w_out.weights[0]
    if len(w_in.weights) != len(w_out.weights):
        raise ValueError(
            f"w_in is of {len(w_in.weights)} experts, but w_out of {len(w_out.weights)}"
        )
    inner = second.columns * (2 if activation is Activation.swiglu else 1)
    if (first.rows, first.columns) != (inner, second.rows):
        raise ValueError(
            f"w_in is {[first.rows, first.columns]}; with w_out of "
            f"{[second.rows, second.columns]} and {activation.name} it must be "
            f"{[inner, second.rows]}"
        )
    if first.data.device != second.data.device:
        raise ValueError(f"w_in is on {first.data.device}, but w_out on {second.data.device}")


def check_choices(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, first: PackedWeight, experts: int
) -> None:
    """Refuse tokens, or choices of experts, that these experts cannot serve.

    Args:
        x_TD: tokens.
        expert_TK: choices.
        weight_TK: combine weights.
        first: a first matrix of any expert.
        experts: their number.

    Raises:
        ValueError: for another width, type or device, or an expert that does not exist.
    """
    check_rows(x_TD, first)
    if expert_TK.dtype != torch.int64:
        raise ValueError(f"expert_TK is {expert_TK.dtype}; it must be torch.int64")
    if not weight_TK.is_floating_point():
        raise ValueError(f"weight_TK is {weight_TK.dtype}; it must be a floating type")
    if expert_TK.dim() != 2 or len(expert_TK) != len(x_TD) or weight_TK.shape != expert_TK.shape:
        raise ValueError(
            f"expert_TK is {list(expert_TK.shape)} and weight_TK {list(weight_TK.shape)}; both "
            f"must have a row for each of {len(x_TD)} tokens and the same columns"
        )
    if not expert_TK.device == weight_TK.device == x_TD.device:
        raise ValueError(
            f"x is on {x_TD.device}, expert_TK on {expert_TK.device}, weight_TK on "
            f"{weight_TK.device}; they must be on one device"
        )
    if not expert_TK.numel():
        return
    least, most = (int(end) for end in expert_TK.aminmax())
    if least < -1 or most >= experts:
        raise ValueError(
            f"expert_TK goes from {least} to {most}; with {experts} experts it must be from -1 "
            f"(none) to {experts - 1}"
        )


def _check_numbers(name: str, x: Tensor, weight: PackedWeight) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; it must be a floating type")
    if x.device != weight.data.device:
        raise ValueError(f"{name} is on {x.device}, but the matrix on {weight.data.device}")


def _kernels_for(x: Tensor) -> PackedKernels | None:
    if x.device.type != "cpu" or x.dtype not in {torch.float32, torch.bfloat16}:
        return None
    return load_packed_kernels()
