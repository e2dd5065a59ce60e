"""Causal self-attention: rotary positions, grouped queries, optional norm of queries and keys.

Shapes:  B sequences   S positions   D model width   H query heads   J key-value heads
         W width per head   P positions in the cache and this call together
Source:  rotary embeddings: arXiv:2104.09864; grouped-query attention: arXiv:2305.13245;
         QK-norm: arXiv:2302.05442.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.moe.packed import multiply
from gatewise.parallel.parameters import Span
from gatewise.parallel.sequence import WHOLE_SEQUENCES, SequenceSplit
from gatewise.routers.ahead.trunk import PrefixCache

__all__ = ["Attention", "KeyValueCache", "RMSNorm", "rotary_tables"]


NormFunction = Callable[[Tensor, Tensor, float], Tensor]  # of x, gain, eps, all of one dtype


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Normalise with torch's kernel."""
    return F.rms_norm(x, gain.shape, gain, eps)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dim, times a learned gain; fp32 inside.

    `function` computes it; another fused kernel may take its place.

    Args:
        width: size of the last dim.
        eps: added to the mean square.

    Source: arXiv:1910.07467.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(width))
        self.function: NormFunction = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`; the result has its dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.function(x.to(wide), self.gain.to(wide), self.eps).to(x.dtype)


@dataclass(slots=True)
class KeyValueCache:
    """Keys and values of the tokens before, per layer, for generation."""

    length: int = 0  # positions that all layers hold
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ahead: PrefixCache = field(default_factory=PrefixCache)  # of a pre-gate

    def append(self, layer: int, k_BJSW: Tensor, v_BJSW: Tensor) -> tuple[Tensor, Tensor]:
        """Add this call's keys and values; return all of them."""
        if layer in self.layers:
            k_before, v_before = self.layers[layer]
            k_BJSW = torch.cat((k_before, k_BJSW), 2)
            v_BJSW = torch.cat((v_before, v_BJSW), 2)
        self.layers[layer] = (k_BJSW, v_BJSW)
        return k_BJSW, v_BJSW


class Attention(nn.Module):
    """One attention layer; with a split, this rank's heads of it over sequences that it gathers.

    Args:
        hidden: D.
        heads: H.
        kv_heads: J, a divisor of H.
        qk_norm: normalise queries and keys per head.
        eps: of that norm.
        split: how positions lie on ranks; its parts divide H and J.

    `watch`, where set, is told the rotated queries (B, H, S, W) and all keys (B, J, P, W).

    Source: tensor and sequence parallelism: arXiv:2205.05198, section 4.2.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        *,
        qk_norm: bool,
        eps: float,
        split: SequenceSplit = WHOLE_SEQUENCES,
    ) -> None:
        super().__init__()
        self.split = split
        self.head_width = hidden // heads
        self.heads, self.kv_heads = heads // split.parts, kv_heads // split.parts
        rows = (self.heads + 2 * self.kv_heads) * self.head_width
        self.w_qkv = nn.Parameter(torch.empty(rows, hidden))
        self.w_out = nn.Parameter(torch.empty(hidden, self.heads * self.head_width))
        self.norm_q = RMSNorm(self.head_width, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(self.head_width, eps) if qk_norm else nn.Identity()
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight with all heads."""
        rows, columns = getattr(self, name).shape
        parts = self.split.parts
        return (rows * parts, columns) if name == "w_qkv" else (rows, columns * parts)

    def spans(self, name: str) -> tuple[Span, ...]:
        """Return where a weight's elements lie in the flattened weight with all heads."""
        part, parts = self.split.part, self.split.parts
        rows, columns = getattr(self, name).shape
        if parts == 1:
            return ()
        if name == "w_out":
            return (Span(part * columns, rows, columns, parts * columns),)
        found, start = [], 0
        for heads in (self.heads, self.kv_heads, self.kv_heads):  # queries, keys, values
            size = heads * self.head_width * columns
            found.append(Span(start + part * size, 1, size))
            start += parts * size
        return tuple(found)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer: int,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend to this and earlier positions.

        Args:
            x_BSD: normed input.
            rotary: `rotary_tables` of these S positions.
            layer: place in the cache.
            cache: earlier keys and values, extended in place; None while training.
        """
        x_BSD = self.split.whole(x_BSD)
        batch, positions, _ = x_BSD.shape
        qkv = multiply(x_BSD, self.w_qkv).view(batch, positions, -1, self.head_width)
        q, k, v_BSJW = qkv.split((self.heads, self.kv_heads, self.kv_heads), 2)
        q_BHSW = _rotate(self.norm_q(q), rotary).transpose(1, 2)
        k_BJSW = _rotate(self.norm_k(k), rotary).transpose(1, 2)
        v_BJSW = v_BSJW.transpose(1, 2)
        causal = True
        if cache is not None:
            k_BJSW, v_BJSW = cache.append(layer, k_BJSW, v_BJSW)
            causal = positions == k_BJSW.shape[2]
        if self.watch is not None:
            self.watch(q_BHSW, k_BJSW)
        mask = None
        if not causal and positions > 1:  # new positions after cached ones
            total = k_BJSW.shape[2]
            mask = torch.ones(positions, total, dtype=torch.bool, device=x_BSD.device)
            mask = mask.tril(total - positions)
        y_BHSW = F.scaled_dot_product_attention(
            q_BHSW,
            k_BJSW,
            v_BJSW,
            attn_mask=mask,
            is_causal=causal and positions > 1,
            enable_gqa=self.kv_heads != self.heads,
        )
        y_BSD = multiply(y_BHSW.transpose(1, 2).flatten(2), self.w_out)
        return self.split.summed(y_BSD)


def rotary_tables(
    positions: int, width: int, base: float, *, start: int = 0, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine tables, fp32 (positions, 1, width / 2), from position `start`."""
    frequency = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    place = torch.arange(start, start + positions, device=device, dtype=torch.float32)
    angle = torch.outer(place, frequency).unsqueeze(1)
    return angle.cos(), angle.sin()


def _rotate(x_BSHW: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pair (i, i + W/2) of each head by its position's angle."""
    cosine, sine = (table.to(x_BSHW.dtype) for table in rotary)
    first, second = x_BSHW.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
