"""The frame around every command: its run folder, its result file and its exit code.

A command's body returns what it found; this module adds `command, exit, seconds, peak_rss_mb,
world_size`, writes `result.json` also after a failure, and prints its path as the last line.
"""

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from gatewise.launch.run_folder import RunFolder
from gatewise.launch.signals import StopSignals
from gatewise.launch.spawn import RankFailure, peak_rss_mb
from gatewise.parallel.errors import ConfigError

__all__ = [
    "EXIT_CONFIG",
    "EXIT_CRASH",
    "EXIT_INTERRUPT",
    "EXIT_OK",
    "EXIT_REQUEUE",
    "one_line",
    "print_error",
    "run_session",
]

EXIT_OK = 0
EXIT_CRASH = 1  # a rank crashed, and is named
EXIT_CONFIG = 2  # a mistake of the user's, found before any rank started
EXIT_REQUEUE = 85  # stopped by a signal after a good save: start me again
EXIT_INTERRUPT = 130

_START = time.monotonic()


def run_session(
    command: str,
    folder: RunFolder,
    body: Callable[[], Mapping[str, Any]],
    *,
    world_size: int = 1,
    interrupt_exit: int = EXIT_INTERRUPT,
) -> int:
    """Run a command's body, store its result and return the exit code.

    Args:
        command: name of the command.
        folder: where `result.json` goes.
        body: returns the command's own keys; an `exit` among them is the exit code.
        world_size: number of ranks the command was to use.
        interrupt_exit: exit code after a signal that the body itself did not answer.
    """
    result: dict[str, Any] = {
        "command": command,
        "exit": EXIT_OK,
        "seconds": 0.0,
        "peak_rss_mb": 0.0,
        "world_size": world_size,
    }
    try:
        with StopSignals(_interrupt):
            result |= body()
    except ConfigError as error:
        result |= {"exit": EXIT_CONFIG, "error": one_line(error)}
    except RankFailure as error:
        if error.details:
            print(error.details, file=sys.stderr)
        result |= {"exit": EXIT_CRASH, "error": one_line(error)}
    except KeyboardInterrupt:
        result |= {"exit": interrupt_exit, "error": "stopped by a signal"}
    except Exception as error:  # a bug of ours, or the machine's: still a result and one line
        log = folder.logs / f"{command}.log"
        with open(log, "a", encoding="utf-8") as stream:
            traceback.print_exc(file=stream)
        traceback.print_exc(limit=-3)
        text = f"{type(error).__name__}: {one_line(error)} (log: {log})"
        result |= {"exit": EXIT_CRASH, "error": text}
    result["seconds"] = round(time.monotonic() - _START, 3)
    result["peak_rss_mb"] = max(result["peak_rss_mb"], peak_rss_mb())
    if "error" in result:
        print_error(result["error"])
    try:
        path = folder.write_result(result)
    except ConfigError as error:
        print_error(one_line(error))
        return int(result["exit"]) or EXIT_CRASH
    finally:
        folder.release()
    print(path, flush=True)
    return int(result["exit"])


def _interrupt(_number: int) -> None:
    raise KeyboardInterrupt


def print_error(message: str) -> None:
    """Tell the user one line on standard error."""
    sys.stdout.flush()
    print(f"gatewise: error: {message}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
