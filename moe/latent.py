"""Latent attention (MLA): keys and values of all heads come from one narrow vector per token.

A head's queries and keys have a part without positions and a rotary part; the rotary part of the
keys is one for all heads.

Shapes:  B sequences   S positions   D model width   H heads   R width of the latent vector
         C plain width   P rotary width   V value width, of a head
Source:  DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.moe.attention import KeyValueCache, RMSNorm, visible
from gatewise.moe.attention_config import RopeScaling
from gatewise.moe.config import ModelConfig
from gatewise.moe.rotary import mscale, rotate

__all__ = ["LatentAttention"]

_EPS = 1e-6  # of the inner norms, whatever the model's is


class LatentAttention(nn.Module):
    """One layer of latent attention, all its heads on this rank.

    Args:
        config: sizes; `attention.latent` is on.

    `watch`, where set, is told the queries (B, H, S, C + P) and all keys.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.latent, self.heads = config.attention.latent, config.heads
        latent, hidden = self.latent, config.hidden
        self.widths = (latent.plain_width, latent.rope_width)
        width = config.head_width()
        rank = latent.query_rank
        self.w_query_down = None if rank is None else nn.Parameter(torch.empty(rank, hidden))
        self.norm_query = nn.Identity() if rank is None else RMSNorm(rank, _EPS)
        self.w_query = nn.Parameter(torch.empty(self.heads * width, rank or hidden))
        self.w_down = nn.Parameter(torch.empty(latent.rank + latent.rope_width, hidden))
        self.norm_latent = RMSNorm(latent.rank, _EPS)
        up = self.heads * (latent.plain_width + latent.value_width)
        self.w_up = nn.Parameter(torch.empty(up, latent.rank))
        self.w_out = nn.Parameter(torch.empty(hidden, self.heads * latent.value_width))
        self.scale = width**-0.5
        if config.rope.scaling is RopeScaling.yarn and config.rope.mscale_all:
            self.scale *= mscale(config.rope.factor, config.rope.mscale_all) ** 2
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer: int,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend to this and earlier positions; arguments as `Attention` has them."""
        batch, positions, _ = x_BSD.shape
        narrow = x_BSD
        if self.w_query_down is not None:
            narrow = self.norm_query(F.linear(x_BSD, self.w_query_down))
        query = F.linear(narrow, self.w_query).view(batch, positions, self.heads, -1)
        q_plain, q_rotary = query.split(self.widths, -1)
        q_BHSW = torch.cat((q_plain, rotate(q_rotary, rotary)), -1).transpose(1, 2)
        latent_BSR, k_rotary = F.linear(x_BSD, self.w_down).split(
            (self.latent.rank, self.latent.rope_width), -1
        )
        up = F.linear(self.norm_latent(latent_BSR), self.w_up)
        k_plain, v_BSHV = up.view(batch, positions, self.heads, -1).split(
            (self.latent.plain_width, self.latent.value_width), -1
        )
        k_rotary = rotate(k_rotary.unsqueeze(2), rotary).expand(-1, -1, self.heads, -1)
        k_BHSW = torch.cat((k_plain, k_rotary), -1).transpose(1, 2)
        v_BHSV = v_BSHV.transpose(1, 2)
        if cache is not None:
            k_BHSW, v_BHSV = cache.append(layer, k_BHSW, v_BHSV)
        if self.watch is not None:
            self.watch(q_BHSW, k_BHSW)
        mask = visible(positions, k_BHSW.shape[2], None, x_BSD.device)
        y_BHSV = F.scaled_dot_product_attention(
            q_BHSW,
            k_BHSW,
            v_BHSV,
            attn_mask=mask,
            is_causal=mask is None and positions > 1,
            scale=self.scale,
        )
        return F.linear(y_BHSV.transpose(1, 2).flatten(2), self.w_out)
