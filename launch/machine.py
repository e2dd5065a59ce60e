"""Facts about this machine and installation, read without importing torch.

Used by the run folder (`environment.json`) and by `doctor.py`.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "allocator",
    "available_cores",
    "cpu_features",
    "cpu_model",
    "environment",
    "git_state",
    "memory_mb",
    "versions",
]

_PACKAGES = ("gatewise", "torch", "numpy", "hydra-core", "omegaconf", "tokenizers", "safetensors")
# What decides which kernels run: units for bf16 and int8 products, and vector widths.
_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the core packages; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def available_cores() -> int:
    """Return the number of cores this process may use, which a container may have limited."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:  # cgroup v2: "max 100000" or "200000 100000"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = None if quota == "max" else max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):
        limit = None
    cores = cores or 1
    return min(cores, limit) if limit else cores


def cpu_model() -> str:
    """Return the processor's name."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_features() -> dict[str, bool]:
    """Tell which instruction sets that matter for matrix products the processor has."""
    flags: set[str] = set()
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
            break
    return {name: name in flags for name in _FEATURES}


def memory_mb() -> dict[str, int | None]:
    """Return the machine's memory and what of it is free, in MiB; None where unknown."""
    found: dict[str, int | None] = {"total": None, "available": None}
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return found
    names = {"MemTotal": "total", "MemAvailable": "available"}
    for line in lines:
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) // 1024
    return found


def allocator() -> str:
    """Return the name of the allocator that this process runs with."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = ""
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in maps:
            return name
    library, version = platform.libc_ver()
    return f"{library or 'system'} {version}".strip()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and cleanliness of the work tree around `folder`, or None outside of one."""
    if shutil.which("git") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(changed)}


def environment(command_line: list[str]) -> dict[str, Any]:
    """Return all that is worth knowing later about where a run took place."""
    return {
        "command_line": command_line,
        "folder": str(Path.cwd()),
        "versions": versions(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "host": platform.node(),
        "cpu": cpu_model(),
        "cpu_features": [name for name, present in cpu_features().items() if present],
        "cores": available_cores(),
        "memory_mb": memory_mb(),
        "allocator": allocator(),
        "git": git_state(Path.cwd()),
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
