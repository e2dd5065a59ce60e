"""What a pre-gate knows of a token: an embedding of its id, or one causal block on the prefix.

All arithmetic is fp32 (fp64 for fp64 parameters), so that ranks and devices choose alike.

Shapes:  B sequences   S positions   T = B * S tokens   V vocabulary   W width of the trunk
         H heads   w width per head   P cached positions and these
Source:  Read-ME, arXiv:2410.19123, section 3 and table 1; attention is scaled by 1/sqrt(w).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.routers.ahead.shapes import trunk_weights
from gatewise.routers.weights import RouterWeights

__all__ = ["PrefixCache", "Trunk"]

_EPS = 1e-6
_ROPE_BASE = 10000.0


@dataclass(slots=True)
class PrefixCache:
    """Keys and values of the tokens before, for decoding; extended in place."""

    length: int = 0
    key_BHPw: Tensor | None = None
    value_BHPw: Tensor | None = None

    def append(self, key_BHSw: Tensor, value_BHSw: Tensor) -> tuple[Tensor, Tensor]:
        """Add this call's keys and values; return all of them."""
        if self.key_BHPw is not None and self.value_BHPw is not None:
            key_BHSw = torch.cat((self.key_BHPw, key_BHSw), 2)
            value_BHSw = torch.cat((self.value_BHPw, value_BHSw), 2)
        self.key_BHPw, self.value_BHPw = key_BHSw, value_BHSw
        self.length = key_BHSw.shape[2]
        return key_BHSw, value_BHSw


class Trunk(RouterWeights):
    """Features of each token from its own id and, with `heads`, from those before it.

    Args:
        vocab_size: V.
        width: W.
        heads: H of the block's attention; 0 has no block.
    """

    embedding: Tensor
    gain_attention: Tensor
    w_qkv: Tensor
    b_qkv: Tensor
    w_attention: Tensor
    b_attention: Tensor
    gain_mlp: Tensor
    w_up: Tensor
    b_up: Tensor
    w_down: Tensor
    b_down: Tensor
    gain_final: Tensor

    def __init__(self, vocab_size: int, width: int, heads: int) -> None:
        super().__init__(trunk_weights(vocab_size, width, block=heads > 0))
        self.heads = heads

    def forward(self, token_BS: Tensor, cache: PrefixCache | None = None) -> Tensor:
        """Return normed features (B, S, W); a feature depends on no later token."""
        x_BSW = F.embedding(token_BS, self.embedding)
        if self.heads:
            x_BSW = x_BSW + self._attend(_norm(x_BSW, self.gain_attention), cache)
            up_BSW = F.silu(F.linear(_norm(x_BSW, self.gain_mlp), self.w_up, self.b_up))
            x_BSW = x_BSW + F.linear(up_BSW, self.w_down, self.b_down)
        return _norm(x_BSW, self.gain_final)

    def _attend(self, x_BSW: Tensor, cache: PrefixCache | None) -> Tensor:
        batch, positions, width = x_BSW.shape
        qkv = F.linear(x_BSW, self.w_qkv, self.b_qkv).view(batch, positions, 3, self.heads, -1)
        q_BHSw, k_BHSw, v_BHSw = qkv.permute(2, 0, 3, 1, 4)
        before = 0 if cache is None else cache.length
        q_BHSw, k_BHSw = (_rotate(x, before) for x in (q_BHSw, k_BHSw))
        if cache is not None:
            k_BHSw, v_BHSw = cache.append(k_BHSw, v_BHSw)
        mask = None
        if before and positions > 1:  # new positions after cached ones
            mask = torch.ones(positions, before + positions, dtype=torch.bool, device=x_BSW.device)
            mask = mask.tril(before)
        y_BHSw = F.scaled_dot_product_attention(
            q_BHSw, k_BHSw, v_BHSw, attn_mask=mask, is_causal=not before and positions > 1
        )
        y_BSW = y_BHSw.transpose(1, 2).reshape(batch, positions, width)
        return F.linear(y_BSW, self.w_attention, self.b_attention)


def _norm(x_BSW: Tensor, gain_W: Tensor) -> Tensor:
    return F.rms_norm(x_BSW, gain_W.shape, gain_W, _EPS)


def _rotate(x_BHSw: Tensor, start: int) -> Tensor:
    """Rotate the pair (i, i + w/2) of each head by its position's angle."""
    positions, width = x_BHSw.shape[2:]
    place_S = torch.arange(start, start + positions, device=x_BHSw.device, dtype=torch.float32)
    step = torch.arange(0, width, 2, device=x_BHSw.device, dtype=torch.float32)
    angle = torch.outer(place_S, torch.exp(step * (-math.log(_ROPE_BASE) / width)))
    cosine, sine = angle.cos().to(x_BHSw.dtype), angle.sin().to(x_BHSw.dtype)
    first, second = x_BHSw.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
