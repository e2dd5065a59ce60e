"""Hash tables that spread a training text evenly over the experts."""

import numpy as np
import torch

from gatewise.moe.model import Decoder
from gatewise.routers.ahead.config import HashFill
from gatewise.routers.ahead.table import HashGate
from gatewise.training.data import PreparedData

__all__ = ["balance_hash_table"]

_BLOCK = 1 << 22  # tokens that are counted together


def balance_hash_table(model: Decoder, data: PreparedData) -> None:
    """Make the tables of a model's hash pre-gate from the frequencies of the training text.

    Nothing happens to another model, nor where a file or `fill=random` says what the tables are.

    Args:
        model: built; a checkpoint that is loaded afterwards brings its own tables.
        data: the same on all ranks.
    """
    gate, config = model.ahead, model.router_config
    if not isinstance(gate, HashGate) or config.hash_table is not None:
        return
    if config.ahead.fill is not HashFill.balanced:
        return
    vocab_size = gate.table_LVK.shape[1]
    count_V = np.zeros(vocab_size, dtype=np.int64)
    tokens = data.train.tokens
    for start in range(0, len(tokens), _BLOCK):
        count_V += np.bincount(tokens[start : start + _BLOCK], minlength=vocab_size)
    gate.balance(torch.from_numpy(count_V))
