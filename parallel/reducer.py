"""Sum gradients over ranks while the backward pass goes on.

One rule for all parameters (`Sum over the replicas, divide by the full data-parallel size`): the
loss of a rank is the mean over its own tokens, so the whole batch's gradient is the sum over ranks
divided by their number. An expert's gradient already holds the tokens of all ranks of its expert
group, so summing over the ranks that hold the same expert completes the same sum. The division is
not done here: the optimizer folds `divisor` into its own scale, which saves a pass over memory.

Buckets are sent in one fixed order on every rank, as soon as they and all before them are complete.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatewise.parallel.buckets import Bucket, Slot
from gatewise.parallel.collectives import ShardSum

__all__ = ["GradientReducer", "gradient_squares"]


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
        self._slot_of: dict[nn.Parameter, tuple[int, Slot]] = {}
        for index, bucket in enumerate(self.buckets):
            for slot in bucket.slots:
                parameter = slot.spec.parameter
                self._slot_of[parameter] = (index, slot)
                parameter.register_post_accumulate_grad_hook(self._collect)

    def slot(self, parameter: nn.Parameter) -> Slot:
        """Return the place of `parameter`."""
        return self._slot_of[parameter][1]

    def begin(self, *, reduce: bool) -> None:
        """Announce a backward pass.

        Args:
            reduce: whether it is the last of its optimizer step, after which sums are sent.
        """
        self._reduce_now = reduce
        self._waiting = [{slot.spec.parameter for slot in bucket.slots} for bucket in self.buckets]
        self._next = 0

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
        self._waiting[index].remove(parameter)
        while self._reduce_now and self._next < len(self.buckets) and not self._waiting[self._next]:
            self._send(self.buckets[self._next])
            self._next += 1

    def finish(self) -> None:
        """Wait until every bucket holds its sum; parameters that got no gradient count as zero."""
        while self._next < len(self.buckets):
            for slot in self.buckets[self._next].slots:
                if slot.fresh:
                    slot.gradient.zero_()
            self._send(self.buckets[self._next])
            self._next += 1
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
        square = torch.linalg.vector_norm(mine).square() / bucket.groups.replicate.size
        squares[bucket.label] = squares.get(bucket.label, square.new_zeros(())) + square
    return squares
