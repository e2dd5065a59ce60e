"""Run batch scripts on this machine, one after the other or several at once.

Each script leads a session of its own. A stop signal asks the running ones to save and starts no
more; a second one ends them at once, with everything below them.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gatewise.launch.signals import StopSignals

__all__ = ["Script", "run_scripts"]


@dataclass(frozen=True, slots=True)
class Script:
    """A process to start."""

    command: Sequence[str]
    environment: Mapping[str, str]
    output: Path | None = None  # file for what it prints; None: the terminal


def run_scripts(
    scripts: Sequence[Script],
    *,
    at_once: int = 1,
    started: Callable[[int], None] = lambda _: None,
    ended: Callable[[int, int], None] = lambda *_: None,
) -> list[int | None]:
    """Run scripts and return their exit codes; None for those that a stop signal left unstarted.

    Args:
        scripts: in the order in which they start.
        at_once: how many run at the same time.
        started: called with the index of a script.
        ended: called with the index and the exit code of a script.
    """
    codes: list[int | None] = [None] * len(scripts)
    waiting = list(range(len(scripts)))
    running: dict[int, subprocess.Popen[bytes]] = {}
    stops = 0

    def stop(_number: int) -> None:
        nonlocal stops
        stops += 1
        for process in running.values():
            if stops == 1:
                process.terminate()
            else:
                _kill_tree(process.pid)

    with StopSignals(stop):
        while running or (waiting and not stops):
            while waiting and not stops and len(running) < at_once:
                index = waiting.pop(0)
                started(index)
                running[index] = _start(scripts[index])
            for index, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[index]
                codes[index] = code if code >= 0 else 128 - code
                ended(index, codes[index] or 0)
            time.sleep(0.1)
    return codes


def _start(script: Script) -> subprocess.Popen[bytes]:
    if script.output is None:
        return subprocess.Popen(
            script.command, env=dict(script.environment), start_new_session=True
        )
    with open(script.output, "ab") as stream:
        return subprocess.Popen(
            script.command,
            env=dict(script.environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill_tree(root: int) -> None:
    """Kill a process and all below it; torchrun's ranks have sessions of their own."""
    for pid in [*_below(root), root]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _below(root: int) -> list[int]:
    """Return the descendants of a process."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, front = [], [root]
    while front:
        front = [pid for parent in front for pid in children.get(parent, ())]
        found += front
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield int(path.parent.name), int(fields[1])
