"""The candidates of `bench_kernels.py`: one token times a matrix, or through an MoE layer.

Each candidate's error is that of its output against its own weights, dequantised, times the exact
token in fp64: what the product adds to the error of the weights.

Shapes:  N rows   K columns   G groups of a row   D model width   F expert width   E experts
         T tokens   k experts of a token
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.compression.formats import ZeroPoint
from gatewise.compression.grids import GridSearch
from gatewise.compression.quantize import Quantized, round_to_nearest
from gatewise.compression.runtime import to_panels
from gatewise.moe.config import Activation
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.layer import MoE
from gatewise.moe.ops.activate import activate
from gatewise.moe.ops.packed import packed_linear, unpack_weight, unpack_weight_reference
from gatewise.moe.ops.panels import PackedWeight, pack_panels
from gatewise.moe.packed import PackedExperts
from gatewise.routers.api import Routing, RoutingContext

__all__ = ["Candidate", "layer_candidates", "matrix_candidates"]

_TOKENS = 64  # that the layer's calls take in turn, so that they reach different experts
_CHECKED = 8  # of them, for the error
_INT8 = 127
_W = TypeVar("_W")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is timed: `call` takes any number, and uses the copy of the weights that it means."""

    name: str
    bits: int
    call: Callable[[int], Tensor]
    weight_bytes: int  # of one copy
    relative_error: float


def matrix_candidates(
    shape: tuple[int, int], widths: Sequence[int], *, group: int, footprint: int, seed: int
) -> list[Candidate]:
    """Build the products with one matrix, fp32 first.

    Args:
        shape: (N, K).
        widths: bits of ours.
        group: columns of a group.
        footprint: bytes that the copies of a candidate take at least.
        seed: of matrix and token.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    x_1K = torch.randn(1, shape[1], generator=generator)

    def plain(name: str, bits: int, weight_NK: Tensor) -> Candidate:
        row_1K = x_1K.to(weight_NK.dtype)
        copies = _copies(weight_NK, weight_NK.nbytes, footprint, Tensor.clone)
        return _candidate(
            name, bits, copies, lambda w: F.linear(row_1K, w), weight_NK.nbytes, weight_NK, x_1K
        )

    found = [plain("fp32", 32, weight_NK), plain("bf16", 16, weight_NK.bfloat16())]
    found.append(_torch_int8(weight_NK, x_1K, footprint))
    if shape[0] % 16 == 0 and group in (32, 64, 128):  # what torch's product takes
        found.append(_torch_int4(weight_NK, x_1K, group, footprint))
    for bits in widths:
        panels = _panels(weight_NK, bits, group)
        copies = _copies(panels, panels.nbytes, footprint, _clone_panels)
        exact_NK = unpack_weight_reference(panels, torch.float64)
        found.append(
            _candidate(
                f"gatewise {bits} bit",
                bits,
                copies,
                lambda w: packed_linear(x_1K, w),
                panels.nbytes,
                exact_NK,
                x_1K,
            )
        )
    return found


def _torch_int8(weight_NK: Tensor, x_1K: Tensor, footprint: int) -> Candidate:
    """Build torch's product with int8 weights, a bf16 scale per row and bf16 activations."""
    scale_N = (weight_NK.abs().amax(1) / _INT8).bfloat16()
    code_NK = (weight_NK / scale_N.float().unsqueeze(1)).round().clamp(-_INT8, _INT8).char()
    size = code_NK.nbytes + scale_N.nbytes
    row_1K = x_1K.bfloat16()
    return _candidate(
        "torch int8pack",
        8,
        _copies((code_NK, scale_N), size, footprint, _clone_pair),
        lambda pair: torch.ops.aten._weight_int8pack_mm(row_1K, *pair),
        size,
        code_NK.double() * scale_N.double().unsqueeze(1),
        x_1K,
    )


def _torch_int4(weight_NK: Tensor, x_1K: Tensor, group: int, footprint: int) -> Candidate:
    """Build torch's product with 4-bit weights, value = (code - 8) * scale + zero in bf16."""
    found = _round(weight_NK, 4, group)
    assert found.zero_NG is not None
    scale_NG = found.scale_NG.float()
    pair_NG2 = torch.stack((scale_NG, scale_NG * (8 - found.zero_NG.float())), 2).bfloat16()
    pair_GN2 = pair_NG2.transpose(0, 1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(found.code_NK.int(), 1)
    pair_NK2 = pair_NG2.double().repeat_interleave(group, 1)[:, : weight_NK.shape[1]]
    size = packed.nbytes + pair_GN2.nbytes
    row_1K = x_1K.bfloat16()
    return _candidate(
        "torch int4pack",
        4,
        _copies((packed, pair_GN2), size, footprint, _clone_pair),
        lambda pair: torch.ops.aten._weight_int4pack_mm_for_cpu(row_1K, pair[0], group, pair[1]),
        size,
        (found.code_NK.double() - 8) * pair_NK2[..., 0] + pair_NK2[..., 1],
        x_1K,
    )


def layer_candidates(
    shape: tuple[int, int, int, int],
    widths: Sequence[int],
    *,
    group: int,
    footprint: int,
    seed: int,
) -> list[Candidate]:
    """Build MoE layers that take one token: fp32 first, bf16, and ours on codes.

    All but the last have the dequantised weights of the widest one of ours. `loop` is one
    `F.linear` after the other, for the experts of the token alone.

    Args:
        shape: D, F, E and k.
        widths: bits of ours.
        group: columns of a group.
        footprint: bytes that the copies of a candidate take at least.
        seed: of weights and tokens.
    """
    hidden, width, experts, top_k = shape
    generator = torch.Generator().manual_seed(seed)
    token_T1D = torch.randn(_TOKENS, 1, hidden, generator=generator).bfloat16().float()
    torch.manual_seed(seed)  # the router starts from torch's own generator
    layer = MoE(hidden, width, experts, top_k).eval()
    found: list[Candidate] = []
    for bits in sorted(widths, reverse=True):
        packed = _random_experts(shape, bits, group, generator)
        if not found:
            _fill(layer.experts, packed)
            found += _plain_layers(layer, packed, token_T1D, footprint)
        with torch.device("meta"):
            ours = MoE(hidden, width, experts, top_k, router=layer.router)
        ours.layer.experts = GroupedExperts(0, hidden, width, Activation.swiglu)
        ours.layer.packed = packed
        copies = _copies(ours.eval(), packed.nbytes, footprint, deepcopy)
        found.append(
            _layer_candidate(f"gatewise {bits} bit", bits, copies, _whole, packed, token_T1D)
        )
    return found


def _plain_layers(
    layer: MoE, packed: PackedExperts, token_T1D: Tensor, footprint: int
) -> list[Candidate]:
    found = []
    for name, bits, dtype in (("fp32", 32, torch.float32), ("bf16", 16, torch.bfloat16)):
        mine = deepcopy(layer)
        mine.layer.experts.to(dtype)
        size = sum(parameter.nbytes for parameter in mine.layer.experts.parameters())
        copies = _copies(mine, size, footprint, deepcopy)
        token = token_T1D.to(dtype)
        found.append(_layer_candidate(name, bits, copies, _whole, packed, token, size))
        found.append(_layer_candidate(f"{name} loop", bits, copies, _loop, packed, token, size))
    return found


def _whole(layer: MoE, x_1D: Tensor) -> Tensor:
    """Apply the layer as a model does that generates."""
    return layer.layer(x_1D, RoutingContext(measures=False), 0)[0]  # type: ignore[no-any-return]  # a module


def _loop(layer: MoE, x_1D: Tensor) -> Tensor:
    """Apply the token's experts one by one with torch's products."""
    routing = _route(layer, x_1D)
    y_1D = torch.zeros_like(x_1D)
    experts = layer.experts
    for expert, weight in zip(routing.expert_TK[0].tolist(), routing.weight_TK[0], strict=True):
        hidden_1G = F.linear(x_1D, experts.w_in_eGD[expert])
        y_1D += weight * F.linear(
            activate(hidden_1G, experts.activation), experts.w_out_eDF[expert]
        )
    return y_1D


def _route(layer: MoE, x_1D: Tensor) -> Routing:
    return layer.router(x_1D, RoutingContext(measures=False), 0)[0]


def _layer_candidate(  # noqa: PLR0917 - the parts of a candidate
    name: str,
    bits: int,
    copies: Sequence[MoE],
    product: Callable[[MoE, Tensor], Tensor],
    packed: PackedExperts,
    token_T1D: Tensor,
    size: int | None = None,
) -> Candidate:
    @torch.no_grad()
    def call(number: int) -> Tensor:
        return product(copies[number % len(copies)], token_T1D[number % _TOKENS])

    squares = [0.0, 0.0]
    for number in range(_CHECKED):
        x_1D = token_T1D[number]
        exact_D = _exact(_route(copies[0], x_1D), packed, x_1D[0].double())
        squares[0] += float((call(number)[0].double() - exact_D).square().sum())
        squares[1] += float(exact_D.square().sum())
    error = (squares[0] / squares[1]) ** 0.5
    return Candidate(name, bits, call, size or packed.nbytes, error)


def _exact(routing: Routing, packed: PackedExperts, x_D: Tensor) -> Tensor:
    """Return the layer's output in fp64 from dequantised weights."""
    y_D = torch.zeros_like(x_D)
    for expert, weight in zip(routing.expert_TK[0].tolist(), routing.weight_TK[0], strict=True):
        first, second = (
            unpack_weight_reference(table.weights[expert], torch.float64)
            for table in (packed.w_in, packed.w_out)
        )
        y_D += weight.double() * (second @ activate(first @ x_D, packed.activation))
    return y_D.detach()


def _random_experts(
    shape: tuple[int, int, int, int], bits: int, group: int, generator: torch.Generator
) -> PackedExperts:
    """Draw codes and scales, which are as fast as those of real weights."""
    hidden, width, experts, _ = shape

    def draw(rows: int, columns: int) -> PackedWeight:
        groups = -(-columns // group)
        code_NK = torch.randint(1 << bits, (rows, columns), generator=generator).byte()
        spread = ((1 << 2 * bits) - 1) / 12  # variance of the codes
        scale = (columns * spread) ** -0.5
        scale_NG = scale * (0.5 + torch.rand(rows, groups, generator=generator))
        zero_NG = torch.full((rows, groups), ((1 << bits) - 1) / 2) if bits > 1 else None
        return pack_panels(
            code_NK,
            scale_NG.half(),
            None if zero_NG is None else zero_NG.half(),
            bits=bits,
            group=group,
            zero=None if bits > 1 else 0.5,
        )

    first = [draw(2 * width, hidden) for _ in range(experts)]
    second = [draw(hidden, width) for _ in range(experts)]
    return PackedExperts(first, second, Activation.swiglu)


@torch.no_grad()
def _fill(experts: GroupedExperts, packed: PackedExperts) -> None:
    for table, target_eNK in (
        (packed.w_in, experts.w_in_eGD),
        (packed.w_out, experts.w_out_eDF),
    ):
        for weight, out_NK in zip(table.weights, target_eNK, strict=True):
            unpack_weight(weight, out_NK)


def _round(weight_NK: Tensor, bits: int, group: int) -> Quantized:
    search = GridSearch(zero=ZeroPoint.float)
    return round_to_nearest(weight_NK.unsqueeze(0), [float(bits)], group=group, search=search)[0]


def _panels(weight_NK: Tensor, bits: int, group: int) -> PackedWeight:
    return to_panels(_round(weight_NK, bits, group))


def _copies(weights: _W, size: int, footprint: int, clone: Callable[[_W], _W]) -> list[_W]:
    """Return the weights and as many copies as fill the footprint."""
    return [weights, *(clone(weights) for _ in range(-(-footprint // size) - 1))]


def _clone_panels(weight: PackedWeight) -> PackedWeight:
    return replace(weight, data=weight.data.clone())


def _clone_pair(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].clone(), pair[1].clone()


def _candidate(  # noqa: PLR0917 - the parts of a candidate
    name: str,
    bits: int,
    copies: Sequence[_W],
    product: Callable[[_W], Tensor],
    size: int,
    exact_NK: Tensor,
    x_1K: Tensor,
) -> Candidate:
    exact_N = exact_NK.double() @ x_1K[0].double()
    error = (product(copies[0])[0].double() - exact_N).norm() / exact_N.norm()
    return Candidate(name, bits, lambda n: product(copies[n % len(copies)]), size, float(error))
