"""Text to tokens and back, byte for byte.

Both tokenizers work on the UTF-8 bytes of the text, so every text makes the round trip and a
loss per token can be turned into bits per byte: `token_bytes()` says how many bytes each id is.

Shapes:  V ids of the vocabulary   N tokens of one text
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gatewise.parallel.errors import ConfigError

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "StreamDecoder",
    "TextTokenizer",
    "load_tokenizer",
    "train_bpe",
]

_END_OF_TEXT = "<|endoftext|>"
# Names that published tokenizers give to their end-of-text token, looked for in this order.
_END_NAMES = (_END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

# Chunks that merges never cross. Made for source code: a word takes one character before it
# (" self", ".append", "_name"), and a line end takes the punctuation before it and the indent
# after it (":\n        "). Numbers have at most three digits.
_CHUNK_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:\s*[\r\n]+[ \t]*)?"
    r"|\s*[\r\n]+[ \t]*"
    r"|\s+(?!\S)|\s+"
)
# Text with what lossy tokenizers change: case, runs of spaces, line ends, composed letters.
_PROBE = (
    " A  b\n\tc\r\n\r\n  def f(x_1):\n        return 'caf\u00e9 e\u0301'  \n"
    "# \u4e2d\u6587 \U0001f600 \x00\n "
)


class TextTokenizer(Protocol):
    """What training, evaluation and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids V; ids are 0 to V - 1."""

    @property
    def end_of_text(self) -> int:
        """Id that stands after each document."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the saved file; equal fingerprints give equal tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without end of text; such a name in the text is text."""

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Return the ids of several texts, each int64 [N]."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; end of text is none."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return int64 [V], the number of bytes of each id; end of text has 0."""

    def save(self, path: Path | str) -> None:
        """Write one file that `load_tokenizer` reads."""


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 is end of text."""

    vocab_size = 257
    end_of_text = 256
    _text = json.dumps({"gatewise_tokenizer": "bytes"}) + "\n"

    @property
    def fingerprint(self) -> str:
        """sha256 of the saved file."""
        return _sha256(self._text)

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of a text."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Return the bytes of several texts, each int64 [N]."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; end of text is none."""
        return bytes(token for token in ids if token != self.end_of_text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return int64 [257]: ones, and 0 for end of text."""
        bytes_V = np.ones(self.vocab_size, np.int64)
        bytes_V[self.end_of_text] = 0
        return bytes_V

    def save(self, path: Path | str) -> None:
        """Write one file that `load_tokenizer` reads."""
        _write(Path(path), self._text)


class BpeTokenizer:
    """A byte-level BPE in Hugging Face's `tokenizer.json` format.

    Args:
        text: content of a `tokenizer.json`; `save` writes it back unchanged.

    Raises:
        ValueError: if it is no tokenizer, or one that does not give back every text exactly.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(_without_normalizer(text))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"is not a tokenizer.json ({error})") from error
        # "<|endoftext|>" in a document is text about tokenizers, not the end of the document.
        self._tokenizer.encode_special_tokens = True
        self.end_of_text = _find_end_of_text(self._tokenizer)
        self._bytes = _bytes_per_id(self._tokenizer)
        self.vocab_size = len(self._bytes)
        if self.decode_bytes(self.encode(_PROBE)) != _PROBE.encode("utf-8"):
            raise ValueError(
                "does not give every text back exactly; a byte-level BPE without prefix space "
                "does (as in GPT-2, Llama 3 or data.tokenizer=bpe)"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 of the saved file."""
        return _sha256(self._text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without end of text; such a name in the text is text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Return the ids of several texts, each int64 [N]; uses all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; end of text is none."""
        return b"".join(self._bytes[token] for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return int64 [V], the number of bytes of each id; special tokens have 0."""
        return np.array([len(data) for data in self._bytes], dtype=np.int64)

    def save(self, path: Path | str) -> None:
        """Write one file that `load_tokenizer` reads."""
        _write(Path(path), self._text)


class StreamDecoder:
    """Turn ids into text one by one, never half a character."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that this id completes; empty while a character is unfinished."""
        return self._decoder.decode(self._tokenizer.decode_bytes((token,)))

    def finish(self) -> str:
        """Return what is left: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: documents to count pairs in.
        vocab_size: ids in all, at least 257: 256 bytes, merges, and end of text as the last.
            Short texts may give fewer.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CHUNK_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([_END_OF_TEXT])
    return BpeTokenizer(tokenizer.to_str(pretty=False))


def load_tokenizer(path: Path | str) -> TextTokenizer:
    """Read a tokenizer that `save` wrote, or a byte-level `tokenizer.json` of someone else.

    Args:
        path: the file, or a folder with a `tokenizer.json` in it.

    Raises:
        ConfigError: if it cannot be read or used.
    """
    path = Path(os.path.expanduser(path))
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = path.read_bytes().decode("utf-8")  # read_text would change line ends
        content: Any = json.loads(text)  # Any: whatever the file holds
        if isinstance(content, dict) and content.get("gatewise_tokenizer") == "bytes":
            return ByteTokenizer()
        return BpeTokenizer(text)
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer_path is {path}, which cannot be read ({error.strerror or error}); "
            "give a tokenizer.json file or a folder that has one"
        ) from error
    except ValueError as error:  # also of JSON and of UTF-8
        reason = str(error) if str(error).startswith(("is ", "does ", "has ")) else "is not JSON"
        raise ConfigError(
            f"data.tokenizer_path: {path} {reason}; give a byte-level tokenizer.json"
        ) from error


def _without_normalizer(text: str) -> str:
    """Leave out a Unicode normalisation, which would change some texts; bytes need none."""
    content = json.loads(text)
    if (content.get("normalizer") or {}).get("type") in {"NFC", "NFD", "NFKC", "NFKD"}:
        content["normalizer"] = None
        return json.dumps(content)
    return text


def _find_end_of_text(tokenizer: Any) -> int:
    for name in _END_NAMES:
        token: int | None = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise ValueError(f"has no end-of-text token; one of {', '.join(_END_NAMES)} is needed")


def _bytes_per_id(tokenizer: Any) -> list[bytes]:
    """Return the bytes of each id; empty for special tokens and for ids that are not used."""
    names: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    values = _byte_values()
    table = [b""] * (max(names.values()) + 1)
    for name, token in names.items():
        if token in added:
            table[token] = b"" if added[token].special else name.encode("utf-8")
        elif all(character in values for character in name):
            table[token] = bytes(values[character] for character in name)
        else:
            raise ValueError(f"has the token {name!r}, so it is not a byte-level BPE")
    return table


def _byte_values() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the
    characters from U+0100 on. Source: GPT-2's encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    values = {chr(byte): byte for byte in printable}
    return values | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", newline="")
    temporary.replace(path)
