"""A rank's log, `logs/rank_<n>.log`: what it logs, and in a process of its own all it prints."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gatewise.launch.world import Place

__all__ = ["configure_logging", "log_tail", "redirect", "start_line", "tell_user"]

_NEW_START = "=== start"


def redirect(log: Path, *, keep_stdout: bool) -> None:
    """Send this process's output, that of native code too, to its log."""
    with open(log, "ab", buffering=0) as stream:
        stream.write(start_line().encode())
        os.dup2(stream.fileno(), 2)
        if not keep_stdout:
            os.dup2(stream.fileno(), 1)


def configure_logging(handlers: Sequence[logging.Handler], place: Place) -> None:
    """Log to a rank's file; rank 0 also tells the user its warnings (the last handler)."""
    layout = f"%(asctime)s rank {place.rank} %(levelname)s %(name)s: %(message)s"
    logger = logging.getLogger("gatewise")
    logger.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(layout))
        logger.addHandler(handler)
    if place.rank == 0 and len(handlers) > 1:
        handlers[-1].setLevel(logging.WARNING)
        handlers[-1].setFormatter(logging.Formatter("gatewise: %(levelname)s: %(message)s"))


@contextmanager
def tell_user() -> Iterator[None]:
    """Show the user what is logged while the command prepares its run."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("  %(message)s"))
    logger = logging.getLogger("gatewise")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def start_line() -> str:
    """Return the line that parts this start of a run from the ones before in the same log."""
    return f"{_NEW_START} {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n"


def log_tail(log: Path) -> str:
    """Return what a log holds of the latest start."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(_NEW_START)[2].partition("\n")[2]
