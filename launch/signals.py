"""Signals that ask for an end: Ctrl-C, batch systems, preemption.

The command's process takes them all and passes them on to its ranks as SIGTERM, which the trainer
answers by saving and ending (`training/trainer.py`).
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Postman", "StopSignals"]

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Hand stop signals to a function while ranks run; nothing outside of the main thread."""

    def __init__(self, stop: Callable[[int], None]) -> None:
        self._stop = stop
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals from here on."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _NUMBERS:
            self._before[number] = signal.signal(number, self._handle)

    def __enter__(self) -> None:
        self.listen()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._stop(number)


class Postman:
    """Keeps a stop signal that comes too early: sends it again until the trainer takes it.

    The trainer listens to SIGTERM only while it trains. Ctrl-C becomes SIGTERM; a second one is
    an ordinary interrupt.
    """

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._interrupts = 0

    def deliver(self, number: int) -> None:
        """Handle a signal that nobody else listens to yet."""
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self.cancel()
        self._timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Forget the signal."""
        if self._timer is not None:
            self._timer.cancel()
