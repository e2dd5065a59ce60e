"""Hash routing: a fixed table from token ids to experts, known before any layer runs.

Shapes:  T tokens on this rank   V token ids   E experts, all ranks   K experts per token
Source:  Hash Layers, arXiv:2106.04426, section 3.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["balanced_table", "expert_table", "look_up", "read_table"]

_CHUNK = 4096  # token ids that are drawn together
_SEED = 0x6A7E


def expert_table(
    vocab_size: int, num_experts: int, top_k: int, *, layer: int, path: str | None = None
) -> Tensor:
    """Return the experts of every token id: int64 (V, K), K different ones in each row.

    Args:
        vocab_size: V.
        num_experts: E.
        top_k: K.
        layer: which MoE layer; each has another random table.
        path: a file to read instead, the same for all layers.

    Raises:
        ValueError: as `read_table`.
    """
    if path is not None:
        return torch.from_numpy(read_table(path, vocab_size, num_experts, top_k))
    generator = torch.Generator().manual_seed(_SEED + layer)
    parts = []
    for start in range(0, vocab_size, _CHUNK):
        rows = min(_CHUNK, vocab_size - start)
        parts.append(torch.rand(rows, num_experts, generator=generator).argsort(1)[:, :top_k])
    return torch.cat(parts)


def read_table(
    path: str, vocab_size: int, num_experts: int, top_k: int
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """Read a table and check that it is one for this model.

    Raises:
        ValueError: one line, naming router.hash_table.
    """
    where = f"router.hash_table is {path}"
    try:
        table = np.load(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}, which cannot be read as .npy: {error}") from error
    if table.shape != (vocab_size, top_k) or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(
            f"{where}, which holds {table.dtype} of shape {table.shape}; it must hold whole "
            f"numbers of shape ({vocab_size}, {top_k}): the tokenizer's ids x model.top_k"
        )
    ordered = np.sort(table, axis=1)
    if table.min() < 0 or table.max() >= num_experts or (np.diff(ordered, axis=1) == 0).any():
        raise ValueError(
            f"{where}; each row must hold different experts from 0 to {num_experts - 1}"
        )
    checked: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = table.astype(np.int64)
    return checked


def balanced_table(count_V: Tensor, num_experts: int, top_k: int) -> Tensor:
    """Return a table that spreads the tokens of a corpus evenly over the experts.

    Ids go, the most frequent first, to the experts that have least so far.

    Args:
        count_V: how often each id occurs.
        num_experts: E.
        top_k: K.
    """
    table_VK = torch.empty(count_V.shape[0], top_k, dtype=torch.int64)
    load_E = np.zeros(num_experts)
    counts = count_V.tolist()
    for token in count_V.argsort(descending=True, stable=True).tolist():
        chosen = np.argsort(load_E, kind="stable")[:top_k]
        load_E[chosen] += counts[token]
        table_VK[token] = torch.from_numpy(chosen)
    return table_VK


def look_up(table_VK: Tensor, token_T: Tensor | None) -> Tensor:
    """Return the experts of each token: (T, K).

    Raises:
        ValueError: if there are no token ids.
    """
    if token_T is None:
        raise ValueError("the router chooses by token id but got none; pass token_ids to the layer")
    return table_VK[token_T]
