"""Soft routing: every expert gets mixtures of all tokens of a sequence, every token all outputs.

Fully differentiable and free of drops, but a token's output depends on later tokens too.

Shapes:  T tokens on this rank   B sequences   P positions of a sequence   E experts
         S slots: `slots` per expert, expert-major
Source:  Soft MoE, arXiv:2308.00951, section 2.1.
"""

import torch
from torch import Tensor

from gatewise.routers.api import Load, SlotMix

__all__ = ["mix_slots", "soft_load"]


def mix_slots(
    logits_TS: Tensor, *, num_experts: int, sequences: int, padding_T: Tensor | None
) -> SlotMix:
    """Return the mixing weights of slots and tokens.

    Args:
        logits_TS: of every token for every slot.
        num_experts: E.
        sequences: B; tokens of different sequences never mix.
        padding_T: True where a token gives nothing to slots.
    """
    num_tokens, num_slots = logits_TS.shape
    logits_BPS = logits_TS.view(sequences, num_tokens // sequences, num_slots)
    scatter_BPS = logits_BPS.softmax(2)
    if padding_T is not None:
        padding_BP1 = padding_T.view(sequences, -1, 1)
        # not -inf: a sequence of padding alone would have no finite logit
        logits_BPS = logits_BPS.masked_fill(padding_BP1, torch.finfo(logits_BPS.dtype).min)
        scatter_BPS = scatter_BPS.masked_fill(padding_BP1, 0.0)
    slots = num_slots // num_experts
    expert_S = torch.arange(num_experts, device=logits_TS.device).repeat_interleave(slots)
    return SlotMix(logits_BPS.softmax(1).transpose(1, 2), scatter_BPS, expert_S)


def soft_load(mix: SlotMix, num_experts: int, padding_T: Tensor | None) -> tuple[Load, Tensor]:
    """Return the load, which is equal by design, and each token's share per expert (T, E)."""
    batch, positions, num_slots = mix.scatter_BPS.shape
    slots = num_slots // num_experts
    by_slot_TES = mix.scatter_BPS.reshape(batch * positions, num_experts, slots)
    share_TE = by_slot_TES.sum(2)
    count_E = share_TE.new_full((num_experts,), batch * num_slots / num_experts).float()
    if padding_T is None:
        tokens = count_E.new_tensor(batch * positions)
    else:
        tokens = (~padding_T).sum().float()
    return Load(count_E, share_TE.sum(0).detach(), tokens), share_TE
