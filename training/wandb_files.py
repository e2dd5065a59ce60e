"""Read what the wandb client keeps on disk: the transaction log of each start of a run.

The client writes `wandb/<offline-run|run>-<time>-<id>/run-<id>.wandb`, online too. The file is a
log of fragments in blocks, as LevelDB's; each record is a protobuf message of the client's own.
A client that was killed leaves a torn last record, at which reading ends.

Source: LevelDB, doc/log_format.md; the header and checksum are those of wandb 0.31.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["WandbFile", "find_wandb_files", "read_fragments", "read_wandb_file"]

_BLOCK = 32768  # bytes; no fragment crosses a block's end
_HEADER = struct.Struct("<4sHB")  # of the file: name, magic number, version
_FRAGMENT = struct.Struct("<IHB")  # checksum of kind and data, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(slots=True)
class WandbFile:
    """What one start of a run told Weights & Biases."""

    run_id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)  # name or pattern: its axis
    rows: list[dict[str, Any]] = field(default_factory=list)  # histories, in order
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)  # names
    is_finished: bool = False


def find_wandb_files(folder: Path) -> list[Path]:
    """Return the logs below a run's folder, one for each start, the oldest first."""
    found = (folder / "wandb").glob("*run-*-*/run-*.wandb")

    def place(path: Path) -> tuple[str, bool]:
        """Of one second the start that the service refused comes first, then the one offline."""
        kind, _, time_and_id = path.parent.name.partition("run-")
        return time_and_id, kind == "offline-"

    return sorted(found, key=place)


def read_fragments(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log; end where one is torn.

    Raises:
        ValueError: if the bytes do not begin as such a log.
    """
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[:2] != (b":W&B", 0xBEE1):
        raise ValueError("not a log of the wandb client")
    place, parts = _HEADER.size, b""
    while place + _FRAGMENT.size <= len(data):
        room = _BLOCK - place % _BLOCK
        checksum, length, kind = _FRAGMENT.unpack_from(data, place)
        if room < _FRAGMENT.size or (checksum, length, kind) == (0, 0, 0):
            place += room  # the end of a block is filled with zeros
            continue
        start = place + _FRAGMENT.size
        piece = data[start : start + length]
        if len(piece) < length or zlib.crc32(bytes((kind,)) + piece) != checksum:
            return
        place = start + length
        parts = piece if kind in (_FULL, _FIRST) else parts + piece
        if kind in (_FULL, _LAST):
            yield parts


def read_wandb_file(path: Path) -> WandbFile:
    """Return what a log holds; needs the wandb package, which knows the messages.

    Raises:
        ValueError: if the file is no such log.
        OSError: if it cannot be read.
    """
    from wandb.proto import wandb_internal_pb2

    found = WandbFile()
    for data in read_fragments(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        _take(found, record.WhichOneof("record_type"), record)
    return found


def _take(found: WandbFile, kind: str, record: Any) -> None:  # a protobuf message
    if kind == "run":
        run = record.run
        found.run_id, found.project, found.name = run.run_id, run.project, run.display_name
        found.group, found.job_type, found.tags = run.run_group, run.job_type, tuple(run.tags)
        _update(found.config, run.config.update)
    elif kind == "config":
        _update(found.config, record.config.update)
    elif kind == "metric":
        name = record.metric.name or record.metric.glob_name
        found.metrics[name] = record.metric.step_metric
    elif kind == "history":
        row: dict[str, Any] = {}
        _update(row, record.history.item)
        found.rows.append(row)
    elif kind == "summary":
        _update(found.summary, record.summary.update)
    elif kind == "artifact":
        found.artifacts.append(record.artifact.name)
    elif kind == "exit":
        found.is_finished = True


def _update(target: dict[str, Any], items: Any) -> None:  # repeated protobuf messages
    """Set each item's value, below the keys of a nested one."""
    for item in items:
        *above, name = item.nested_key or [item.key]
        inner = target
        for key in above:
            inner = inner.setdefault(key, {})
        inner[name] = json.loads(item.value_json)
