"""Hash routing ahead of the layers: fixed tables from token ids to experts; no parameter.

Read first: `routers/hashing.py` (how tables are made and read).

Shapes:  V vocabulary   L decisions   T tokens on this rank   K experts per token
         E experts, all ranks
Source:  Hash layers, arXiv:2106.04426, section 3 (random and balanced tables); weights from the
         layer's own router at the table's experts: DeepSeek-V4.
"""

import torch
from torch import Tensor

from gatewise.routers.ahead.base import DecidesAhead
from gatewise.routers.ahead.config import AheadConfig
from gatewise.routers.ahead.trunk import PrefixCache
from gatewise.routers.hashing import balanced_table, expert_table

__all__ = ["HashGate"]


class HashGate(DecidesAhead):
    """Chooses experts by token id alone.

    The tables start random, or as the file says; `balance` makes balanced ones. They are saved in
    checkpoints, because balanced ones depend on the training text.

    Args:
        config: `per_layer` has a table for each layer.
        vocab_size: V.
        layers: MoE layers of the model.
        num_experts: E.
        top_k: K.
        path: an .npy file (V, K) to use for all layers.
    """

    table_LVK: Tensor

    def __init__(
        self,
        config: AheadConfig,
        vocab_size: int,
        *,
        layers: int,
        num_experts: int,
        top_k: int,
        path: str | None = None,
    ) -> None:
        super().__init__({}, config, layers=layers, num_experts=num_experts, top_k=top_k)
        self._path = path
        shape = (config.decisions(layers), vocab_size, top_k)
        self.register_buffer("table_LVK", torch.zeros(shape, dtype=torch.int32), persistent=False)
        if not self.table_LVK.is_meta:
            self.reset_state()

    def reset_state(self) -> None:
        """Put in the random tables, or the file's.

        Raises:
            ValueError: if the file is for another vocabulary, top_k or number of experts.
        """
        for layer, table_VK in enumerate(self.table_LVK):
            table_VK.copy_(
                expert_table(
                    table_VK.shape[0], self.num_experts, self.top_k, layer=layer, path=self._path
                )
            )
        self.advance()

    def balance(self, count_V: Tensor) -> None:
        """Put in tables that give all experts about equally many tokens of a text.

        Layers name the experts in another order, so that two ids that share experts in one layer
        do so in all: a file gives more freedom.

        Args:
            count_V: how often each id occurs.
        """
        table_VK = balanced_table(count_V.cpu(), self.num_experts, self.top_k)
        generator = torch.Generator().manual_seed(0x5EED)
        for row_VK in self.table_LVK:
            name_E = torch.randperm(self.num_experts, generator=generator)
            row_VK.copy_(name_E[table_VK])
        self.advance()

    def state(self) -> dict[str, Tensor]:
        """Return the tables."""
        return {"table": self.table_LVK}

    def choose(self, token_BS: Tensor, cache: PrefixCache | None) -> tuple[Tensor, None]:
        """Look the experts up."""
        del cache  # a table has no context
        return self.table_LVK[:, token_BS.flatten()].long(), None
