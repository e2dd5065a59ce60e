"""Plants the faults of `faults=[...]` on this rank, each once in a run (docs/nights.md).

A marker in `<run.dir>/faults/` is on the disk before anything goes wrong, so that the run which
goes on after it does not repeat it.
"""

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gatewise.training.checkpoint_folder import sync_folder, write_durable
from gatewise.training.guard_config import FaultConfig, FaultKind

__all__ = ["FaultInjector", "flip_bit"]

_log = logging.getLogger(__name__)
_DISK = (FaultKind.enospc, FaultKind.torn_write)


class FaultInjector:
    """The faults of one rank that have not happened yet.

    Args:
        faults: of the whole run.
        rank: this process.
        folder: of the run.
    """

    def __init__(self, faults: Sequence[FaultConfig], rank: int, folder: Path) -> None:
        self._folder = folder / "faults"
        self._waiting = [
            fault
            for fault in faults
            if fault.rank == rank and not (self._folder / fault.name).exists()
        ]
        self._lasting: list[tuple[FaultConfig, int]] = []  # with the steps that are left
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self, step: int, *, poisoned: nn.Module, weights: Callable[[], Tensor]) -> None:
        """Let happen what belongs to the start of a step.

        Args:
            step: from 1.
            poisoned: whose output becomes NaN.
            weights: returns those of which a bit is turned over.
        """
        for fault in [f for f in self._waiting if f.step == step and f.kind not in _DISK]:
            self._happens(fault, step)
            if fault.kind is FaultKind.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.kind is FaultKind.hang:
                threading.Event().wait()
            elif fault.kind is FaultKind.bitflip:
                flip_bit(weights())
            else:
                self._lasting.append((fault, fault.steps))
        for fault, _ in self._lasting:
            if fault.kind is FaultKind.slow:
                time.sleep(fault.seconds)
            else:
                self._hooks.append(poisoned.register_forward_hook(_to_nan))
        self._lasting = [(fault, left - 1) for fault, left in self._lasting if left > 1]

    def end(self) -> None:
        """Undo what lasts for one step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def save(self, step: int, files: Iterable[Path]) -> None:
        """Let happen what belongs to a save, after this rank has written its files.

        Raises:
            OSError: as a full disk raises it.
        """
        for fault in [f for f in self._waiting if f.step <= step and f.kind in _DISK]:
            self._happens(fault, step)
            largest = max(files, key=lambda path: path.stat().st_size)
            if fault.kind is FaultKind.enospc:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(largest))
            size = largest.stat().st_size
            with largest.open("r+b") as stream:
                stream.seek(size // 2)
                stream.write(bytes(size - size // 2))

    def _happens(self, fault: FaultConfig, step: int) -> None:
        """Note on the disk that a fault is about to happen."""
        self._waiting.remove(fault)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_durable(self._folder / fault.name, f"in step {step}\n".encode())
        sync_folder(self._folder)
        _log.warning("fault: %s on rank %d in step %d", fault.kind.name, fault.rank, step)


def flip_bit(weights: Tensor) -> None:
    """Turn over one bit in the middle of the first number's mantissa."""
    kind, bit = (torch.int64, 40) if weights.element_size() == 8 else (torch.int32, 18)
    weights.detach().view(-1)[:1].view(kind).bitwise_xor_(1 << bit)


def _to_nan(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output * float("nan")
