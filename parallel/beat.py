"""What a rank is doing, where others can read it after its sudden end: `logs/rank_<n>.beat`.

One line in a mapped file, rewritten at every step: a store into memory, no system call. The page
outlives the process, `kill -9` included.
"""

import mmap
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Beat", "BeatReading", "beat_path", "is_gone", "read_beat"]

_SIZE = 256
_LINE = re.compile(r"step (\d+) (\w+) pid (\d+) at (\d+\.\d+) on (\S+)")


@dataclass(frozen=True, slots=True)
class BeatReading:
    """A rank's last word."""

    step: int
    phase: str  # start, train, evaluate, save or end
    pid: int
    time: float  # of the wall clock
    host: str


def beat_path(logs: Path, rank: int) -> Path:
    """Return the file of a rank."""
    return logs / f"rank_{rank}.beat"


class Beat:
    """Writes one rank's line.

    Args:
        logs: folder of the run's logs; made if missing.
        rank: of this process.
    """

    def __init__(self, logs: Path, rank: int) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._tail = f"on {socket.gethostname()}\n"
        self.step, self.phase, self.at = 0, "start", time.time()
        with open(beat_path(logs, rank), "w+b") as stream:
            stream.truncate(_SIZE)
            self._map = mmap.mmap(stream.fileno(), _SIZE)
        self.tell(0, "start")

    def tell(self, step: int, phase: str) -> None:
        """Say what begins now."""
        self.step, self.phase, self.at = step, phase, time.time()
        line = f"step {step} {phase} pid {os.getpid()} at {self.at:.3f} {self._tail}"
        self._map[:_SIZE] = line.encode()[:_SIZE].ljust(_SIZE, b"\0")


def read_beat(logs: Path, rank: int) -> BeatReading | None:
    """Return what a rank said last, or None where it said nothing."""
    try:
        text = beat_path(logs, rank).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = _LINE.match(text)
    if match is None:
        return None
    return BeatReading(int(match[1]), match[2], int(match[3]), float(match[4]), match[5])


def is_gone(beat: BeatReading) -> bool:
    """Tell whether the process of a beat has ended; False where it cannot be seen from here."""
    if beat.host != socket.gethostname() or not Path("/proc/self").exists():
        return False
    try:
        stat = Path(f"/proc/{beat.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")
