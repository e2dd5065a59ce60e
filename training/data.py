"""Prepare text for training: tokenise it once into a cache, and open it on every rank.

Read `corpus.py` (which text), `tokenizer.py` and `indexed.py` (the files) first; `sequences.py`
cuts the tokens into batches. The command calls `prepare_data` before any rank starts, the ranks
call `open_prepared`.

A cache folder is named by the content of the text and the settings that shape the tokens:

    <cache>/<key>/manifest.json     counts and sha256 of the other files, and of itself
                  tokenizer.json
                  train.bin, train.idx, validation.bin, validation.idx
    <cache>/<key>.lock              held while one process prepares
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gatewise.parallel.errors import ConfigError, DataError
from gatewise.training.blend import BlendPart, parse_blend, training_order
from gatewise.training.config import DataConfig, Tokenizer
from gatewise.training.corpus import Corpus, Document, find_corpus
from gatewise.training.indexed import TokenFile, TokenFileWriter, Tokens, token_dtype
from gatewise.training.sequences import (
    Order,
    Windows,
    read_batch,
    validation_windows,
)
from gatewise.training.tokenizer import ByteTokenizer, TextTokenizer, load_tokenizer, train_bpe

__all__ = [
    "Order",
    "PreparedData",
    "Windows",
    "open_prepared",
    "prepare_data",
    "read_batch",
    "validation_windows",
]

_LOG = logging.getLogger(__name__)
_FORMAT = 1  # of the cache; a change of it, of the splits or of the BPE must raise it
_FILES = ("tokenizer.json", "train.bin", "train.idx", "validation.bin", "validation.idx")
_BATCH_CHARACTERS = 1 << 20  # tokenised at a time
_BPE_CHARACTERS = 1 << 26  # a BPE is trained on so much from the start of the training split


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenised text on disk, memory-mapped: what a rank needs to know of the data."""

    folder: Path
    tokenizer: TextTokenizer
    train: TokenFile
    validation: TokenFile
    fingerprint: str  # hash of tokenizer and tokens: equal text and settings, equal value
    train_bytes: int  # of text that the split's tokens stand for
    validation_bytes: int
    blend: tuple[BlendPart, ...] = ()  # of the training split; empty: it is one


def prepare_data(config: DataConfig) -> PreparedData:
    """Tokenise the text of the settings, or find it tokenised in the cache.

    Safe to call in several processes at once: one prepares, the others wait. A cache folder is
    used only if every file in it still has the checksum it was written with.

    Raises:
        ConfigError: if tokenizer, cache folder or an optional package cannot be used.
        DataError: if the text cannot be used, or is too short for the settings.
    """
    shares = _shares(config)
    given = None if config.tokenizer_path is None else load_tokenizer(config.tokenizer_path)
    if given is None and config.tokenizer is Tokenizer.bytes:
        given = ByteTokenizer()
    if not shares:
        corpus = find_corpus(config)
        build: _Build = _TextBuild(corpus, given, config.vocab_size)
    elif given is not None:
        build = _TokenBuild(shares, given, config.validation_every, blend=config.blend is not None)
    else:
        source = f"path={config.path}" if config.blend is None else "blend"
        raise ConfigError(
            f"data.tokenizer is bpe, but data.{source} holds tokens, on which no BPE can "
            "be trained; set data.tokenizer_path to the tokenizer that made them (or "
            "data.tokenizer=bytes)"
        )
    prepared = _build_or_open(_cache_root(config), build)
    _check_long_enough(prepared, build.source, config)
    return prepared


def open_prepared(folder: Path | str) -> PreparedData:
    """Open a folder that `prepare_data` made; checks sizes, not checksums.

    Raises:
        DataError: if the folder is not complete.
    """
    folder = Path(folder)
    return _open(folder, _read_manifest(folder))


class _Build(Protocol):
    """What to write into a cache folder."""

    source: str  # for messages
    key: str  # name of the folder

    def tokenizer(self) -> TextTokenizer:
        """Return the tokenizer; may take long, where it is trained."""

    weights: Sequence[float]  # of the parts of a blend; empty: there is none

    def documents(self, tokenizer: TextTokenizer) -> Iterator[tuple[Tokens, bool, int]]:
        """Yield tokens that end with end of text, whether they are validation, and the part."""


class _TextBuild:
    def __init__(self, corpus: Corpus, tokenizer: TextTokenizer | None, vocab_size: int) -> None:
        self.source = corpus.source
        self._corpus, self._tokenizer, self._vocab_size = corpus, tokenizer, vocab_size
        settings = f"bpe {vocab_size}" if tokenizer is None else tokenizer.fingerprint
        self.key = _key("text", corpus.fingerprint, settings)
        self.weights: Sequence[float] = ()

    def tokenizer(self) -> TextTokenizer:
        if self._tokenizer is not None:
            return self._tokenizer
        _LOG.info("training a BPE of %d ids on %s", self._vocab_size, self.source)
        return train_bpe(_first_texts(self._corpus.documents(), _BPE_CHARACTERS), self._vocab_size)

    def documents(self, tokenizer: TextTokenizer) -> Iterator[tuple[Tokens, bool, int]]:
        for documents in _batched(self._corpus.documents(), _BATCH_CHARACTERS):
            batch = tokenizer.encode_batch([document.text for document in documents])
            for document, ids_N in zip(documents, batch, strict=True):
                yield np.append(ids_N, tokenizer.end_of_text), document.is_validation, 0


class _TokenBuild:
    def __init__(
        self,
        shares: Sequence[tuple[float, Path]],
        tokenizer: TextTokenizer,
        validation_every: int,
        *,
        blend: bool,
    ) -> None:
        names = " ".join(str(prefix) for _, prefix in shares)
        self.source = f"data.blend of {names}" if blend else f"data.path={names}"
        self.weights: Sequence[float] = [weight for weight, _ in shares] if blend else []
        self._files = [TokenFile(prefix) for _, prefix in shares]
        self._tokenizer, self._every = tokenizer, validation_every
        digests = [
            _file_digest(_beside(prefix, suffix))
            for _, prefix in shares
            for suffix in (".idx", ".bin")
        ]
        settings = [repr(weight) for weight in self.weights]
        self.key = _key("tokens", *digests, *settings, tokenizer.fingerprint, str(validation_every))

    def tokenizer(self) -> TextTokenizer:
        return self._tokenizer

    def documents(self, tokenizer: TextTokenizer) -> Iterator[tuple[Tokens, bool, int]]:
        for part, file in enumerate(self._files):
            for index in range(file.num_documents):
                ids_N = file.document(index)
                if len(ids_N) == 0:
                    continue
                low, high = int(ids_N.min()), int(ids_N.max())
                if low < 0 or high >= tokenizer.vocab_size:
                    raise DataError(
                        f"{file.prefix}.bin holds token id {high if low >= 0 else low}, but the "
                        f"tokenizer has ids 0 to {tokenizer.vocab_size - 1}; set "
                        "data.tokenizer_path to the tokenizer that made the file"
                    )
                if ids_N[-1] != tokenizer.end_of_text:
                    ids_N = np.append(ids_N.astype(np.int64), tokenizer.end_of_text)
                yield ids_N, index % self._every == self._every - 1, part


def _build_or_open(root: Path, build: _Build) -> PreparedData:
    folder = root / build.key
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(_beside(folder, ".lock")):
            if folder.exists():
                try:
                    return _open(folder, _read_manifest(folder, verify=True))
                except DataError as error:
                    _LOG.warning("%s; it is made again", error)
                    shutil.rmtree(folder)
            for left in root.glob(f"{build.key}.tmp-*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = _beside(folder, f".tmp-{os.getpid()}-{secrets.token_hex(4)}")
            temporary.mkdir()
            try:
                _write(temporary, build)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache: {root} cannot be written ({error.strerror or error}); "
            "set data.cache to a folder with space that you may write to"
        ) from error
    return open_prepared(folder)


def _write(folder: Path, build: _Build) -> None:
    tokenizer = build.tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    dtype = token_dtype(tokenizer.vocab_size)
    tokens_P = [0] * len(build.weights)
    counts = [np.zeros(tokenizer.vocab_size, np.int64) for _ in range(2)]
    with (
        TokenFileWriter(folder / "train", dtype) as train,
        TokenFileWriter(folder / "validation", dtype) as validation,
    ):
        for ids_N, is_validation, part in build.documents(tokenizer):
            if build.weights and not is_validation:
                tokens_P[part] += len(ids_N)
            (validation if is_validation else train).add_document(ids_N)
            counts[is_validation] += np.bincount(ids_N, minlength=tokenizer.vocab_size)
    train_bytes, validation_bytes = (int(count_V @ tokenizer.token_bytes()) for count_V in counts)
    manifest = {
        "format": _FORMAT,
        "source": build.source,
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": train.num_tokens,
        "train_bytes": train_bytes,
        "validation_tokens": validation.num_tokens,
        "validation_bytes": validation_bytes,
        "sha256": {name: _file_digest(folder / name) for name in _FILES},
    }
    if build.weights:
        manifest["blend"] = [
            {"tokens": tokens, "weight": weight}
            for tokens, weight in zip(tokens_P, build.weights, strict=True)
        ]
    manifest["checksum"] = _checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="ascii")
    _LOG.info(
        "tokenised %s: %d training and %d validation tokens, %.2f bytes per token, in %s",
        build.source,
        train.num_tokens,
        validation.num_tokens,
        (train_bytes + validation_bytes) / max(1, train.num_tokens + validation.num_tokens),
        folder.parent,
    )


def _read_manifest(folder: Path, *, verify: bool = False) -> dict[str, Any]:  # Any: JSON
    """Read and check a manifest, and with `verify` the checksum of every file it names."""
    remedy = "delete the folder and start again, and it is made anew"
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        if manifest.pop("checksum") != _checksum(manifest) or manifest["format"] != _FORMAT:
            raise DataError(f"prepared data {folder}: manifest.json is damaged; {remedy}")
        for name in _FILES if verify else ():
            if _file_digest(folder / name) != manifest["sha256"][name]:
                raise DataError(f"prepared data {folder}: {name} is damaged; {remedy}")
    except OSError as error:
        raise DataError(
            f"prepared data {folder}: {Path(error.filename or '').name or 'a file'} cannot be read "
            f"({error.strerror}); {remedy}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"prepared data {folder}: manifest.json is damaged; {remedy}") from error
    return manifest


def _open(folder: Path, manifest: dict[str, Any]) -> PreparedData:
    digests = manifest["sha256"]
    return PreparedData(
        folder=folder,
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
        train=TokenFile(folder / "train"),
        validation=TokenFile(folder / "validation"),
        fingerprint=_key(*(digests[name] for name in _FILES)),
        train_bytes=manifest["train_bytes"],
        validation_bytes=manifest["validation_bytes"],
        blend=tuple(BlendPart(**part) for part in manifest.get("blend", ())),
    )


def _check_long_enough(prepared: PreparedData, source: str, config: DataConfig) -> None:
    """Find splits that are too short before ranks start."""
    if len(prepared.validation) < 2:
        raise DataError(
            f"{source}: the validation split is empty, because data.validation_every is "
            f"{config.validation_every} and there are {prepared.train.num_documents} documents; "
            f"lower data.validation_every (at least 2) or give more text"
        )
    try:
        training_order(prepared.blend, len(prepared.train), config.sequence_length, 0)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _shares(config: DataConfig) -> list[tuple[float, Path]]:
    """Return the token files of the settings and their shares; none where they name text."""
    if config.blend is None:
        prefix = None if config.path is None else _megatron_prefix(config.path)
        return [] if prefix is None else [(1.0, prefix)]
    found = []
    for weight, name in parse_blend(config.blend):
        prefix = _megatron_prefix(name)
        if prefix is None:
            raise DataError(
                f"data.blend names {name}, but there is no {name}.idx; give prefixes of .bin/.idx "
                "pairs"
            )
        found.append((weight, prefix))
    return found


def _megatron_prefix(path: str) -> Path | None:
    """Return the prefix if the path names a `.bin/.idx` pair, with or without the suffix."""
    expanded = Path(os.path.expanduser(path))
    if expanded.suffix in {".bin", ".idx"}:
        return expanded.with_suffix("")
    # os.path answers False where Path would raise; find_corpus names such a path.
    if expanded.name and not os.path.exists(expanded) and os.path.exists(f"{expanded}.idx"):
        return expanded
    return None


def _cache_root(config: DataConfig) -> Path:
    if config.cache is not None:
        return Path(os.path.expanduser(config.cache))
    try:
        return Path.home() / ".cache" / "gatewise"
    except RuntimeError as error:
        raise ConfigError(
            "data.cache is null and this user has no home folder; set data.cache to a folder"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process, however that ends."""
    with path.open("w", encoding="ascii") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _first_texts(documents: Iterable[Document], characters: int) -> Iterator[str]:
    """Yield training texts until there are so many characters."""
    for document in documents:
        if not document.is_validation:
            yield document.text
            characters -= len(document.text)
            if characters <= 0:
                return


def _batched(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Group documents into lists of about so many characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    return _key(json.dumps(manifest, sort_keys=True))


def _key(*parts: str) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode("utf-8")).hexdigest()[:40]
