"""Sum gradients over ranks while the backward pass goes on.

One rule for all parameters (`Sum over the replicas, divide by the full data-parallel size`): the
loss of a rank is the mean over its own tokens, so the whole batch's gradient is the sum over ranks
divided by their number. An expert's gradient already holds the tokens of all ranks of its expert
group, so summing over the ranks that hold the same expert completes the same sum. The division is
not done here: the optimizer folds `divisor` into its own scale, which saves a pass over memory.

Buckets are sent in one fixed order on every rank, as soon as they and all before them are complete.
Where a plan places slices of the sums inside backward passes (`hold`, `slices.py`), the buckets
that these belong to are sent by it instead, and the rest of them at the end.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from gatewise.parallel.buckets import Bucket, Slot
from gatewise.parallel.collectives import ShardSum
from gatewise.parallel.slices import Range, Turn, held_buckets, leftover_ranges
from gatewise.parallel.squares import square_sums

__all__ = ["GradientReducer", "SliceSum", "gradient_squares"]


class SliceSum:
    """Sums of some ranges of gradients under way."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        """Return when all ranges hold their sums."""
        for work in self._works:
            work.wait()
        self._works = ()


class GradientReducer:
    """Collects gradients in buckets and reduces them.

    Args:
        buckets: from `make_buckets`; every parameter is in exactly one.
        ranks: the full data-parallel size.
    """

    def __init__(self, buckets: Sequence[Bucket], *, ranks: int) -> None:
        self.buckets = list(buckets)
        self.divisor = float(ranks)
        self._reduce_now = False
        self._waiting: list[set[nn.Parameter]] = []  # still missing in this pass, per bucket
        self._next = 0  # first bucket that is not on its way
        self._under_way: list[tuple[Bucket, ShardSum | dist.Work]] = []
        self._turns: Sequence[Turn] = ()
        self._held: frozenset[int] = frozenset()  # buckets that are sent in slices
        self._sent: set[nn.Parameter] = set()  # of these, what is on its way in this pass
        self._slices: list[SliceSum] = []
        self._slot_of: dict[nn.Parameter, tuple[int, Slot]] = {}
        for index, bucket in enumerate(self.buckets):
            for slot in bucket.slots:
                parameter = slot.spec.parameter
                self._slot_of[parameter] = (index, slot)
                parameter.register_post_accumulate_grad_hook(self._collect)

    def slot(self, parameter: nn.Parameter) -> Slot:
        """Return the place of `parameter`."""
        return self._slot_of[parameter][1]

    def hold(self, turns: Sequence[Turn]) -> None:
        """Send the gradients of `turns` when asked, not when they are complete.

        Args:
            turns: from `plan_turns`, of this reducer's buckets.
        """
        self._turns = turns
        self._held = frozenset(held_buckets(self.buckets)) if turns else frozenset()

    def send_slice(self, turn: int, index: int) -> SliceSum | None:
        """Start the sum of one slice of a turn's window; nothing but in the last backward pass."""
        if not self._reduce_now:
            return None
        return self._send_ranges(self._turns[turn].window[index])

    def send_beside(self, turn: int) -> None:
        """Start the sums that a turn sends beside what follows its backward pass."""
        if self._reduce_now:
            self._slices.append(self._send_ranges(self._turns[turn].beside))

    def begin(self, *, reduce: bool) -> None:
        """Announce a backward pass.

        Args:
            reduce: whether it is the last of its optimizer step, after which sums are sent.
        """
        self._reduce_now = reduce
        self._waiting = [{slot.spec.parameter for slot in bucket.slots} for bucket in self.buckets]
        self._next = 0
        self._sent.clear()

    def written(self, parameter: nn.Parameter) -> None:
        """Note that this pass's gradient of `parameter` is in its slot.

        Raises:
            RuntimeError: at the second time in one pass: the bucket may be on its way already.
        """
        index, slot = self._slot_of[parameter]
        slot.fresh = False
        if not self._waiting or parameter not in self._waiting[index]:
            raise RuntimeError(
                f"the gradient of {slot.spec.name} was written twice in one backward pass; call "
                "`begin` before each pass, and use a layer that writes past autograd once a pass"
            )
        if parameter in self._sent:
            raise RuntimeError(
                f"the gradient of {slot.spec.name} is complete only after its slice was sent; "
                "leave it out of what the turns send"
            )
        self._waiting[index].remove(parameter)
        while self._reduce_now and self._next < len(self.buckets):
            if self._next not in self._held:
                if self._waiting[self._next]:
                    break
                self._send(self.buckets[self._next])
            self._next += 1

    def finish(self) -> None:
        """Wait until every bucket holds its sum; parameters that got no gradient count as zero."""
        for index in range(self._next, len(self.buckets)):
            if index not in self._held:
                for slot in self.buckets[index].slots:
                    if slot.fresh:
                        slot.gradient.zero_()
                self._send(self.buckets[index])
        self._next = len(self.buckets)
        if self._held:
            leftover = leftover_ranges(self.buckets, self._turns)
            self._slices.append(self._send_ranges(leftover))
        replicas = []
        for bucket, work in self._under_way:
            work.wait()
            if isinstance(work, ShardSum) and bucket.groups.replicate.handle is not None:
                mine = bucket.gradients[bucket.owned]
                replicas.append(
                    dist.all_reduce(mine, group=bucket.groups.replicate.handle, async_op=True)
                )
        for replica in replicas:
            if replica is not None:
                replica.wait()
        self._under_way.clear()
        for slices in self._slices:
            slices.wait()
        self._slices.clear()

    def clear(self) -> None:
        """Forget all gradients; the next ones overwrite."""
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.fresh = True

    def _collect(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        slot = self.slot(parameter)
        if parameter.grad is None:
            return  # undefined, or written past autograd into the slot: `written` was told
        slot.add(parameter.grad)
        parameter.grad = None
        self.written(parameter)

    def _send_ranges(self, ranges: Sequence[Range]) -> SliceSum:
        works = []
        for part in ranges:
            bucket = self.buckets[part.bucket]
            for slot in bucket.slots:
                if slot.offset < part.end and slot.end > part.start:
                    if slot.fresh:  # no gradient on this rank counts as zero
                        slot.gradient.zero_()
                        slot.fresh = False
                    self._sent.add(slot.spec.parameter)
            work = dist.all_reduce(
                bucket.gradients[part.start : part.end],
                group=bucket.groups.replicate.handle,
                async_op=True,
            )
            assert work is not None
            works.append(work)
        return SliceSum(works)

    def _send(self, bucket: Bucket) -> None:
        shard, replicate = bucket.groups.shard, bucket.groups.replicate
        if shard.handle is not None:
            self._under_way.append((bucket, ShardSum(bucket.gradients, shard)))
        elif replicate.handle is not None:
            work = dist.all_reduce(bucket.gradients, group=replicate.handle, async_op=True)
            assert work is not None
            self._under_way.append((bucket, work))


def gradient_squares(buckets: Sequence[Bucket]) -> dict[str, Tensor]:
    """Return, per label, the sum of squares of the gradients that this rank owns.

    Divided by the number of ranks that own the same values, so that summing over all ranks counts
    every parameter of the whole model once. Gradients are sums over ranks; see `divisor`.
    """
    squares: dict[str, Tensor] = {}
    for bucket in buckets:
        mine = bucket.gradients[bucket.owned]
        square = square_sums(mine.unsqueeze(0))[0] / bucket.groups.replicate.size
        squares[bucket.label] = squares.get(bucket.label, square.new_zeros(())) + square
    return squares
