"""Compiles the C++ kernels once per machine; they are optional, and torch's operators replace them.

The library is built at first use with the compiler that the machine has, for exactly its
processor, in a few seconds. It is kept in the user's cache folder under a key of everything that
it depends on: sources, flags, compiler and processor. Ranks that start together wait for one of
them to build it.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["SOURCES", "build_library", "cache_folder", "find_compiler", "library_path"]

SOURCES = Path(__file__).parent / "csrc"
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")
_TIMEOUT_S = 600

_log = logging.getLogger(__name__)


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, or None."""
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def cache_folder() -> Path:
    """Return a folder of this user alone for compiled libraries, created if need be.

    Raises:
        OSError: if neither the home nor the temporary folder can hold it.
    """
    try:
        folder = Path.home() / ".cache" / "gatewise"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        pass
    folder = Path(tempfile.gettempdir()) / f"gatewise-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # another user's library must not be loaded
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def build_library(compiler: str, folder: Path) -> Path:
    """Return the library's path, compiling it first if it is not there.

    Args:
        compiler: path of a C++ compiler.
        folder: where libraries are kept.

    Raises:
        OSError: if the folder cannot be written.
        RuntimeError: if the compiler fails; the message ends with its last line.
    """
    import fcntl  # not on Windows, where the caller falls back

    command = _command(compiler)
    library = library_path(compiler, folder)
    if library.exists():
        return library
    with (folder / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if library.exists():  # another rank has built it meanwhile
            return library
        _log.info("compiling the CPU kernels (once, about 20 s)")
        partial = library.with_suffix(f".{os.getpid()}.part")
        try:
            subprocess.run(
                [*command, str(SOURCES / "kernels.cpp"), "-o", str(partial)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
            partial.replace(library)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"{compiler} failed: {lines[-1]}") from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{compiler} took more than {_TIMEOUT_S} s") from error
        finally:
            partial.unlink(missing_ok=True)
    return library


def library_path(compiler: str, folder: Path) -> Path:
    """Return where the library of these sources, flags, compiler and processor lies once built."""
    return folder / f"kernels-{_key(_command(compiler))}.so"


def _command(compiler: str) -> list[str]:
    return [compiler, *_FLAGS, _machine_flag()]


def _machine_flag() -> str:
    return "-march=native" if platform.machine() in {"x86_64", "AMD64"} else "-mcpu=native"


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in {".h", ".cpp"}:
            digest.update(source.read_bytes())
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    for part in (*command, version.stdout, _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Describe what `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
