"""Which training sequences calibrate: those of a larger pool that reach the experts best.

A routing-only pass counts, for each sequence of the pool, how many of its tokens reach each expert
of each layer. Sequences are then taken greedily by how much of what is still missing they bring.

Shapes:  P sequences of the pool   L MoE layers   E experts   B sequences of a batch
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gatewise.compression.stream import BlockStream

__all__ = ["choose_sequences", "count_by_sequence"]


def count_by_sequence(
    stream: BlockStream, token_batches: Sequence[Tensor], num_experts: int
) -> npt.NDArray[np.int64]:
    """Return how many tokens of each sequence reach each expert, (P, L, E).

    Args:
        stream: not begun.
        token_batches: int64 (B, S) each.
        num_experts: E.
    """
    stream.begin(token_batches)
    layers = []
    for layer in range(stream.model.config.layers):
        with stream.resident(layer) as block:
            routings = stream.advance(block)
        counts = []
        for token_BS, routing in zip(token_batches, routings, strict=True):
            if routing is None:
                break
            chosen_BC = routing.expert_TK.reshape(token_BS.shape[0], -1)
            one_BCE = chosen_BC.unsqueeze(2) == torch.arange(num_experts, device=chosen_BC.device)
            counts.append(one_BCE.sum(1).cpu())
        if counts:
            layers.append(torch.cat(counts).numpy())
    return np.stack(layers, axis=1).astype(np.int64)


def choose_sequences(count_PLE: npt.NDArray[np.int64], number: int, target: int) -> list[int]:
    """Choose sequences that bring every expert to its target, as far as that is possible.

    Args:
        count_PLE: from `count_by_sequence`.
        number: sequences to choose, at most P.
        target: tokens that each expert should get.

    Returns:
        Indices, ascending; ties go to the lowest, and once nothing is missing the lowest are taken.
    """
    flat_PX = count_PLE.reshape(count_PLE.shape[0], -1)
    missing_X = np.full(flat_PX.shape[1], target, dtype=np.int64)
    free_P = np.ones(len(flat_PX), dtype=bool)
    for _ in range(number):
        gain_P = np.minimum(flat_PX, missing_X).sum(axis=1)
        gain_P[~free_P] = -1
        best = int(gain_P.argmax())
        free_P[best] = False
        missing_X = np.maximum(missing_X - flat_PX[best], 0)
    return [int(index) for index in np.flatnonzero(~free_P)]
