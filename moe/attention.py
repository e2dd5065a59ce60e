"""Causal self-attention: rotary positions, grouped queries, optional norm of queries and keys.

Further options, as published models have them: biases, windows, sinks (`attention_config.py`).
Latent attention is in `latent.py`.

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

from gatewise.moe.config import ModelConfig
from gatewise.moe.packed import multiply
from gatewise.moe.rotary import rotate
from gatewise.parallel.parameters import Span
from gatewise.parallel.sequence import WHOLE_SEQUENCES, SequenceSplit
from gatewise.routers.ahead.trunk import PrefixCache

__all__ = ["Attention", "KeyValueCache", "RMSNorm", "visible"]


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
        config: sizes and options; heads and key-value heads are multiples of the split's parts.
        layer: index from 0; some options differ between layers.
        split: how positions lie on ranks.

    `watch`, where set, is told the rotated queries (B, H, S, W) and all keys (B, J, P, W).

    Source: tensor and sequence parallelism: arXiv:2205.05198, section 4.2.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, split: SequenceSplit = WHOLE_SEQUENCES
    ) -> None:
        super().__init__()
        extra, hidden = config.attention, config.hidden
        assert extra.plain or split.parts == 1
        self.split = split
        self.head_width = config.head_width()
        self.heads = config.heads // split.parts
        self.kv_heads = (config.kv_heads or config.heads) // split.parts
        self.window = extra.window_of(layer)
        rows = (self.heads + 2 * self.kv_heads) * self.head_width
        self.w_qkv = nn.Parameter(torch.empty(rows, hidden))
        self.w_out = nn.Parameter(torch.empty(hidden, self.heads * self.head_width))
        self.bias_qkv = nn.Parameter(torch.empty(rows)) if extra.qkv_bias else None
        self.bias_out = nn.Parameter(torch.empty(hidden)) if extra.out_bias else None
        self.sinks = nn.Parameter(torch.empty(self.heads)) if extra.sinks else None
        self.norm_whole = extra.norm_whole
        widths = [self.head_width] * 2
        if extra.norm_whole:
            widths = [heads * self.head_width for heads in (self.heads, self.kv_heads)]
        self.norm_q, self.norm_k = (
            RMSNorm(width, config.norm_eps) if config.qk_norm else nn.Identity() for width in widths
        )
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight with all heads."""
        parts = self.split.parts
        if parts == 1:
            return tuple(getattr(self, name).shape)
        rows, columns = getattr(self, name).shape
        return (rows * parts, columns) if name == "w_qkv" else (rows, columns * parts)

    def spans(self, name: str) -> tuple[Span, ...]:
        """Return where a weight's elements lie in the flattened weight with all heads."""
        part, parts = self.split.part, self.split.parts
        if parts == 1:
            return ()
        rows, columns = getattr(self, name).shape
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
        qkv = multiply(x_BSD, self.w_qkv)
        if self.bias_qkv is not None:
            qkv = qkv + self.bias_qkv
        qkv = qkv.view(batch, positions, -1, self.head_width)
        q, k, v_BSJW = qkv.split((self.heads, self.kv_heads, self.kv_heads), 2)
        q_BHSW = rotate(self._normed(self.norm_q, q), rotary).transpose(1, 2)
        k_BJSW = rotate(self._normed(self.norm_k, k), rotary).transpose(1, 2)
        v_BJSW = v_BSJW.transpose(1, 2)
        if cache is not None:
            k_BJSW, v_BJSW = cache.append(layer, k_BJSW, v_BJSW)
        if self.watch is not None:
            self.watch(q_BHSW, k_BJSW)
        mask = visible(positions, k_BJSW.shape[2], self.window, x_BSD.device)
        if self.sinks is not None:
            y_BHSW = _attend_with_sinks(q_BHSW, k_BJSW, v_BJSW, mask, self.sinks)
        else:
            y_BHSW = F.scaled_dot_product_attention(
                q_BHSW,
                k_BJSW,
                v_BJSW,
                attn_mask=mask,
                is_causal=mask is None and positions > 1,
                enable_gqa=self.kv_heads != self.heads,
            )
        y_BSD = multiply(y_BHSW.transpose(1, 2).flatten(2), self.w_out)
        if self.bias_out is not None:
            y_BSD = y_BSD + self.bias_out
        return self.split.summed(y_BSD)

    def _normed(self, norm: nn.Module, x_BSHW: Tensor) -> Tensor:
        if not self.norm_whole:
            return norm(x_BSHW)  # type: ignore[no-any-return]  # a module
        return norm(x_BSHW.flatten(2)).view_as(x_BSHW)  # type: ignore[no-any-return]


def visible(positions: int, total: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys each new position sees, bool (S, P); None: itself and all before it.

    Args:
        positions: new ones S, the last of all.
        total: keys P, those of the cache included.
        window: how many a position sees, itself included; None for all.
        device: of the result.
    """
    narrow = window is not None and total > window
    if not narrow and positions in (1, total):
        return None
    mask = torch.ones(positions, total, dtype=torch.bool, device=device)
    mask = mask.tril(total - positions)
    return mask.triu(total - positions - window + 1) if narrow and window else mask


def _attend_with_sinks(
    q_BHSW: Tensor, k_BJPW: Tensor, v_BJPW: Tensor, mask: Tensor | None, sink_H: Tensor
) -> Tensor:
    """Attend with one more logit per head that has no value, so that weights may sum to less."""
    positions, total = q_BHSW.shape[2], k_BJPW.shape[2]
    if mask is None:
        mask = torch.ones(positions, total, dtype=torch.bool, device=q_BHSW.device)
        mask = mask.tril(total - positions)
    share = q_BHSW.shape[1] // k_BJPW.shape[1]
    k_BHPW, v_BHPW = (x.repeat_interleave(share, 1) for x in (k_BJPW, v_BJPW))
    logit_BHSP = q_BHSW @ k_BHPW.transpose(2, 3) * q_BHSW.shape[3] ** -0.5
    logit_BHSP = logit_BHSP.float().masked_fill(~mask, float("-inf"))
    sink_BHS1 = sink_H.float().view(1, -1, 1, 1).expand(*logit_BHSP.shape[:3], 1)
    weight_BHSP = torch.cat((logit_BHSP, sink_BHS1), -1).softmax(-1)[..., :-1]
    return weight_BHSP.to(v_BHPW.dtype) @ v_BHPW
