r"""Token files in Megatron's `.bin/.idx` layout: write them, and read them memory-mapped.

`prefix.bin` holds the tokens of all sequences, one after another. `prefix.idx` says where they
are, little-endian:

    9 bytes   "MMIDIDX\0\0"
    uint64    version, 1
    uint8     type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    uint64    S, number of sequences
    uint64    D, number of document boundaries (documents + 1)
    int32[S]  tokens of each sequence
    int64[S]  byte offset of each sequence in the .bin file
    int64[D]  first sequence of each document, and S at the end

Ours have one sequence per document. Files of others may have more.
Source: the file format of megatron-core's `IndexedDataset`.
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gatewise.parallel.errors import DataError

__all__ = ["TokenFile", "TokenFileWriter", "token_dtype"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LARGEST_LENGTH = np.iinfo(np.int32).max

Tokens = npt.NDArray[np.integer[Any]]  # Any: the width differs from file to file


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type that holds ids below `vocab_size`: uint16 where they fit, else int32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


class TokenFile:
    """The tokens of a `.bin/.idx` pair as one memory-mapped array.

    Args:
        prefix: path without `.bin` and `.idx`.

    Attributes:
        tokens: [tokens], all sequences one after another, read-only.
        document_starts: int64 [documents + 1], first token of each document, and `len(tokens)`.

    Raises:
        DataError: if a file is missing or damaged, or the pair does not fit together.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        dtype, lengths, pointers, boundaries = _read_index(_with_suffix(self.prefix, ".idx"))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        bin_path = _with_suffix(self.prefix, ".bin")
        self.tokens = _map_tokens(bin_path, dtype, int(offsets[-1]))
        if not np.array_equal(pointers, offsets[:-1] * dtype.itemsize):
            raise DataError(
                f"{self.prefix}.idx: the sequences do not follow one another without gaps in "
                f"{bin_path}; write the pair again"
            )
        self.document_starts = offsets[boundaries]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_starts) - 1

    def document(self, index: int) -> Tokens:
        """Return the tokens of one document, [length], not copied."""
        return self.tokens[self.document_starts[index] : self.document_starts[index + 1]]


class TokenFileWriter:
    """Write documents into a `.bin/.idx` pair; use it as a context manager.

    Both files appear under their names only when the block ends without an exception, the index
    last, so that an index is never without its tokens.

    Args:
        prefix: path without `.bin` and `.idx`; its folder exists.
        dtype: type of a token on disk, from `token_dtype`.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype[Any]) -> None:
        self.num_tokens = 0
        self._prefix = Path(prefix)
        self._code = _code_of(dtype)
        self._dtype = dtype
        self._lengths: list[int] = []

    def __enter__(self) -> "TokenFileWriter":
        self._temporary = {
            suffix: _with_suffix(self._prefix, f"{suffix}.tmp-{os.getpid()}")
            for suffix in (".bin", ".idx")
        }
        self._stream = self._temporary[".bin"].open("wb")
        return self

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document.

        Args:
            tokens: [length] integers that the type on disk can hold.

        Raises:
            ValueError: if they do not fit, or there are more than 2**31 - 1.
        """
        array_N = np.asarray(tokens)
        if array_N.ndim != 1 or len(array_N) > _LARGEST_LENGTH:
            raise ValueError(
                f"a document has shape {array_N.shape}; it must be one row of at most "
                f"{_LARGEST_LENGTH} tokens"
            )
        limits = np.iinfo(self._dtype)
        if len(array_N) and not limits.min <= array_N.min() <= array_N.max() <= limits.max:
            raise ValueError(
                f"a document has token ids from {array_N.min()} to {array_N.max()}; "
                f"{self._dtype} holds {limits.min} to {limits.max}"
            )
        self._stream.write(array_N.astype(self._dtype).tobytes())
        self._lengths.append(len(array_N))
        self.num_tokens += len(array_N)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._stream:
                if kind is None:
                    _sync(self._stream)
            if kind is None:
                self._write_index()
                for suffix in (".bin", ".idx"):
                    self._temporary[suffix].replace(_with_suffix(self._prefix, suffix))
        finally:
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths_S = np.array(self._lengths, dtype="<i4")
        ends_S = np.cumsum(lengths_S, dtype=np.int64)
        pointers_S = (ends_S - lengths_S) * self._dtype.itemsize
        boundaries_D = np.arange(len(lengths_S) + 1, dtype="<i8")
        with self._temporary[".idx"].open("wb") as stream:
            stream.write(
                _HEADER.pack(_MAGIC, 1, self._code, len(lengths_S), len(boundaries_D))
                + lengths_S.tobytes()
                + pointers_S.astype("<i8").tobytes()
                + boundaries_D.tobytes()
            )
            _sync(stream)


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return token type, sequence lengths, byte pointers and document boundaries."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise DataError(f"{path} is not a Megatron index (its first bytes are not MMIDIDX)")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(data)
    if version != 1:
        raise DataError(f"{path} has version {version}; only version 1 can be read")
    if code not in _CODES:
        raise DataError(f"{path} has token type code {code}; integers are {sorted(_CODES)}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if len(data) != expected:
        raise DataError(
            f"{path} has {len(data)} bytes and should have {expected}; it is damaged or holds "
            "multimodal data: write it again as text"
        )
    lengths_S = np.frombuffer(data, "<i4", num_sequences, _HEADER.size)
    pointers_S = np.frombuffer(data, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    boundaries_D = np.frombuffer(data, "<i8", num_boundaries, _HEADER.size + 12 * num_sequences)
    ordered = num_boundaries > 0 and bool(np.all(np.diff(boundaries_D) >= 0))
    if not ordered or boundaries_D[0] != 0 or boundaries_D[-1] != num_sequences:
        raise DataError(f"{path}: the documents do not cover all sequences; write it again")
    if num_sequences and lengths_S.min() < 0:
        raise DataError(f"{path}: a sequence has a negative length; write it again")
    return np.dtype(_CODES[code]), lengths_S, pointers_S, boundaries_D


def _map_tokens(path: Path, dtype: np.dtype[Any], num_tokens: int) -> Tokens:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != num_tokens * dtype.itemsize:
            raise DataError(
                f"{path} has {num_bytes} bytes but its index counts {num_tokens} tokens of "
                f"{dtype.itemsize} bytes; the pair is damaged or mixed up: write it again"
            )
        if num_tokens == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r", shape=(num_tokens,))
    except OSError as error:
        raise _unreadable(path, error) from error


def _code_of(dtype: np.dtype[Any]) -> int:
    for code, name in _CODES.items():
        if np.dtype(name) == dtype:
            return code
    raise ValueError(f"dtype is {dtype}; a token file holds {', '.join(_CODES.values())}")


def _sync(stream: Any) -> None:  # Any: a buffered or a raw file
    stream.flush()
    os.fsync(stream.fileno())


def _with_suffix(prefix: Path, suffix: str) -> Path:
    """Append; `Path.with_suffix` would cut a prefix such as `corpus_v1.5`."""
    return prefix.with_name(prefix.name + suffix)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read ({error.strerror or error}); a token file needs both "
        "prefix.bin and prefix.idx, and you must be allowed to read them"
    )
