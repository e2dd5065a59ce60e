"""Silent corruption: ranks that should hold the same weights compare hashes of them.

Two hashes a rank: of the parameters that its group repeats, and of what the optimizer keeps for
the slice that it shares with other ranks. A flipped bit in memory changes one rank's hash and no
other's; the rank in the minority is named, and with two copies both are.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.moe.model import Decoder, parameter_specs
from gatewise.parallel.collectives import Group
from gatewise.parallel.parameters import Owner
from gatewise.training.state import Updater

__all__ = ["Difference", "compare_replicas", "find_differences"]

_OWNERS: tuple[Owner, ...] = ("all", "tensor", "expert")
_NAMES = {"all": "dense", "tensor": "attention", "expert": "expert"}


@dataclass(frozen=True, slots=True)
class Difference:
    """Ranks that hold other values than most of the ranks that should hold the same."""

    what: str
    ranks: tuple[int, ...]  # in the minority; all of them where there is none
    others: tuple[int, ...]

    def __str__(self) -> str:
        """Say it in one line."""
        if not self.others:
            return (
                f"ranks {_join(self.ranks)}: they hold different {self.what}, and which of them is "
                "right is unknown"
            )
        if len(self.ranks) > 1:
            return f"ranks {_join(self.ranks)}: they hold other {self.what} than the others"
        return f"rank {self.ranks[0]}: holds other {self.what} than ranks {_join(self.others)}"


def _join(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def compare_replicas(model: Decoder, updater: Updater, control: Group) -> list[Difference]:
    """Hash this rank's values and compare them with the other ranks'; the host waits for it.

    Args:
        model: on all ranks at the same step.
        updater: of its weights.
        control: all ranks.
    """
    if control.handle is None:
        return []
    mine = torch.tensor(_row(model, updater))
    table = torch.zeros(control.size, mine.numel(), dtype=torch.int64)
    table[control.rank] = mine
    table = table.to(model.embedding.device)
    dist.all_reduce(table, group=control.handle)  # a sum with zeros: each rank's row arrives
    return find_differences(table.tolist())


def find_differences(rows: Sequence[Sequence[int]]) -> list[Difference]:
    """Compare rows of (group of values, hash, group of states, hash) per owner, one a rank."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    for index, owner in enumerate(_OWNERS):
        for offset, what in ((0, "weights"), (2, "optimizer state")):
            column = 4 * index + offset
            members: Mapping[int, dict[int, int]] = defaultdict(dict)
            for rank, row in enumerate(rows):
                members[row[column]][rank] = row[column + 1]
            for hashes in members.values():
                sides = _minority(hashes)
                if sides is not None:
                    found[sides].append(f"{_NAMES[owner]} {what}")
    return [Difference(" and ".join(what), *sides) for sides, what in found.items()]


def _minority(hashes: Mapping[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the ranks in the minority and the others; all ranks and none where it is a draw."""
    counts = Counter(hashes.values()).most_common()
    if len(counts) < 2:
        return None
    if counts[0][1] == counts[1][1]:  # as many ranks on both sides
        return tuple(sorted(hashes)), ()
    wrong = tuple(sorted(rank for rank, value in hashes.items() if value != counts[0][0]))
    return wrong, tuple(sorted(rank for rank in hashes if rank not in wrong))


def _row(model: Decoder, updater: Updater) -> list[int]:
    """Return, per owner, what this rank holds and its hash: of weights, of optimizer state.

    Ranks that hold the same parts of the same tensors should have equal hashes.
    """
    specs, held = parameter_specs(model), updater.held()
    row: list[int] = []
    for owner in _OWNERS:
        mine = [spec for spec in specs if spec.owner == owner]
        row += [_name([(s.name, s.spans) for s in mine]), _hash([s.local() for s in mine])]
        # a flat range may hold parameters of one owner only
        own = [h for h in held if h.parts and h.parts[0].spec.owner == owner]
        parts = [(p.spec.name, p.spec.spans, p.start, p.end) for h in own for p in h.parts]
        row += [_name(parts), _hash([t for h in own for t in (h.master, h.first, h.second)])]
    return row


def _name(held: object) -> int:
    """Return a number for what is held."""
    return zlib.crc32(repr(held).encode())


def _hash(tensors: Sequence[Tensor]) -> int:
    """Return the exclusive or of all bits of each tensor, mixed in their order."""
    if not tensors:
        return 0
    bits = torch.stack([torch.hash_tensor(t.detach().view(-1)).view(torch.int64) for t in tensors])
    return zlib.crc32(bits.cpu().numpy().tobytes())
