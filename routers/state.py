"""What a router keeps between steps: balancing bias, steered loss weight, table of token ids.

None of it is a parameter. The demand of each optimizer step moves it, checkpoints hold it, and
evaluation leaves it alone. `router.py` decides by it.

Shapes:  E experts, all ranks   K experts per token, at most   V token ids   D model width
"""

import torch
from torch import Tensor, nn

from gatewise.routers import balance
from gatewise.routers.ahead.config import AheadKind
from gatewise.routers.api import Demand
from gatewise.routers.config import BalanceScope, BiasRule, RouterConfig, Scorer, Selector
from gatewise.routers.hashing import expert_table
from gatewise.routers.quantile import BINS, balancing_bias
from gatewise.routers.recurrent import RecurrentCell
from gatewise.routers.shapes import layer_weights
from gatewise.routers.weights import RouterWeights

__all__ = ["StatefulRouter"]


class StatefulRouter(RouterWeights):
    """The weights of one layer's router, and the state that balances its choices.

    `bias_E` balances the choice; it is no parameter: the demand of each optimizer step moves it.

    Args:
        hidden: D.
        num_experts: E.
        top_k: K; the target where the number of experts per token varies.
        config: the parts.
        cell: the recurrent scorer's, shared with other layers and registered elsewhere.
        index: which of the model's MoE layers, from 0.
        vocab_size: number of token ids; needed where the choice is by token id.

    Raises:
        ValueError: for settings that do not fit the sizes.
    """

    weight: nn.Parameter  # this and the next five as `shapes.py` says
    logit_bias: nn.Parameter
    projection: nn.Parameter
    projection_bias: nn.Parameter
    temperature: nn.Parameter
    noise_weight: nn.Parameter
    bias_E: Tensor
    loss_weight: Tensor
    table_VK: Tensor

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        config: RouterConfig,
        *,
        cell: RecurrentCell | None = None,
        index: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        config.check(num_experts, top_k)
        super().__init__(layer_weights(config, hidden, num_experts))
        self.num_experts = num_experts
        self.top_k = top_k
        self.config = config
        self.index = index
        assert (cell is None) == (config.scorer is not Scorer.recurrent)
        self._shared = (cell,)  # in a tuple, so that it is not registered here a second time
        self.hashed = config.selector is Selector.hash or index < config.hash_layers
        self.fixed = self.hashed or config.ahead.kind is AheadKind.hash  # the load is no matter
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        if config.sparsity_rate:
            self.register_buffer("loss_weight", torch.zeros((), dtype=torch.float32))
        if self.hashed:
            if vocab_size is None:
                raise ValueError(
                    "the router chooses by token id but vocab_size is not given; pass the number "
                    "of token ids"
                )
            table_VK = torch.zeros(vocab_size, top_k, dtype=torch.int64)
            self.register_buffer("table_VK", table_VK)
        if not self.bias_E.is_meta:
            self.reset_state()

    def reset_state(self) -> None:
        """Give the bias, the steered loss weight and the table their starting values."""
        self.bias_E.zero_()
        if self.config.sparsity_rate:
            self.loss_weight.fill_(self.config.balance_loss)
        if self.hashed:
            self.table_VK.copy_(
                expert_table(
                    self.table_VK.shape[0],
                    self.num_experts,
                    self.top_k,
                    layer=self.index,
                    path=self.config.hash_table,
                )
            )

    def state(self) -> dict[str, Tensor]:
        """Return what decides beside the parameters, by name; kept in checkpoints."""
        state = {"bias": self.bias_E}
        if self.config.sparsity_rate:
            state["loss_weight"] = self.loss_weight
        if self.hashed:  # the file that it came from may change
            state["table"] = self.table_VK
        return state

    @property
    def looks_at_sequences(self) -> bool:
        """Whether a decision or a loss for a token depends on others of its sequence."""
        config = self.config
        by_sequence = config.batch_entropy_loss or config.importance_loss or config.load_loss
        if config.balance_scope is BalanceScope.micro_batch:
            by_sequence = 0.0
        elif config.balance_scope is BalanceScope.sequence:
            by_sequence = by_sequence or config.balance_loss
        return bool(config.competing or by_sequence)

    @property
    def reads_columns(self) -> bool:
        """Whether the context must hold the statistics of the experts' weights."""
        return self.config.scorer is Scorer.sparsity

    @property
    def moves(self) -> bool:
        """Whether `after_step` changes anything."""
        config = self.config
        return bool(config.sparsity_rate or (config.bias_rate and not self.fixed))

    @property
    def global_loss_weight(self) -> float | Tensor:
        """Weight of the balance loss over the global batch, which its owner computes; 0 is none."""
        if self.config.balance_scope is not BalanceScope.global_batch:
            return 0.0
        return self._balance_weight

    @property
    def _balance_weight(self) -> float | Tensor:
        return self.loss_weight if self.config.sparsity_rate else self.config.balance_loss

    @torch.no_grad()
    def after_step(self, demand: Demand) -> None:
        """Move the balance state by what an optimizer step demanded of all layers.

        Args:
            demand: over all ranks and micro-batches; row `index` is this layer's.
        """
        config = self.config
        if config.sparsity_rate:
            layers = demand.count_LE.shape[0]
            pairs = layers * demand.tokens * self.num_experts
            sparse = 1 - demand.count_LE.sum() / pairs.clamp(min=1)
            wanted = 1 - self.top_k / self.num_experts
            factor = torch.where(sparse < wanted, config.sparsity_rate, 1 / config.sparsity_rate)
            self.loss_weight.mul_(factor)
        if not config.bias_rate or self.fixed:
            return
        if config.bias_rule is BiasRule.sign:
            count_E = demand.count_LE[self.index]
            balance.update_bias_(self.bias_E, count_E, rate=config.bias_rate)
        elif demand.margin_LEM is not None:
            share = self.top_k / self.num_experts
            new_E = balancing_bias(demand.margin_LEM[self.index], share=share)
            self.bias_E.lerp_(new_E, config.bias_rate)

    def no_margins(self) -> Tensor | None:
        """Return the margins of no token; None where the bias does not come from them."""
        if self.config.bias_rule is not BiasRule.quantile or not self.config.bias_rate:
            return None
        return torch.zeros(self.num_experts, BINS, device=self.bias_E.device)
