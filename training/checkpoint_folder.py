"""Checkpoints on disk: names, durable files, checksums, the newest good one, retention.

A finished checkpoint is a folder `step_00000020` with a `manifest.json` that was written last and
holds size and SHA-256 of every other file. Whatever was interrupted carries another name:

    .step_00000020.partial-1f3a    being written, or left by a save that was killed
    .step_00000020.replaced-1f3a   the former checkpoint of a step that is saved again
    .step_00000020.deleted-1f3a    being deleted

A replaced checkpoint counts as long as nothing better of its step exists.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch.distributed as dist

from gatewise.parallel.errors import CheckpointError
from gatewise.training.checkpoint_peers import Peers, explain

__all__ = [
    "DurableFile",
    "FileRecord",
    "check_files",
    "commit",
    "find_latest",
    "find_latest_together",
    "partial_path",
    "prune",
    "rank_state_name",
    "read_json",
    "read_meta",
    "read_rank_state",
    "remove_leftovers",
    "step_path",
    "sync_folder",
    "verify",
    "write_durable",
]

FORMAT = 1  # of the folder; a reader refuses what it does not know
MANIFEST = "manifest.json"
META = "meta.json"

_NAME = re.compile(r"(?:step_(\d{8,})|\.step_(\d{8,})\.replaced-[0-9a-f]+)")
_LEFTOVER = re.compile(r"\.step_\d{8,}\.(?:partial|deleted)-[0-9a-f]+")
_PARTIAL = re.compile(r"\.step_(\d{8,})\.partial-[0-9a-f]+")
_HASH_THREADS = 4

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file, as they stand in the manifest."""

    size: int
    sha256: str


class DurableFile:
    """A new file that is hashed as it is written and on the disk when the block ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._size = 0
        self._stream: BinaryIO

    def __enter__(self) -> "DurableFile":
        self._stream = self._path.open("xb", buffering=1 << 20)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._hash.update(data)
        self._size += len(data)
        self._stream.write(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stream:  # closes even if the flush finds the disk full
            if error is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())

    @property
    def record(self) -> FileRecord:
        """Size and checksum of what was written."""
        return FileRecord(self._size, self._hash.hexdigest())


def write_durable(path: Path, data: bytes) -> FileRecord:
    """Write a new file and force it to the disk."""
    with DurableFile(path) as file:
        file.write(data)
    return file.record


def sync_folder(path: Path) -> None:
    """Force a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_path(folder: Path, step: int) -> Path:
    """Return where the finished checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def partial_path(folder: Path, step: int, token: str) -> Path:
    """Return where a save writes before it is complete; `token` (hex) makes it unique."""
    return folder / f".step_{step:08d}.partial-{token}"


def rank_state_name(rank: int) -> str:
    """Return the name of the file with one rank's own state (random generators)."""
    return f"rank_{rank:05d}.state"


def commit(partial: Path, step: int, files: Mapping[str, FileRecord], token: str) -> None:
    """Turn a completely written folder into the checkpoint of its step.

    The manifest is written last, everything is on the disk before the rename, and the rename
    before this returns. A former checkpoint of the same step is moved aside, then removed.

    Args:
        partial: folder with all files; they are on the disk already.
        step: of the checkpoint.
        files: name to record of every file in the folder.
        token: hex digits, unique to this save.
    """
    body = _manifest_body(step, {name: asdict(files[name]) for name in sorted(files)})
    manifest = {**body, "sha256": _digest(body)}
    write_durable(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(partial)
    folder, final = partial.parent, step_path(partial.parent, step)
    if final.exists():
        final.rename(folder / f".step_{step:08d}.replaced-{token}")
    partial.rename(final)
    sync_folder(folder)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: naming the folder and the first thing that is missing or differs.
    """
    check_files(path, _read_manifest(path), hashes=True)


def check_files(path: Path, files: Mapping[str, FileRecord], *, hashes: bool) -> None:
    """Compare the files of a folder with what is known of them.

    Args:
        path: of the folder.
        files: name to record.
        hashes: also read them and compare their checksums; else their sizes only.

    Raises:
        CheckpointError: naming the folder and the first file that is missing or differs.
    """
    for name, record in files.items():
        size = _size(path / name)
        if size != record.size:
            found = "missing" if size is None else f"{size} bytes long"
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} is {found}, not {record.size} bytes"
            )
    if not hashes:
        return
    with ThreadPoolExecutor(min(_HASH_THREADS, len(files) or 1)) as pool:
        digests = list(pool.map(_hash_file, [path / name for name in files]))
    for (name, record), digest in zip(files.items(), digests, strict=True):
        if digest != record.sha256:
            raise CheckpointError(
                f"checkpoint {path} is damaged: the SHA-256 of {name} is not the one in {MANIFEST}"
            )


def find_latest(folder: Path) -> Path | None:
    """Return the newest complete and undamaged checkpoint of a folder.

    Each one that is damaged or was interrupted, and is newer than the one returned, is named in
    one warning.

    Args:
        folder: with the checkpoints; it need not exist.

    Returns:
        Its path, or None if there is none.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    try:
        return _find_latest(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {explain(error)}") from error


def find_latest_together(folder: Path, *, group: dist.ProcessGroup | None) -> Path | None:
    """Return `find_latest` of rank 0 on every rank, so that all agree and files are read once.

    Args:
        folder: with the checkpoints; it need not exist.
        group: with a CPU backend; None is the default group, or this rank alone.

    Raises:
        CheckpointError: on all ranks, if rank 0 cannot read the folder.
    """
    peers = Peers(group)
    answer: Path | None = None
    error: CheckpointError | None = None
    if peers.rank == 0:
        try:
            answer = find_latest(folder)
        except CheckpointError as problem:
            error = problem
    peers.agree("looking for the newest checkpoint", error)
    return peers.gather(answer)[0]


def prune(folder: Path, *, keep_last: int, newest: Path, verdicts: dict[str, bool]) -> None:
    """Delete what is older than the last `keep_last` good checkpoints.

    Nothing goes that a later restart might need: a checkpoint counts only if this process wrote
    it or verified it, and `newest` always stays.

    Args:
        folder: with the checkpoints.
        keep_last: how many good ones stay, at least 1.
        newest: the checkpoint that was just written.
        verdicts: by name, whether a checkpoint is good, as far as this process knows; what is
            verified here is added.
    """
    verdicts[newest.name] = True
    kept = 0
    for step, path in _candidates(folder):
        if path != newest and (kept >= keep_last or _is_superseded(step, path, verdicts)):
            verdicts.pop(path.name, None)
            _remove(path, step)
        elif _is_good(path, verdicts):
            kept += 1


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted saves and deletions of this folder left behind."""
    for path in sorted(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            if _PARTIAL.fullmatch(path.name):
                _logger.warning("removing %s: its save did not end", path)
            shutil.rmtree(path, ignore_errors=True)
    for step, path in _candidates(folder):
        if _is_superseded(step, path, {}):
            _remove(path, step)


def read_meta(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Returns:
        `step`, `world_size`, `meta` (the caller's own entries) and `tensors`, which maps each name
        to its `shape` and `dtype`.

    Raises:
        CheckpointError: if it is missing, unreadable or of an unknown format.
    """
    meta = read_json(path, META)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has an unknown format; this version reads format {FORMAT}"
        )
    return meta


def read_rank_state(path: Path, rank: int, *, world: int | None = None) -> bytes | None:
    """Return what `save` got as `rank_state` of a rank.

    Args:
        path: of the checkpoint.
        rank: whose state to read.
        world: number of ranks now; None asks the default process group (1 where there is none).

    Returns:
        The bytes, or None if the checkpoint was saved by another number of ranks.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    if read_meta(path)["world_size"] != (Peers(None).world if world is None else world):
        return None
    try:
        return (path / rank_state_name(rank)).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {explain(error)}") from error


def read_json(path: Path, name: str) -> Any:  # Any: JSON
    """Return the contents of one JSON file of a checkpoint.

    Raises:
        CheckpointError: if it is missing or is not JSON.
    """
    try:
        return json.loads((path / name).read_bytes())
    except FileNotFoundError as error:
        what = "was interrupted while it was saved" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}: no {name}") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {explain(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {name} is not JSON") from error


def _read_manifest(path: Path) -> dict[str, FileRecord]:
    manifest = read_json(path, MANIFEST)
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {manifest['format']}; this version reads {FORMAT}"
        )
    try:
        body = _manifest_body(manifest["step"], manifest["files"])
        if manifest["sha256"] != _digest(body):
            raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} was changed")
        files = {name: FileRecord(**entry) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} lacks entries") from error
    named = _NAME.fullmatch(path.name)
    if named and int(named[1] or named[2]) != manifest["step"]:
        raise CheckpointError(
            f"checkpoint {path} is of step {manifest['step']}; the folder was renamed"
        )
    return files


def _manifest_body(step: int, files: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "step": step, "files": files}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _hash_file(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:  # a bad sector: as damaged as a wrong sum
        return None


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of what may be a checkpoint, newest first, replaced ones last."""
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1] or match[2]), path))
    return sorted(found, key=lambda item: (item[0], item[1].name.startswith("step_")), reverse=True)


def _find_latest(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    answer, newest = None, -1
    for step, path in _candidates(folder):
        try:
            verify(path)
        except CheckpointError as error:
            _logger.warning("%s; looking for the one before", error)
            continue
        answer, newest = path, step
        break
    for path in sorted(folder.iterdir()):
        match = _PARTIAL.fullmatch(path.name)
        if match and int(match[1]) > newest:
            _logger.warning("checkpoint %s is incomplete: its save did not end; not used", path)
    return answer


def _is_good(path: Path, verdicts: dict[str, bool]) -> bool:
    if path.name not in verdicts:
        try:
            verify(path)
            verdicts[path.name] = True
        except CheckpointError as error:
            _logger.warning("%s; it does not count for checkpoint.keep_last", error)
            verdicts[path.name] = False
    return verdicts[path.name]


def _is_superseded(step: int, path: Path, verdicts: dict[str, bool]) -> bool:
    """Say whether this is a replaced checkpoint whose step has a good one."""
    final = step_path(path.parent, step)
    return path != final and final.exists() and _is_good(final, verdicts)


def _remove(path: Path, step: int) -> None:
    """Delete a checkpoint so that no kill leaves a half of it under a valid name."""
    token = hashlib.sha256(path.name.encode()).hexdigest()[:8]
    aside = path.parent / f".step_{step:08d}.deleted-{token}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        _logger.warning("checkpoint %s could not be deleted: %s", path, explain(error))
