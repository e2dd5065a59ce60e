"""Pre-gates: one network outside the layers that chooses the experts of all layers at once.

Read first: `plan.py` (what comes out), `trunk.py` (what goes in), `config.py`.

Both kinds see the token ids alone, so that their decision is there before layer 0. `ReadMeGate` has
one linear head on the trunk, for all layers or one per layer. `GruGate` runs the recurrence of the
GRU router over the layers, on the same features for each; what it chose so far is in its state.

Shapes:  B sequences   S positions   T = B * S tokens   V vocabulary   W width of the trunk
         L decisions   E experts, all ranks   K experts per token   H width of the GRU's state
Source:  Read-ME, arXiv:2410.19123; the recurrence over layers: RMoE, arXiv:2408.06793, eq. 3-6.
"""

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.routers.ahead.base import DecidesAhead
from gatewise.routers.ahead.config import AheadConfig, AheadKind, AheadTrunk
from gatewise.routers.ahead.shapes import gru_weights, read_me_weights
from gatewise.routers.ahead.table import HashGate
from gatewise.routers.ahead.trunk import PrefixCache, Trunk
from gatewise.routers.choice import stable_topk
from gatewise.routers.shapes import Weight

__all__ = ["GruGate", "PreGate", "ReadMeGate", "build_pregate"]


class PreGate(DecidesAhead):
    """What the learned kinds share: a trunk, and choosing from logits.

    Args:
        weights: parameters beside those of the trunk.
        config: trunk, weights and exchange.
        vocab_size: V.
        layers: MoE layers of the model.
        num_experts: E.
        top_k: K.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        config: AheadConfig,
        vocab_size: int,
        *,
        layers: int,
        num_experts: int,
        top_k: int,
    ) -> None:
        super().__init__(weights, config, layers=layers, num_experts=num_experts, top_k=top_k)
        heads = config.heads if config.trunk is AheadTrunk.block else 0
        self.trunk = Trunk(vocab_size, config.width, heads)

    @abstractmethod
    def logits(self, token_BS: Tensor, cache: PrefixCache | None = None) -> Tensor:
        """Return logits (L, T, E), float32."""

    def choose(self, token_BS: Tensor, cache: PrefixCache | None) -> tuple[Tensor, Tensor]:
        """Return the experts with the largest logits, and the logits."""
        with torch.autocast(token_BS.device.type, enabled=False):
            logits_LTE = self.logits(token_BS, cache)
            decisions, tokens, experts = logits_LTE.shape
            flat_NE = torch.nan_to_num(logits_LTE.detach().reshape(-1, experts), nan=-1e30)
            expert_LTK = stable_topk(flat_NE, self.top_k).view(decisions, tokens, self.top_k)
        return expert_LTK, logits_LTE


class ReadMeGate(PreGate):
    """A linear head on the trunk: one decision for all layers, or one per layer.

    Args:
        config: trunk and `per_layer`.
        vocab_size: V.
        layers: MoE layers of the model.
        num_experts: E.
        top_k: K.
    """

    w_head: Tensor
    b_head: Tensor

    def __init__(
        self, config: AheadConfig, vocab_size: int, *, layers: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(
            read_me_weights(config, num_experts, layers),
            config,
            vocab_size,
            layers=layers,
            num_experts=num_experts,
            top_k=top_k,
        )

    def logits(self, token_BS: Tensor, cache: PrefixCache | None = None) -> Tensor:
        """Return logits (L, T, E)."""
        logits_BSM = F.linear(self.trunk(token_BS, cache), self.w_head, self.b_head)
        return logits_BSM.view(token_BS.numel(), -1, self.num_experts).transpose(0, 1)


class GruGate(PreGate):
    """The GRU pre-gate: a GRU whose time axis is the layers, per token.

    Layer l sees the token's features plus an embedding of l; its own head reads the state. The
    state says which way the token went so far, so choices of different layers are not independent.

    Args:
        config: trunk, and the width H of the state.
        vocab_size: V.
        layers: MoE layers of the model.
        num_experts: E.
        top_k: K.
    """

    w_features: Tensor
    layer_LH: Tensor
    w_input: Tensor
    w_state: Tensor
    b_input: Tensor
    b_state: Tensor
    w_head_LEH: Tensor

    def __init__(
        self, config: AheadConfig, vocab_size: int, *, layers: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(
            gru_weights(config, num_experts, layers),
            config,
            vocab_size,
            layers=layers,
            num_experts=num_experts,
            top_k=top_k,
        )

    def inputs(self, token_BS: Tensor, cache: PrefixCache | None = None) -> Tensor:
        """Return what the GRU reads in each layer, (L, T, H)."""
        features_TH = F.linear(self.trunk(token_BS, cache), self.w_features).flatten(0, 1)
        return features_TH.unsqueeze(0) + self.layer_LH.unsqueeze(1)

    def logits(self, token_BS: Tensor, cache: PrefixCache | None = None) -> Tensor:
        """Return logits (L, T, E)."""
        input_LTH = self.inputs(token_BS, cache)
        start_1TH = torch.zeros_like(input_LTH[:1])
        weights = (self.w_input, self.w_state, self.b_input, self.b_state)
        # input, state, weights, biases, layers of cells, dropout, training, bidirectional, batch
        state_LTH, _ = torch.gru(
            input_LTH, start_1TH, weights, True, 1, 0.0, torch.is_grad_enabled(), False, False
        )
        return torch.bmm(state_LTH, self.w_head_LEH.transpose(1, 2))

    def logits_reference(self, token_BS: Tensor) -> Tensor:
        """Return the same as `logits`, written out as the loop over layers."""
        input_LTH = self.inputs(token_BS)
        state_TH = torch.zeros_like(input_LTH[0])
        rows = []
        for input_TH, w_head_EH in zip(input_LTH, self.w_head_LEH, strict=True):
            reset_in, update_in, new_in = F.linear(input_TH, self.w_input, self.b_input).chunk(3, 1)
            reset, update, new = F.linear(state_TH, self.w_state, self.b_state).chunk(3, 1)
            keep_TH = torch.sigmoid(update_in + update)
            new_TH = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
            state_TH = (1 - keep_TH) * new_TH + keep_TH * state_TH
            rows.append(F.linear(state_TH, w_head_EH))
        return torch.stack(rows)


def build_pregate(
    config: AheadConfig,
    vocab_size: int,
    *,
    layers: int,
    num_experts: int,
    top_k: int,
    table: str | None = None,
) -> PreGate | HashGate | None:
    """Return the pre-gate that `config` describes; None where it is off.

    Args:
        config: settings.
        vocab_size: V.
        layers: MoE layers of the model.
        num_experts: E.
        top_k: K.
        table: file of the hash table, for `kind=hash`.
    """
    if config.kind is AheadKind.off or not layers:
        return None
    if config.kind is AheadKind.hash:
        return HashGate(
            config, vocab_size, layers=layers, num_experts=num_experts, top_k=top_k, path=table
        )
    kind = GruGate if config.kind is AheadKind.gru else ReadMeGate
    return kind(config, vocab_size, layers=layers, num_experts=num_experts, top_k=top_k)
