"""Cut tokens into sequences: the training order, batches, and windows for evaluation.

The order of training is a function of the seed and the global sample number alone. Ranks take
their part of the numbers of a step, and a run is continued by one integer, so neither the number
of ranks nor a restart changes what is learnt from.

Shapes:  B sequences   L sequence_length   W windows
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from gatewise.parallel.errors import DataError
from gatewise.training.indexed import TokenFile

__all__ = ["Order", "SequenceOrder", "Windows", "read_batch", "validation_windows"]


class Order(Protocol):
    """Where each global sample starts in the training tokens."""

    @property
    def sequence_length(self) -> int:
        """Inputs of a sequence."""
        ...

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that the split holds."""
        ...

    def starts(self, global_indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the first token of each of several global samples, int64 [B]."""
        ...


class SequenceOrder:
    """Where each global sample starts in the training tokens.

    An epoch cuts the tokens into neighbouring sequences, from another random offset each time, and
    visits each once in random order. Permutation and offset come from raw 64-bit draws, whose
    stream NumPy keeps stable between versions, so that an old run can be continued.

    Args:
        num_tokens: tokens of the training split.
        sequence_length: inputs of a sequence L; it needs one token more for its last target.
        seed: any integer.

    Raises:
        DataError: if there are not enough tokens for one sequence.
    """

    def __init__(self, num_tokens: int, sequence_length: int, seed: int) -> None:
        if num_tokens < sequence_length + 1:
            raise DataError(
                f"the training split has {num_tokens} tokens, but one sequence needs "
                f"data.sequence_length + 1 = {sequence_length + 1}; "
                "lower data.sequence_length or give more text"
            )
        self.sequence_length = sequence_length
        # One sequence less than would fit leaves room for every offset below sequence_length.
        self.sequences_per_epoch = max(1, (num_tokens - sequence_length) // sequence_length)
        room = num_tokens - self.sequences_per_epoch * sequence_length
        self._num_offsets = min(sequence_length, room)
        self._seed = seed % (1 << 64)
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}

    def start_at(self, global_index: int) -> int:
        """Return the first token of global sample number `global_index` (0, 1, 2, ...)."""
        return int(self.starts((global_index,))[0])

    def starts(self, global_indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the first token of each of several global samples, int64 [B]."""
        indices_B = np.asarray(global_indices, dtype=np.int64)
        if len(indices_B) and indices_B.min() < 0:
            raise ValueError(f"a global sample number is {indices_B.min()}; they start at 0")
        epochs_B, places_B = np.divmod(indices_B, self.sequences_per_epoch)
        starts_B = np.empty_like(indices_B)
        for epoch in np.unique(epochs_B):
            chosen_B = epochs_B == epoch
            starts_B[chosen_B] = self._epoch_starts(int(epoch))[places_B[chosen_B]]
        return starts_B

    def _epoch_starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the starts of an epoch in visiting order; the last two epochs are kept."""
        if epoch not in self._epochs:
            draws = np.random.PCG64(np.random.SeedSequence((self._seed, epoch)))
            offset = int(draws.random_raw()) % self._num_offsets
            order_S = np.argsort(draws.random_raw(self.sequences_per_epoch), kind="stable")
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = offset + order_S * self.sequence_length
        return self._epochs[epoch]


def read_batch(tokens: TokenFile, order: Order, global_indices: Sequence[int]) -> torch.Tensor:
    """Read the sequences of some global samples.

    Args:
        tokens: the training split that `order` was made for.
        order: where the samples start.
        global_indices: numbers of the samples; a `range` is fine.

    Returns:
        int64 [B, L + 1] on the CPU: inputs are `[:, :-1]`, targets `[:, 1:]`.
    """
    starts_B1 = order.starts(global_indices)[:, None]
    positions_BL = starts_B1 + np.arange(order.sequence_length + 1)
    return torch.from_numpy(tokens.tokens[positions_BL].astype(np.int64))


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows over the validation tokens in which every target is scored once.

    Window w reads tokens `[starts[w], starts[w] + lengths[w])`: all but the last are inputs, all
    but the first are targets. Targets before number `first_scored[w]` are context only.
    """

    starts: npt.NDArray[np.int64]  # [W]
    lengths: npt.NDArray[np.int64]  # [W], tokens; all equal
    first_scored: npt.NDArray[np.int64]  # [W], in [0, lengths - 1)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.starts)


def validation_windows(num_tokens: int, sequence_length: int, stride: int | None = None) -> Windows:
    """Cover tokens with windows of equal length so that each target is scored exactly once.

    The first window scores all its targets, each next one `stride` new ones at its end, so that
    they have at least `sequence_length - stride` tokens of context. The last window is moved back
    to full length; only its new targets count.

    Args:
        num_tokens: tokens of the validation split; token 0 is never a target.
        sequence_length: inputs of a window L.
        stride: new targets per window, 1 to L; None is L, which overlaps in the last window only.

    Raises:
        DataError: if there is no target.
        ValueError: if the stride is not in [1, L].
    """
    stride = sequence_length if stride is None else stride
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"stride is {stride}; it must be in [1, {sequence_length}]")
    if num_tokens < 2:
        raise DataError(
            f"the validation split has {num_tokens} tokens, but one target needs 2; "
            "lower data.validation_every or give more text"
        )
    length = min(sequence_length + 1, num_tokens)
    # Scored targets end before these tokens; the first window ends at its own length.
    ends_W = np.append(np.arange(length, num_tokens, stride, dtype=np.int64), num_tokens)
    starts_W = ends_W - length
    scored_from_W = np.concatenate([np.ones(1, np.int64), ends_W[:-1]])
    return Windows(starts_W, np.full_like(starts_W, length), scored_from_W - starts_W - 1)
