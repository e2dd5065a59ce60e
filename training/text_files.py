"""Text files on disk: check, fingerprint and read them, plain or gzipped, whole or by JSON line.

Every file is checked in one streaming pass before anything is tokenised, so that a binary or
damaged file is named at once and not halfway through a long preparation.
"""

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from gatewise.parallel.errors import DataError

__all__ = ["TextFile", "check_text_file", "read_json_lines", "read_lines", "read_text"]

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file that was looked at; `problem` is None where it holds text that can be used."""

    path: Path
    num_bytes: int  # after decompression, read so far where there is a problem
    digest: str  # sha256 of the text, after decompression
    problem: str | None = None  # one clause with its remedy, to stand after the file's name

    @property
    def is_json_lines(self) -> bool:
        """Whether each line is one JSON object with a document inside."""
        return self.path.name.endswith((".jsonl", ".jsonl.gz"))


def check_text_file(path: Path) -> TextFile:
    """Read a file once and say whether it is text.

    Args:
        path: a regular file; `.gz` is decompressed.

    Returns:
        Size and sha256 of the text; an empty, binary or damaged file has `problem` set.

    Raises:
        DataError: if the file cannot be opened or read.
    """
    digest, decoder, num_bytes = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    problem = None
    try:
        if not path.is_file():
            return TextFile(path, 0, "", "is not a regular file; give a file with text in it")
        with _open(path) as stream:
            while problem is None:
                chunk = stream.read(_CHUNK_BYTES)
                problem = _problem_of(chunk, num_bytes, decoder)
                digest.update(chunk)
                num_bytes += len(chunk)
                if not chunk:
                    break
    except (gzip.BadGzipFile, EOFError, zlib.error):
        problem = "is not a complete gzip file; compress the text again"
    except OSError as error:
        raise _unreadable(path, error) from error
    return TextFile(path, num_bytes, digest.hexdigest(), problem)


def read_text(path: Path) -> str:
    """Return all text of a checked file, line ends as they are."""
    try:
        with _open(path) as stream:
            return stream.read().decode("utf-8")
    except OSError as error:
        raise _unreadable(path, error) from error


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a checked file with their line ends; joined they are the text."""
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8", newline="\n") as stream:
            yield from stream
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json_lines(path: Path, text_key: str) -> Iterator[str]:
    """Yield the text of each line of a `.jsonl` file; blank lines and empty texts are left out.

    Raises:
        DataError: naming file and line, if a line is no JSON object with that text.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not JSON ({error}); "
                "a .jsonl file has one JSON object in each line"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
            keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{path}, line {number} has no text under data.text_key={text_key}; "
                f"it has: {keys or 'nothing'}; set data.text_key to the field with the text"
            )
        if row[text_key]:
            yield row[text_key]


def _open(path: Path) -> BinaryIO:
    # A GzipFile reads like any binary file, but its type does not say so.
    return cast("BinaryIO", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _problem_of(chunk: bytes, offset: int, decoder: codecs.IncrementalDecoder) -> str | None:
    """Say what is wrong with the next chunk of a file; an empty chunk is the end of it."""
    if not chunk and offset == 0:
        return "is empty; give a file with text in it"
    nul = chunk.find(b"\0")
    if nul >= 0:
        return (
            f"is binary (a NUL byte at offset {offset + nul}); give UTF-8 text, "
            ".gz, .jsonl or Megatron .bin/.idx files"
        )
    try:
        decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        pending = len(error.object) - len(chunk)  # bytes kept from the chunk before
        return (
            f"is not UTF-8 (byte {offset + error.start - pending}); convert it, "
            "for example with iconv -f latin1 -t utf-8"
        )
    return None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"data.path: {path} cannot be read ({error.strerror or error}); "
        "check that it exists and that you may read it"
    )
