"""A copy of the program's sources, so that later edits do not reach a job that is still queued."""

import hashlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gatewise.launch.run_folder import writable

__all__ = ["take_snapshot"]

_FOLDERS = ("routers", "parallel", "moe", "training", "compression", "conf", "launch")
_LEFT_OUT = ("__pycache__",)


def take_snapshot(parent: Path) -> Path:
    """Copy the package to `parent/<hash of its contents>` and return that folder.

    Put before everything else on PYTHONPATH it is what `import gatewise` finds. An equal copy that
    is there already is used again, so that nodes and points of a sweep may all call this.

    Args:
        parent: made if it is not there.

    Raises:
        ConfigError: if nothing can be written there.
    """
    sources = dict(_sources())
    digest = hashlib.sha256()
    for name, path in sorted(sources.items()):
        data = path.read_bytes()
        digest.update(f"{name} {len(data)}\n".encode() + data)
    target = parent / digest.hexdigest()[:12]
    with writable(parent):
        if target.is_dir():
            return target
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".code_", dir=parent))
        temporary.chmod(0o755)
        try:
            for name, path in sources.items():
                copy = temporary / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # else another node was quicker, with the same files
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield name below the copy and path of every file of the package."""
    for folder in _FOLDERS:
        (root,) = importlib.import_module(f"gatewise.{folder}").__path__
        for path in Path(root).rglob("*"):
            below = path.relative_to(root)
            if path.is_file() and not any(part in _LEFT_OUT for part in below.parts):
                yield f"gatewise/{folder}/{below.as_posix()}", path
