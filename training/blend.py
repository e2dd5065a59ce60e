"""Several token files in stated shares: which file the next training sequence comes from.

As in Megatron-core, the next sample comes from the file that is furthest behind its share. The
pattern of the first samples is repeated, so that the source of sample number i is a function of i
alone: a run is continued by one integer, on any number of ranks. Each file has its own order.

Shapes:  B samples   N samples of the pattern   P files
Source:  `build_blending_indices` of megatron-core's datasets.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gatewise.parallel.errors import ConfigError
from gatewise.training.sequences import Order, SequenceOrder

__all__ = ["BlendPart", "BlendedOrder", "parse_blend", "training_order"]

_SHORTEST, _LONGEST = 1 << 12, 1 << 18  # of the pattern
_RAREST = 16  # times that the smallest share appears in it, where that is possible


@dataclass(frozen=True, slots=True)
class BlendPart:
    """One file's place in the training split, where all lie one after another."""

    tokens: int
    weight: float  # share of the samples; sums to 1 over the parts


class BlendedOrder:
    """The order of a blend.

    Args:
        parts: in the order in which they lie in the split.
        sequence_length: inputs of a sequence; every part has more tokens.
        seed: any integer.
    """

    def __init__(self, parts: Sequence[BlendPart], sequence_length: int, seed: int) -> None:
        self.sequence_length = sequence_length
        ends_P = np.cumsum([part.tokens for part in parts], dtype=np.int64)
        self._first_P = ends_P - [part.tokens for part in parts]
        self._orders = [
            SequenceOrder(part.tokens, sequence_length, seed + (index << 32))
            for index, part in enumerate(parts)
        ]
        self.sequences_per_epoch = sum(order.sequences_per_epoch for order in self._orders)
        self._part_N = _pattern(np.array([part.weight for part in parts]))
        self._count_P = np.bincount(self._part_N, minlength=len(parts))
        self._rank_N = np.empty_like(self._part_N)  # how often the part was there before
        for index, count in enumerate(self._count_P):
            self._rank_N[self._part_N == index] = np.arange(count)

    def sources(
        self, global_indices: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the part of each sample and its number there, int64 [B] both."""
        block_B, place_B = np.divmod(np.asarray(global_indices, np.int64), len(self._part_N))
        part_B = self._part_N[place_B]
        return part_B, block_B * self._count_P[part_B] + self._rank_N[place_B]

    def starts(self, global_indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the first token of each of several global samples, int64 [B]."""
        part_B, number_B = self.sources(global_indices)
        starts_B = np.empty_like(number_B)
        for part in np.unique(part_B):
            mine_B = part_B == part
            own = self._orders[part].starts(number_B[mine_B].tolist())
            starts_B[mine_B] = self._first_P[part] + own
        return starts_B


def training_order(
    blend: Sequence[BlendPart], num_tokens: int, sequence_length: int, seed: int
) -> Order:
    """Return the order of training samples.

    Args:
        blend: parts of the split; none: it is one.
        num_tokens: of the split.
        sequence_length: inputs of a sequence.
        seed: any integer.

    Raises:
        DataError: if there are not enough tokens for one sequence.
    """
    if blend:
        return BlendedOrder(blend, sequence_length, seed)
    return SequenceOrder(num_tokens, sequence_length, seed)


def parse_blend(text: str) -> list[tuple[float, str]]:
    """Return weights, which sum to 1, and prefixes, from "weight prefix weight prefix ...".

    Raises:
        ConfigError: if the text is not so.
    """
    try:
        entries = shlex.split(text)
    except ValueError:  # a quotation mark without its partner
        entries = []
    if len(entries) < 2 or len(entries) % 2:
        raise ConfigError(
            f"data.blend is {text!r}; it must alternate weights and prefixes of .bin/.idx pairs, "
            "such as '0.7 code 0.3 talk'"
        )
    pairs = []
    for number, prefix in zip(entries[::2], entries[1::2], strict=True):
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"data.blend has {number!r} where the weight of {prefix} should stand; it must be "
                "a number above 0"
            )
        pairs.append((weight, prefix))
    total = sum(weight for weight, _ in pairs)
    return [(weight / total, prefix) for weight, prefix in pairs]


def _pattern(weight_P: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the part of each of the first N samples."""
    length = int(np.clip(np.ceil(_RAREST / weight_P.min()), _SHORTEST, _LONGEST))
    count_P = np.zeros(len(weight_P))
    part_N = np.empty(length, np.int64)
    for sample in range(length):
        part = int(np.argmax(weight_P * max(sample, 1) - count_P))
        part_N[sample] = part
        count_P[part] += 1
    return part_N
