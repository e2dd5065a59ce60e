"""The C++ kernels behind `permute.py` and `grouped_ffn.py`, called through ctypes.

Each method takes contiguous CPU tensors of one dtype (fp32 or bf16) and trusts its caller; the
callers hold them to their plain torch versions in tests. `load_kernels` returns None on a machine
without a compiler.

Shapes:  as in `permute.py` and `grouped_ffn.py`
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatewise.moe.config import Activation
from gatewise.moe.ops.build import build_library, cache_folder, find_compiler

__all__ = ["ACTIVATIONS", "Kernels", "kernels_for", "load_kernels", "open_kernels"]

_log = logging.getLogger(__name__)
ACTIVATIONS = {Activation.swiglu: 0, Activation.gelu: 1, Activation.relu: 2}
_INTEGERS = (
    "experts",
    "width",
    "expert_width",
    "activation",
    "is_bf16",
    "threads",
    "dw_is_bf16",
    "accumulate",
)
_POINTERS = (
    "end",
    "x",
    "w_in",
    "w_out",
    "dy",
    "hidden",
    "y",
    "dx",
    "dhidden",
    "inner",
    "dw_in",
    "dw_out",
)


class _FfnCall(ctypes.Structure):
    """The same struct as in `csrc/ffn.h`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


class Kernels:
    """The functions of one compiled library.

    Args:
        library: as `ctypes.CDLL` loaded it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        region = _parallel_region()
        if region is not None:
            library.gatewise_use_threads(region)

    def sort_pairs(
        self, expert_TK: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Do `permute.sort_pairs`.

        Raises:
            IndexError: for an expert that does not exist.
        """
        order_M = torch.empty(expert_TK.numel(), dtype=torch.int64)
        token_M, inverse_TK = torch.empty_like(order_M), torch.empty_like(expert_TK)
        count_E = torch.empty(num_experts, dtype=torch.int64)
        bad = self.library.gatewise_sort_pairs(
            _pointer(expert_TK),
            *_sizes(expert_TK.numel(), expert_TK.shape[1], num_experts),
            *map(_pointer, (order_M, token_M, inverse_TK, count_E)),
        )
        if bad:
            raise IndexError(f"an expert index is outside of -1 to {num_experts - 1}")
        return order_M, token_M, inverse_TK, count_E

    def gather_rows(self, x_TD: Tensor, token_N: Tensor) -> Tensor:
        """Do `permute.gather_rows`."""
        out_ND = x_TD.new_empty(token_N.shape[0], x_TD.shape[1])
        self.library.gatewise_gather_rows(
            _pointer(x_TD),
            _pointer(token_N),
            *_sizes(token_N.shape[0], x_TD.shape[1] * x_TD.element_size()),
            _pointer(out_ND),
            *_sizes(torch.get_num_threads()),
        )
        return out_ND

    def sum_rows(self, y_ND: Tensor, inverse_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """Do `permute.combine_rows`, or `gather_rows_backward` without weights."""
        num_tokens, top_k = inverse_TK.shape
        out_TD = y_ND.new_empty(num_tokens, y_ND.shape[1])
        self.library.gatewise_sum_rows(
            *_sizes(y_ND.dtype == torch.bfloat16),
            _pointer(y_ND),
            _pointer(inverse_TK),
            _pointer(weight_TK),
            *_sizes(num_tokens, top_k, y_ND.shape[1]),
            _pointer(out_TD),
            *_sizes(torch.get_num_threads()),
        )
        return out_TD

    def combine_backward(
        self, dy_TD: Tensor, y_ND: Tensor, inverse_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do `permute.combine_rows_backward`."""
        num_tokens, top_k = inverse_TK.shape
        dy_ND, dweight_TK = torch.empty_like(y_ND), torch.empty_like(weight_TK)
        self.library.gatewise_combine_backward(
            *_sizes(y_ND.dtype == torch.bfloat16),
            *map(_pointer, (dy_TD, y_ND, inverse_TK, weight_TK)),
            *_sizes(num_tokens, top_k, y_ND.shape[1]),
            *map(_pointer, (dy_ND, dweight_TK)),
            *_sizes(torch.get_num_threads()),
        )
        return dy_ND, dweight_TK

    def ffn_forward(
        self,
        x_RD: Tensor,
        end_e: Tensor,
        weights: tuple[Tensor, Tensor],
        activation: Activation,
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs, and the first product in the kernels' own order."""
        hidden = x_RD.new_empty(x_RD.shape[0], weights[0].shape[1])
        y_RD = torch.empty_like(x_RD)
        self._ffn("forward", end_e, weights, activation, x=x_RD, y=y_RD, hidden=hidden)
        return y_RD, hidden

    def ffn_backward_data(
        self,
        dy_RD: Tensor,
        end_e: Tensor,
        weights: tuple[Tensor, Tensor],
        activation: Activation,
        hidden: Tensor,
        *,
        need_dx: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return dx, and for the weights the gradient of the first product and the activations.

        The numbers of the last two lie in the kernels' own order.
        """
        dhidden = torch.empty_like(hidden)
        inner_RF = dy_RD.new_empty(dy_RD.shape[0], weights[1].shape[2])
        dx_RD = torch.empty_like(dy_RD) if need_dx else None
        self._ffn(
            "backward_data",
            end_e,
            weights,
            activation,
            dy=dy_RD,
            hidden=hidden,
            dhidden=dhidden,
            inner=inner_RF,
            dx=dx_RD,
        )
        return dx_RD, dhidden, inner_RF

    def ffn_backward_weights(  # noqa: PLR0917 - the operands of one kernel
        self,
        dy_RD: Tensor,
        x_RD: Tensor,
        end_e: Tensor,
        weights: tuple[Tensor, Tensor],
        work: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor],
        *,
        accumulate: bool,
    ) -> None:
        """Write both gradients, or add them."""
        # the activation matters only for the relation of G and F
        gated = weights[0].shape[1] == 2 * weights[1].shape[2]
        self._ffn(
            "backward_weights",
            end_e,
            weights,
            Activation.swiglu if gated else Activation.relu,
            dy=dy_RD,
            x=x_RD,
            dhidden=work[0],
            inner=work[1],
            dw_in=gradients[0],
            dw_out=gradients[1],
            accumulate=accumulate,
            dw_is_bf16=gradients[0].dtype == torch.bfloat16,
        )

    def activate(self, hidden_RG: Tensor, activation: Activation, expert_width: int) -> Tensor:
        """Return the activations (R, F) of a row-major first product."""
        inner_RF = hidden_RG.new_empty(hidden_RG.shape[0], expert_width)
        self.library.gatewise_activate(
            *_sizes(hidden_RG.dtype == torch.bfloat16, ACTIVATIONS[activation]),
            _pointer(hidden_RG),
            *_sizes(hidden_RG.shape[0], expert_width),
            _pointer(inner_RF),
            *_sizes(torch.get_num_threads()),
        )
        return inner_RF

    def activate_backward(
        self, dinner_RF: Tensor, hidden_RG: Tensor, activation: Activation
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the first product, and the activations."""
        dhidden_RG, inner_RF = torch.empty_like(hidden_RG), torch.empty_like(dinner_RF)
        self.library.gatewise_activate_backward(
            *_sizes(hidden_RG.dtype == torch.bfloat16, ACTIVATIONS[activation]),
            *map(_pointer, (dinner_RF, hidden_RG)),
            *_sizes(*dinner_RF.shape),
            *map(_pointer, (dhidden_RG, inner_RF)),
            *_sizes(torch.get_num_threads()),
        )
        return dhidden_RG, inner_RF

    def _ffn(
        self,
        function: str,
        end_e: Tensor,
        weights: tuple[Tensor, Tensor],
        activation: Activation,
        **others: Any,  # tensors, None or integers, by the struct's field names
    ) -> None:
        w_in_eGD, w_out_eDF = weights
        num_experts, width, expert_width = w_out_eDF.shape
        call = _FfnCall(
            experts=num_experts,
            width=width,
            expert_width=expert_width,
            activation=ACTIVATIONS[activation],
            is_bf16=w_in_eGD.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            end=end_e.data_ptr(),
            w_in=w_in_eGD.data_ptr(),
            w_out=w_out_eDF.data_ptr(),
        )
        for name, value in others.items():
            setattr(call, name, value.data_ptr() if isinstance(value, Tensor) else value)
        getattr(self.library, f"gatewise_ffn_{function}")(ctypes.byref(call))


@functools.lru_cache(maxsize=1)
def load_kernels() -> Kernels | None:
    """Return the kernels of this machine, built if need be; None where that is not possible."""
    try:
        return open_kernels(find_compiler())
    except (OSError, RuntimeError, ImportError) as error:
        _log.warning("CPU kernels are not available (%s); torch's operators do the work", error)
        return None


def kernels_for(x: Tensor) -> Kernels | None:
    """Return the kernels if they exist and can work on tensors like `x`."""
    if x.device.type != "cpu" or x.dtype not in {torch.float32, torch.bfloat16}:
        return None
    return load_kernels()


def open_kernels(compiler: str | None) -> Kernels:
    """Build the library if need be, and load it.

    Raises:
        RuntimeError: without a compiler, or if it fails.
        OSError: if the cache folder or the library cannot be used.
    """
    if compiler is None:
        raise RuntimeError("no C++ compiler found; install g++ or clang++")
    return Kernels(ctypes.CDLL(str(build_library(compiler, cache_folder()))))


def _parallel_region() -> ctypes.c_void_p | None:
    """Return the entry point of the OpenMP library that torch has loaded."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return None
    return ctypes.cast(function, ctypes.c_void_p)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _sizes(*values: int) -> Sequence[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]
