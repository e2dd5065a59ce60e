"""The ranks that save or load together, and how they agree that something failed.

A rank that fails alone would leave the others waiting in a collective. So every phase ends in
`agree`, where all ranks learn of the first failure and raise the same error.
"""

import errno
from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist

from gatewise.parallel.errors import CheckpointError

__all__ = ["AgreedError", "Peers", "explain", "failure", "lost_peer"]

T = TypeVar("T")

_REMEDIES = {
    errno.ENOSPC: "free space, lower checkpoint.keep_last or choose another run.dir",
    errno.EDQUOT: "raise the quota or choose another run.dir",
    errno.EACCES: "allow writing there or choose another run.dir",
    errno.EPERM: "allow writing there or choose another run.dir",
    errno.EROFS: "mount it writable or choose another run.dir",
}


class AgreedError(CheckpointError):
    """A failure that every rank has learnt of: all are alive and may go on together."""


class Peers:
    """A view of a process group that also works for one rank without any group.

    Args:
        group: a group with a CPU backend; None is the default group, or one rank alone where
            no process group was started.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if started else 0
        self.world = dist.get_world_size(group) if started else 1

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order.

        Raises:
            CheckpointError: if a rank is gone or does not answer within the group's timeout.
        """
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:  # gloo's closed connections and timeouts
            raise lost_peer(error) from error
        return values

    def agree(self, task: str, error: BaseException | None) -> None:
        """Go on if no rank failed, else raise the same error on every rank.

        Args:
            task: what was tried, the start of the message.
            error: what went wrong on this rank, or None.

        Raises:
            AgreedError: naming the first rank that failed, if any did.
        """
        reasons = self.gather(None if error is None else explain(error))
        failed = {rank: text for rank, text in enumerate(reasons) if text is not None}
        if failed:
            raise failure(task, failed) from error


def failure(task: str, reasons: Mapping[int, str]) -> AgreedError:
    """Return the error of a task that failed for `reasons`, by rank; there is at least one."""
    first, *others = sorted(reasons)
    more = f" (and {len(others)} more)" if others else ""
    return AgreedError(f"{task} failed on rank {first}{more}: {reasons[first]}")


def lost_peer(error: BaseException) -> CheckpointError:
    """Return the error for a collective that another rank did not answer."""
    lines = str(error).strip().splitlines()
    return CheckpointError(
        f"another rank ended or did not answer: {lines[0] if lines else error!r}; "
        "look at the first error of the other ranks"
    )


def explain(error: BaseException) -> str:
    """Return one line on an error: cause, file and, for known causes, the remedy."""
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        remedy = _REMEDIES.get(error.errno or 0, "check the disk or choose another run.dir")
        return f"{error.strerror}{place}; {remedy}"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"
