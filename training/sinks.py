"""Where metric records go: `metrics.jsonl` always, the console and W&B as views of it.

A record is one flat dict: `step` and `group/name_unit` keys, as in docs/commands.md. The trainer
calls `resume` once before its first record, `write` for each record, `close` at the end; only
rank 0 has sinks.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

__all__ = ["AttemptLog", "JsonlSink", "MetricSink", "close_all", "read_records"]

_log = logging.getLogger(__name__)


class MetricSink(Protocol):
    """Takes records; a view that cannot go on must not stop the training."""

    def resume(self, step: int) -> None:
        """Forget what was recorded after `step`: training goes on from there (0: a new start)."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record; it holds `step`."""

    def close(self) -> None:
        """Write out what is left."""


class JsonlSink:
    """One JSON object a line, each written at once, so that a killed run keeps its records."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open the file.

        Args:
            path: of the file; an existing one is continued.
            resume_step: step of the checkpoint that training goes on from; later records, and a
                last line that a kill tore, are dropped. None: the first record decides, because
                whatever the file holds of its step or later was written by a run that is redone.
        """
        self._path = path
        self._is_settled = False
        self._stream: IO[str] | None = None
        if resume_step is not None:
            self.resume(resume_step)

    def resume(self, step: int) -> None:
        """Keep the records up to and with `step`."""
        self._truncate(step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; not a number becomes null, because JSON has no nan."""
        if not self._is_settled:
            self._truncate(int(record["step"]) - 1)
        plain = {key: _plain(value) for key, value in record.items()}
        text = json.dumps(plain, allow_nan=False) + "\n"
        try:
            if self._stream is None:
                self._stream = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            self._stream.write(text)
        except OSError as error:
            if self._stream is not None:
                with contextlib.suppress(OSError):  # it would try to write the rest again
                    self._stream.close()
                self._stream = None
            raise RuntimeError(
                f"{self._path} cannot be written ({error.strerror or error}); free space, then "
                "start again: the run goes on from its last checkpoint"
            ) from error

    def close(self) -> None:
        """Force the file to the disk."""
        if self._stream is None:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None

    def _truncate(self, step: int) -> None:
        """Replace the file by its records up to `step`, in one piece."""
        self.close()
        self._is_settled = True
        if not self._path.exists():
            return
        kept = [record for record in read_records(self._path) if record["step"] <= step]
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in kept)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._path)


class AttemptLog:
    """One JSON line for each start of the training: when, and after which step it goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def resume(self, step: int) -> None:
        """Append this start; a full disk is only worth a warning."""
        try:
            number = 1
            if self._path.exists():
                number += self._path.read_bytes().count(b"\n")
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            line = json.dumps({"attempt": number, "step": step, "time": now})
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            _log.warning("%s cannot be written (%s)", self._path, error.strerror or error)

    def write(self, record: Mapping[str, Any]) -> None:
        """Nothing: only starts are kept."""

    def close(self) -> None:
        """Nothing: every line was written at once."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; a line that a kill tore is left out."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def close_all(sinks: Sequence[MetricSink]) -> None:
    """Close every sink, the later ones also if an earlier one fails."""
    errors = []
    for sink in sinks:
        try:
            sink.close()
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _plain(value: Any) -> Any:  # of JSON's types, or a scalar of NumPy or torch
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
