"""The folder that one run owns: chosen once, by one process, before any rank starts.

config.yaml        the resolved settings; an older, different one becomes config.<n>.yaml
environment.json   versions, processor, memory, commit, command line
metrics.jsonl      one record a line: the source of truth for every other view
result.json        what came out; written in one piece, also after a failure
checkpoints/       step_*/
logs/              rank_<n>.log; under a launcher attempt_<k>/rank_<n>.log
"""

import json
import logging
import math
import os
import platform
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

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 60.0  # for the end of this job's own processes, which were killed before
# Variables that name what a process belongs to, beside its machine and number.
_JOBS = {"SLURM_JOB_ID": "Slurm job", "TORCHELASTIC_RUN_ID": "torchrun"}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run keeps its files; `lock` stays open as long as the run owns the folder."""

    path: Path
    lock: IO[str] | None = None
    attempt: int | None = None  # number of this start, where a launcher made the ranks

    @staticmethod
    def choose(
        directory: str | None, name: str, *, root: Path = Path("runs"), is_launched: bool = False
    ) -> "RunFolder":
        """Create the folder of a run, or take an existing one to go on in it.

        Args:
            directory: `run.dir`; None makes a new `root/name/<time>`.
            name: name of the run, used only without `directory`.
            root: folder of the runs whose place nobody chose.
            is_launched: a launcher started the ranks; each start then has logs of its own.

        Raises:
            ConfigError: if nothing can be written there, or another process owns the folder.
        """
        attempt: int | None = None
        path = Path(directory).expanduser() if directory is not None else None
        try:
            if path is None:
                path = _make_unique(root / re.sub(r"[^\w.+-]+", "_", name))
            else:
                path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
            (path / "logs").mkdir(exist_ok=True)
            if is_launched:
                attempt = _next_attempt(path / "logs")
        except OSError as error:
            field = "run.dir" if directory is not None else "name"
            raise ConfigError(
                f"{field} leads to {path or root}, where nothing can be written "
                f"({error.strerror or error}); choose another folder with run.dir=..."
            ) from error
        return RunFolder(path.resolve(), lock, attempt)

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        logs = self.path / "logs"
        return logs if self.attempt is None else logs / f"attempt_{self.attempt}"

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
        if self.lock is not None and not self.lock.closed:
            self.lock.truncate(0)  # where locks do not work, the text tells who did not get here
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


def _next_attempt(logs: Path) -> int:
    """Make the folder of the next start's logs and return its number."""
    number = len(list(logs.glob("attempt_*")))
    while True:
        try:
            (logs / f"attempt_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return number


def _take_lock(path: Path) -> IO[str] | None:
    """Hold the folder until this process ends, however it ends.

    The system's lock goes with the process, so a killed run leaves none; the file's text is for
    the message only. Processes of this same job that are just being ended are waited for.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    lock = open(path / ".lock", "a+")  # noqa: SIM115  # open as long as the run
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            if _job() and owner.endswith(_job()) and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            lock.close()
            raise ConfigError(
                f"run.dir is {path}, which process {owner} is using; wait for it or choose "
                "another folder"
            ) from None
        except OSError as error:  # a file system without locks
            lock.seek(0)
            owner = lock.read().strip()
            if owner:
                _log.warning(
                    "%s cannot be locked (%s); make sure that process %s has ended",
                    *(path, error.strerror or error, owner),
                )
        _write_owner(lock)
        return lock


def _write_owner(lock: IO[str]) -> None:
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}{_job()}\n")
    lock.flush()


def _job() -> str:
    """Return what this process belongs to, as it ends the text of the lock."""
    names = [f"{what} {os.environ[name]}" for name, what in _JOBS.items() if os.environ.get(name)]
    return f" ({', '.join(names)})" if names else ""


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
