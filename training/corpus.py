"""Find the documents to learn from and split them into training and validation.

By default these are the sources of the running interpreter's standard library: real text that
is on every machine. `data.path` names files instead, `data.hf` a Hugging Face dataset.

Validation is every n-th document (n = `data.validation_every`): a document is a text file or a
line of a `.jsonl` file. Where there are fewer files than n, each is cut at line ends into blocks
of about 16 kB, and every n-th block is validation.
"""

import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gatewise.parallel.errors import DataError
from gatewise.training.config import DataConfig
from gatewise.training.hf_rows import open_rows
from gatewise.training.text_files import (
    TextFile,
    check_text_file,
    read_json_lines,
    read_lines,
    read_text,
)

__all__ = ["Corpus", "Document", "cut_blocks", "find_corpus", "standard_library_files"]

_LOG = logging.getLogger(__name__)
_BLOCK_BYTES = 1 << 14

# Not written by people to be read: tests hold fixtures, encodings are 120 near-copies of one
# machine-made table, pydoc_data is the manual as one string literal, _sysconfigdata and config-*
# hold this machine's compiler flags. Left in, they would make the validation loss look better.
_SKIPPED_FOLDERS = frozenset(
    (
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "encodings",
        "pydoc_data",
    )
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text that ends with an end-of-text token."""

    text: str
    is_validation: bool


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order; `documents()` may be called again and reads them again."""

    source: str  # what the user called it, for messages
    fingerprint: str  # sha256 of everything that decides the documents and their split
    documents: Callable[[], Iterator[Document]]


def find_corpus(config: DataConfig) -> Corpus:
    """Return the corpus that the settings name.

    Raises:
        DataError: if there is nothing to read, or it is not text.
        ConfigError: if `data.hf` is set and `datasets` is not installed, or too old.
    """
    if config.hf is not None:
        return _dataset_corpus(config)
    if config.path is None:
        return _files_corpus("the standard library", standard_library_files(), config)
    return _files_corpus(f"data.path={config.path}", _find_files(config.path), config)


def standard_library_files(root: Path | None = None) -> list[Path]:
    """List the default corpus: the standard library's `.py` files, sorted by relative path.

    Args:
        root: folder to list; None is the running interpreter's standard library.

    Raises:
        DataError: if there are none, for example because the library is inside a zip file.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = [
        path
        for path in _walk(root, _SKIPPED_FOLDERS, _SKIPPED_PREFIXES)
        if path.suffix == ".py" and not path.name.startswith(_SKIPPED_PREFIXES)
    ]
    if not files:
        raise DataError(
            f"the standard library in {root} has no .py files; set data.path to text of your own"
        )
    return files


def cut_blocks(lines: Iterable[str], block_bytes: int) -> Iterator[str]:
    """Join lines into blocks of at least `block_bytes` (the last may be shorter).

    A line longer than that is cut inside, so that text without line ends has blocks too.
    """
    block: list[str] = []
    size = 0
    for line in lines:
        for start in range(0, len(line), block_bytes):
            piece = line[start : start + block_bytes]
            block.append(piece)
            size += len(piece.encode("utf-8"))
            if size >= block_bytes:
                yield "".join(block)
                block, size = [], 0
    if block:
        yield "".join(block)


def _find_files(pattern: str) -> list[Path]:
    """Expand `data.path` into regular files; a folder or glob is sorted and recursive."""
    path = Path(os.path.expanduser(pattern))
    try:
        is_folder = path.is_dir()
        if is_folder:
            found = _walk(path, frozenset(), (".",))
        elif path.exists():
            found = [path]
        else:
            matches = [Path(name) for name in glob.glob(str(path), recursive=True)]
            found = sorted((match for match in matches if match.is_file()), key=Path.as_posix)
    except OSError as error:
        raise DataError(
            f"data.path is {pattern}, which cannot be read ({error.strerror or error}); "
            "check the path and that you may read it"
        ) from error
    if not found:
        what = "has no files in it" if is_folder else "does not exist and matches no file"
        raise DataError(
            f"data.path is {pattern}, which {what}; give a text file, a folder, a glob, "
            ".gz, .jsonl or the prefix of Megatron .bin/.idx files"
        )
    return found


def _walk(root: Path, folders: frozenset[str], prefixes: tuple[str, ...]) -> list[Path]:
    """List regular files below `root` in a fixed order, without the named folders."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"data.path: folder {error.filename} cannot be read ({error.strerror}); "
            "check that you may read it"
        ) from error

    found: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [
            name for name in subfolders if name not in folders and not name.startswith(prefixes)
        ]
        found += [Path(folder, name) for name in names if not name.startswith(prefixes)]
    regular = (path for path in found if path.is_file())
    return sorted(regular, key=lambda path: path.relative_to(root).as_posix())


def _files_corpus(source: str, paths: list[Path], config: DataConfig) -> Corpus:
    checked = [check_text_file(path) for path in paths]
    files = [file for file in checked if file.problem is None]
    if not files:
        raise DataError(
            f"{source}: {checked[0].path} {checked[0].problem}"
            + (f"; none of the {len(checked)} files holds text" if len(checked) > 1 else "")
        )
    # Empty files are ordinary (__init__.py) and not worth a word.
    unused = [file for file in checked if file.problem is not None and file.num_bytes > 0]
    if unused:
        _LOG.warning(
            "%s: left out %d of %d files that are not text, for example: %s %s",
            source,
            len(unused),
            len(checked),
            unused[0].path,
            unused[0].problem,
        )
    few = len(files) < config.validation_every and not any(f.is_json_lines for f in files)
    read = _read_blocks if few else _read_documents
    parts = [f"{read.__name__} {config.validation_every} {config.text_key}"]
    parts += [f"{file.is_json_lines} {file.digest}" for file in files]
    return Corpus(source, _hash(parts), lambda: read(files, config))


def _read_documents(files: list[TextFile], config: DataConfig) -> Iterator[Document]:
    index = 0
    for file in files:
        if file.is_json_lines:
            texts = read_json_lines(file.path, config.text_key)
        else:
            texts = iter((read_text(file.path),))
        for text in texts:
            yield Document(text, _is_validation(index, config))
            index += 1


def _read_blocks(files: list[TextFile], config: DataConfig) -> Iterator[Document]:
    """Cut few files into blocks; neighbours in the same split stay one document."""
    total = sum(file.num_bytes for file in files)
    # Short text gets smaller blocks, so that it still has validation blocks.
    block_bytes = min(_BLOCK_BYTES, max(64, total // (4 * config.validation_every)))
    index = 0
    for file in files:
        joined: list[str] = []
        for block in cut_blocks(read_lines(file.path), block_bytes):
            if not _is_validation(index, config):
                joined.append(block)
            else:
                if joined:
                    yield Document("".join(joined), is_validation=False)
                yield Document(block, is_validation=True)
                joined = []
            index += 1
        if joined:
            yield Document("".join(joined), is_validation=False)


def _is_validation(index: int, config: DataConfig) -> bool:
    return index % config.validation_every == config.validation_every - 1


def _dataset_corpus(config: DataConfig) -> Corpus:
    """Read rows of a Hugging Face dataset."""
    train, held_out = open_rows(config)

    def documents() -> Iterator[Document]:
        for index, text in enumerate(train()):
            yield Document(text, held_out is None and _is_validation(index, config))
        for text in held_out() if held_out is not None else ():
            yield Document(text, is_validation=True)

    fingerprint = _hash(f"{doc.is_validation} {doc.text}" for doc in documents())
    return Corpus(f"data.hf={config.hf}", fingerprint, documents)


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)  # lengths keep parts apart
    return digest.hexdigest()
