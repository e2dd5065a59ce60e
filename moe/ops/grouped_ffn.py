"""The experts' feed-forward network over rows sorted by expert: forward and manual backward.

Pure functions without autograd: the MoE layer calls them inside its own autograd function. The
backward pass is two functions, because a scheduler may run the gradient of the data, on which
another rank waits, before the gradient of the weights, on which nobody waits.

Two engines do the products. Torch's grouped product serves every device, and CPUs whose bfloat16
units torch's library knows how to use. Everywhere else on a CPU our own kernel (`native.py`)
computes in fp32, whatever the numbers are stored in: it fuses the activation, reads each weight
once per block of rows, and spreads the experts over the threads.

Read first: `reference.py`, the same arithmetic one row at a time.

Shapes:  R rows, sorted by local expert   e local experts   D model width   F expert width
         G rows of the first weight: 2F with a gate (swiglu; gate rows first), else F
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops.native import Kernels, kernels_for
from gatewise.moe.ops.reuse import ReusedMemory

__all__ = ["ffn_backward", "ffn_backward_data", "ffn_backward_weights", "ffn_forward"]


def ffn_forward(
    x_RD: Tensor,
    end_e: Tensor,
    w_in_eGD: Tensor,
    w_out_eDF: Tensor,
    activation: Activation,
    *,
    count_list: list[int] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply each local expert to its rows.

    Args:
        x_RD: rows sorted by local expert; fp32, bf16 or fp64.
        end_e: int32, for each local expert the end of its rows; the last equals R.
        w_in_eGD: first weights, `nn.Linear` layout, of the dtype of `x_RD`.
        w_out_eDF: second weights.
        activation: the non-linearity between them.
        count_list: rows per local expert on the host, if the caller has them.

    Returns:
        The outputs (R, D) and the tensors that the backward pass needs.
    """
    kernels = _kernels_for_products(x_RD)
    if kernels is not None:
        weights = (w_in_eGD.contiguous(), w_out_eDF.contiguous())
        y_RD, hidden = kernels.ffn_forward(x_RD.contiguous(), end_e, weights, activation)
        return y_RD, (hidden,)
    hidden_RG = _rows_times_weight(x_RD, w_in_eGD.transpose(1, 2), end_e, count_list)
    inner_RF = _activate(hidden_RG, activation)
    y_RD = _rows_times_weight(inner_RF, w_out_eDF.transpose(1, 2), end_e, count_list)
    return y_RD, (hidden_RG,)


def ffn_backward(  # noqa: PLR0917 - the operands of one kernel
    dy_RD: Tensor,
    x_RD: Tensor,
    end_e: Tensor,
    w_in_eGD: Tensor,
    w_out_eDF: Tensor,
    activation: Activation,
    saved: tuple[Tensor, ...],
    *,
    dw_in_eGD: Tensor | None = None,
    dw_out_eDF: Tensor | None = None,
    accumulate: bool = False,
    need_dx: bool = True,
    count_list: list[int] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of rows and weights; see the two parts for the arguments."""
    dx_RD, work = ffn_backward_data(
        dy_RD,
        end_e,
        w_in_eGD,
        w_out_eDF,
        activation,
        saved,
        need_dx=need_dx,
        count_list=count_list,
    )
    dw_in_eGD, dw_out_eDF = ffn_backward_weights(
        dy_RD,
        x_RD,
        end_e,
        w_in_eGD,
        w_out_eDF,
        work,
        dw_in_eGD=dw_in_eGD,
        dw_out_eDF=dw_out_eDF,
        accumulate=accumulate,
        count_list=count_list,
    )
    return dx_RD, dw_in_eGD, dw_out_eDF


def ffn_backward_data(  # noqa: PLR0917 - the operands of one kernel
    dy_RD: Tensor,
    end_e: Tensor,
    w_in_eGD: Tensor,
    w_out_eDF: Tensor,
    activation: Activation,
    saved: tuple[Tensor, ...],
    *,
    need_dx: bool = True,
    count_list: list[int] | None = None,
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """Return the gradient of the rows, and what the gradient of the weights needs.

    Args:
        dy_RD: gradient of the outputs.
        end_e: as in `ffn_forward`.
        w_in_eGD: first weights.
        w_out_eDF: second weights.
        activation: the non-linearity between them.
        saved: second result of `ffn_forward`.
        need_dx: False skips the last product and returns None in its place.
        count_list: rows per local expert on the host, if the caller has them.

    Returns:
        dx (R, D), and the pair (gradient of the first product, inner activations).
    """
    (hidden_RG,) = saved
    kernels = _kernels_for_products(dy_RD)
    if kernels is not None:
        weights = (w_in_eGD.contiguous(), w_out_eDF.contiguous())
        dx_RD, *work = kernels.ffn_backward_data(
            dy_RD.contiguous(), end_e, weights, activation, hidden_RG, need_dx=need_dx
        )
        return dx_RD, (work[0], work[1])
    dinner_RF = _rows_times_weight(dy_RD.contiguous(), w_out_eDF, end_e, count_list)
    dhidden_RG, inner_RF = _activate_backward(dinner_RF, hidden_RG, activation)
    dx_RD = _rows_times_weight(dhidden_RG, w_in_eGD, end_e, count_list) if need_dx else None
    return dx_RD, (dhidden_RG, inner_RF)


def ffn_backward_weights(  # noqa: PLR0917 - the operands of one kernel
    dy_RD: Tensor,
    x_RD: Tensor,
    end_e: Tensor,
    w_in_eGD: Tensor,
    w_out_eDF: Tensor,
    work: tuple[Tensor, Tensor],
    *,
    dw_in_eGD: Tensor | None = None,
    dw_out_eDF: Tensor | None = None,
    accumulate: bool = False,
    count_list: list[int] | None = None,
    memory: ReusedMemory | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both weights; experts without rows get zeros.

    Args:
        dy_RD: gradient of the outputs.
        x_RD: the rows given to `ffn_forward`.
        end_e: as in `ffn_forward`.
        w_in_eGD: first weights (only shape and dtype matter).
        w_out_eDF: second weights (only shape and dtype matter).
        work: second result of `ffn_backward_data`.
        dw_in_eGD: buffer to write, fp32 or the dtype of the weights; None makes a fresh one.
        dw_out_eDF: the same for the second weights.
        accumulate: add into the buffers instead of overwriting them.
        count_list: rows per local expert on the host, if the caller has them.
        memory: where fresh tensors come from, if the engine can write into given memory.

    Returns:
        The two buffers, or fresh tensors of the dtype of the weights.
    """
    dhidden_RG, inner_RF = work
    dy_RD = dy_RD.contiguous()
    kernels = _kernels_for_products(dy_RD)
    if kernels is not None:
        if dw_in_eGD is None or dw_out_eDF is None:
            memory = memory or ReusedMemory()
            dw_in_eGD, dw_out_eDF = memory.take(w_in_eGD), memory.take(w_out_eDF)
            accumulate = False
        kernels.ffn_backward_weights(
            dy_RD,
            x_RD.contiguous(),
            end_e,
            (w_in_eGD, w_out_eDF),
            work,
            (dw_in_eGD, dw_out_eDF),
            accumulate=accumulate,
        )
        return dw_in_eGD, dw_out_eDF
    dw_in_eGD = _weight_gradient(
        dhidden_RG, x_RD, end_e, w_in_eGD, dw_in_eGD, accumulate, count_list
    )
    dw_out_eDF = _weight_gradient(
        dy_RD, inner_RF, end_e, w_out_eDF, dw_out_eDF, accumulate, count_list
    )
    return dw_in_eGD, dw_out_eDF


def _kernels_for_products(x: Tensor) -> Kernels | None:
    """Return the kernels where they are faster than torch's products."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and _has_bf16_units():
        return None
    return kernels_for(x)


@functools.lru_cache(maxsize=1)
def _has_bf16_units() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware, so that torch's products do."""
    probes = (
        getattr(torch.cpu, name, None)  # private, so it may go
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return any(probe is not None and bool(probe()) for probe in probes)


def _activate(hidden_RG: Tensor, activation: Activation) -> Tensor:
    """Return the inner activations (R, F), rounded once to the dtype of the input."""
    kernels = kernels_for(hidden_RG)
    if kernels is not None:
        gated = activation is Activation.swiglu
        return kernels.activate(hidden_RG, activation, hidden_RG.shape[1] // (2 if gated else 1))
    if activation is Activation.swiglu:
        gate_RF, up_RF = hidden_RG.chunk(2, dim=1)
        return F.silu(gate_RF).mul_(up_RF)
    if activation is Activation.gelu:
        return F.gelu(hidden_RG)
    return F.relu(hidden_RG)


def _activate_backward(
    dinner_RF: Tensor, hidden_RG: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the first product (R, G) and the recomputed activations (R, F)."""
    kernels = kernels_for(hidden_RG)
    if kernels is not None:
        return kernels.activate_backward(dinner_RF, hidden_RG, activation)
    if activation is Activation.swiglu:
        gate_RF, up_RF = hidden_RG.chunk(2, dim=1)
        sigmoid_RF = gate_RF.sigmoid()
        silu_RF = gate_RF * sigmoid_RF
        dhidden_RG = torch.empty_like(hidden_RG)
        dgate_RF, dup_RF = dhidden_RG.chunk(2, dim=1)
        torch.mul(dinner_RF, silu_RF, out=dup_RF)
        # d silu(g) = s (1 + g (1 - s)) = s + silu (1 - s)
        slope_RF = torch.addcmul(sigmoid_RF, silu_RF, 1 - sigmoid_RF)
        torch.mul(dinner_RF * up_RF, slope_RF, out=dgate_RF)
        return dhidden_RG, silu_RF.mul_(up_RF)
    inner_RF = _activate(hidden_RG, activation)
    if activation is Activation.gelu:
        return torch.ops.aten.gelu_backward(dinner_RF, hidden_RG), inner_RF
    return dinner_RF * (hidden_RG > 0), inner_RF


def _rows_times_weight(
    x_RK: Tensor, weight_eKN: Tensor, end_e: Tensor, count_list: list[int] | None
) -> Tensor:
    """Multiply each expert's rows with its matrix."""
    if x_RK.shape[0] == 0:
        return x_RK.new_zeros(0, weight_eKN.shape[2])
    if _grouped_mm_takes(x_RK, weight_eKN):
        return torch._grouped_mm(x_RK, weight_eKN, offs=end_e)
    y_RN = x_RK.new_empty(x_RK.shape[0], weight_eKN.shape[2])
    for expert, (start, end) in enumerate(_bounds(end_e, count_list)):
        torch.mm(x_RK[start:end], weight_eKN[expert], out=y_RN[start:end])
    return y_RN


def _weight_gradient(  # noqa: PLR0917 - the operands of one kernel
    dy_RN: Tensor,
    x_RK: Tensor,
    end_e: Tensor,
    weight_eNK: Tensor,
    out_eNK: Tensor | None,
    accumulate: bool,
    count_list: list[int] | None,
) -> Tensor:
    """Return dy^T x per expert, written or added into `out_eNK` when it is given."""
    if x_RK.shape[0] == 0:
        if out_eNK is None:
            return torch.zeros_like(weight_eNK)
        return out_eNK if accumulate else out_eNK.zero_()
    if _grouped_mm_takes(dy_RN, x_RK):
        product_eNK = torch._grouped_mm(dy_RN.t(), x_RK, offs=end_e)
    else:
        product_eNK = torch.zeros_like(weight_eNK, memory_format=torch.contiguous_format)
        for expert, (start, end) in enumerate(_bounds(end_e, count_list)):
            torch.mm(dy_RN[start:end].t(), x_RK[start:end], out=product_eNK[expert])
    if out_eNK is None:
        return product_eNK
    return out_eNK.add_(product_eNK) if accumulate else out_eNK.copy_(product_eNK)


def _grouped_mm_takes(*operands: Tensor) -> bool:
    """Tell whether torch's grouped product accepts these operands (no fp64; rows of 16 bytes)."""
    for x in operands:
        row, column = x.stride()[-2:]
        steps = [row if column == 1 else column, *x.stride()[:-2]]
        if 1 not in {row, column} or x.dtype not in {torch.float32, torch.bfloat16}:
            return False
        if any(step * x.element_size() % 16 for step in steps):
            return False
    return True


def _bounds(end_e: Tensor, count_list: list[int] | None) -> list[tuple[int, int]]:
    """Return (start, end) of each expert's rows."""
    # The only host synchronisation, and only where the caller has no counts on the host.
    counts = count_list if count_list is not None else end_e.diff(prepend=end_e.new_zeros(1))
    sizes = counts if isinstance(counts, list) else counts.tolist()
    bounds = []
    start = 0
    for size in sizes:
        bounds.append((start, start + size))
        start += size
    return bounds
