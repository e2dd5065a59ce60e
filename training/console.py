"""The console's view of the records: one line for each log step, never a moving bar.

On a terminal the line has colours (rich); in a file or a batch system's log it is plain text.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

__all__ = ["ConsoleSink"]

# Keys in the order of the line: name shown, and how the value is written. A key that a record
# lacks is left out of its line.
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("train/loss", "loss", lambda value: f"{value:.4f}"),
    ("train/lr", "lr", lambda value: f"{value:.2e}"),
    ("train/grad_norm", "grad", lambda value: f"{value:.3f}"),
    ("moe/max_violation", "imbalance", lambda value: f"{value:.2f}"),
    ("moe/drop_frac", "dropped", lambda value: f"{100 * value:.1f}%"),
    ("moe/ahead_recall", "recall", lambda value: f"{value:.3f}"),
    ("distil/divergence", "divergence", lambda value: f"{value:.4f}"),
    ("distil/recall", "recall", lambda value: f"{value:.3f}"),
    ("train/tokens_per_second", "tok/s", lambda value: f"{value:,.0f}"),
    ("train/memory_mb", "mem", lambda value: f"{value:,.0f}M"),
    ("val/loss", "val loss", lambda value: f"{value:.4f}"),
    ("val/bits_per_byte", "bits/byte", lambda value: f"{value:.4f}"),
)


class ConsoleSink:
    """Prints records; `total` steps give the time that is left."""

    def __init__(
        self,
        total: int,
        *,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare for a run.

        Args:
            total: steps of the run.
            stream: where to print; None is standard output.
            clock: seconds; a test passes its own.
        """
        self._total = total
        self._stream = stream if stream is not None else sys.stdout
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._is_gone = False
        self._first: tuple[int, float] | None = None  # step and time of the first record

    def resume(self, step: int) -> None:
        """Say where training goes on."""
        self._first = None
        if step:
            self._print(f"going on after step {step}", style="bold")

    def write(self, record: Mapping[str, Any]) -> None:
        """Print one line."""
        step = int(record["step"])
        cells = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        for key, name, shown in _COLUMNS:
            value = record.get(key)
            if value is not None:
                cells.append(f"{name} {shown(float(value))}")
        if record.get("train/skipped_steps"):
            cells.append(f"skipped {record['train/skipped_steps']:.0f}")
        is_training = "train/loss" in record
        left = self._seconds_left(step) if is_training else None
        if left is not None:
            cells.append(f"left {_duration(left)}")
        loss = record.get("train/loss", 0.0)
        is_bad = loss is None or not math.isfinite(float(loss))
        style = "red" if is_bad else "" if is_training else "green"
        self._print("  ".join(cells), style=style)

    def close(self) -> None:
        """Nothing: every line was shown at once."""

    def _seconds_left(self, step: int) -> float | None:
        now = self._clock()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return None
        first_step, then = self._first
        return (now - then) / (step - first_step) * (self._total - step)

    def _print(self, text: str, *, style: str) -> None:
        if self._is_gone:
            return
        try:
            if self._is_terminal:
                from rich.console import Console
                from rich.text import Text

                Console(file=self._stream, soft_wrap=True).print(Text(text, style=style))
            else:
                print(text, file=self._stream)
            self._stream.flush()
        except OSError:  # the reader is gone, as in `gatewise train | head`; training goes on
            self._is_gone = True


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole % 60:02d}s"
