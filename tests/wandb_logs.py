"""Logs of the wandb client in tests: read once they are complete."""

import contextlib
import time
from pathlib import Path

from gatewise.training.wandb_files import WandbFile, read_wandb_file

__all__ = ["finished_log"]


def finished_log(path: Path) -> WandbFile:
    """Return what a log holds at its end.

    The client's own process may still write when `finish` has returned, and when the run is over.
    """
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(ValueError):  # not even begun
            found = read_wandb_file(path)
            if found.is_finished:
                return found
        assert time.monotonic() < deadline
        time.sleep(0.05)
