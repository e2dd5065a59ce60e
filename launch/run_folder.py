"""The folder that one run owns: chosen once, by one process, before any rank starts.

config.yaml        the resolved settings; an older, different one becomes config.<n>.yaml
environment.json   versions, processor, memory, commit, command line
metrics.jsonl      one record a line: the source of truth for every other view
result.json        what came out; written in one piece, also after a failure
checkpoints/       step_*/
logs/              rank_<n>.log
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gatewise.launch.machine import environment
from gatewise.parallel.errors import ConfigError

__all__ = ["RunFolder", "json_value", "writable"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run keeps its files; `lock` stays open as long as the run owns the folder."""

    path: Path
    lock: IO[str] | None = None

    @staticmethod
    def choose(directory: str | None, name: str, *, root: Path = Path("runs")) -> "RunFolder":
        """Create the folder of a run, or take an existing one to go on in it.

        Args:
            directory: `run.dir`; None makes a new `root/name/<time>`.
            name: name of the run, used only without `directory`.
            root: folder of the runs whose place nobody chose.

        Raises:
            ConfigError: if nothing can be written there, or another process owns the folder.
        """
        path = Path(directory).expanduser() if directory is not None else None
        try:
            if path is None:
                path = _make_unique(root / re.sub(r"[^\w.+-]+", "_", name))
            else:
                path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
            (path / "logs").mkdir(exist_ok=True)
        except OSError as error:
            field = "run.dir" if directory is not None else "name"
            raise ConfigError(
                f"{field} leads to {path or root}, where nothing can be written "
                f"({error.strerror or error}); choose another folder with run.dir=..."
            ) from error
        return RunFolder(path.resolve(), lock)

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    @property
    def result(self) -> Path:
        """File of the run's outcome."""
        return self.path / "result.json"

    def write_config(self, text: str) -> None:
        """Store the resolved settings; keep an older, different file under a number."""
        file = self.path / "config.yaml"
        with writable(self.path):
            if file.exists() and file.read_text(encoding="utf-8") != text:
                _set_aside(file)
            _replace(file, text)

    def write_environment(self, command_line: list[str]) -> None:
        """Store what is known of the machine, the versions and the command."""
        with writable(self.path):
            text = json.dumps(environment(command_line), indent=2)
            _replace(self.path / "environment.json", text + "\n")

    def write_result(self, result: Mapping[str, Any]) -> Path:
        """Store the outcome in one piece and return the file's path; keep an older one aside."""
        text = json.dumps({key: json_value(value) for key, value in result.items()}, indent=2)
        with writable(self.path):
            if self.result.exists():
                _set_aside(self.result)
            _replace(self.result, text + "\n")
        return self.result

    def release(self) -> None:
        """Give the folder free for another run."""
        if self.lock is not None:
            self.lock.close()


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write below a run's folder into one line for the user."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.dir is {path}, where {error.filename or 'a file'} cannot be written "
            f"({error.strerror or error}); free space or choose another folder"
        ) from error


def json_value(value: Any) -> Any:  # JSON's own types, nested
    """Return `value` with everything JSON cannot hold (paths, nan, NumPy scalars) made plain."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if hasattr(value, "item"):  # NumPy and torch scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no nan
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _make_unique(parent: Path) -> Path:
    """Make a new folder named after the time; mkdir decides between two runs of one second."""
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 1000):
        path = parent / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(17, "too many runs in one second", str(parent))


def _take_lock(path: Path) -> IO[str] | None:
    """Hold the folder until this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    lock = open(path / ".lock", "a+")  # noqa: SIM115  # open as long as the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise ConfigError(
            f"run.dir is {path}, which process {owner} is using; wait for it or choose another "
            "folder"
        ) from None
    except OSError:  # a file system without locks
        lock.close()
        return None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _set_aside(file: Path) -> None:
    """Rename a file of an earlier start to the next free `name.<n>.suffix`."""
    number = 1
    while file.with_suffix(f".{number}{file.suffix}").exists():
        number += 1
    file.replace(file.with_suffix(f".{number}{file.suffix}"))


def _replace(file: Path, text: str) -> None:
    """Write `file` so that a reader sees the old or the new text, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
