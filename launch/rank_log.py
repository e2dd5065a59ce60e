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

__all__ = ["configure_logging", "log_tail", "own_log", "redirect", "start_line", "tell_user"]

_NEW_START = "=== start"


def redirect(log: Path, *, keep_stdout: bool) -> None:
    """Send this process's output, that of native code too, to its log."""
    with open(log, "ab", buffering=0) as stream:
        stream.write(start_line().encode())
        os.dup2(stream.fileno(), 2)
        if not keep_stdout:
            os.dup2(stream.fileno(), 1)


@contextmanager
def own_log(log: Path, *, keep_stdout: bool) -> Iterator[None]:
    """Send what native code prints to a rank's log, and on ranks other than 0 everything.

    For a process that a launcher started: at the end of the block its output is the launcher's
    again, which is where the one line about a failure belongs.

    Args:
        log: the file; it is continued.
        keep_stdout: leave standard output, and what Python prints on standard error, to the user.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    before = (os.dup(1), os.dup(2))
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    redirect(log, keep_stdout=keep_stdout)
    stderr = sys.stderr
    if keep_stdout:
        sys.stderr = terminal
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr = stderr
        sys.stderr.flush()
        terminal.close()
        for target, copy in enumerate(before, start=1):
            os.dup2(copy, target)
            os.close(copy)


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
