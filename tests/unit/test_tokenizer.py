"""Tokenizers give every text back and know how many bytes each token stands for."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.parallel.errors import ConfigError
from gatewise.training.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    StreamDecoder,
    TextTokenizer,
    load_tokenizer,
    train_bpe,
)

_SAMPLE = (
    "def add(first, second):\n    '''Add two numbers.'''\n    return first + second\n\n\n"
    "class Adder:\n    def __init__(self, first):\n        self.first = first\n\n"
    "    def __call__(self, second):\n        return add(self.first, second)\n"
) * 3
_BPE = train_bpe([_SAMPLE], 400)
_BYTES = ByteTokenizer()
_BOTH = pytest.mark.parametrize("tokenizer", [_BYTES, _BPE], ids=["bytes", "bpe"])
_TEXT = st.text(max_size=60) | st.text(
    st.sampled_from([*" \t\r\n_'.:(x1", "\u00e9", "\u0301"]), max_size=60
)


@_BOTH
@given(text=_TEXT)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_any_text_makes_the_round_trip(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.end_of_text not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@_BOTH
@given(text=_TEXT)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_a_stream_gives_whole_characters_only(tokenizer: TextTokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert decoder.finish() == ""
    assert "".join(pieces) == text


def test_a_stream_replaces_what_is_no_character() -> None:
    decoder = StreamDecoder(_BYTES)
    pieces = [decoder.push(token) for token in (0x61, 0xC3, 0x62, 0xF0, 0x9F)]
    assert pieces == ["a", "", "\ufffdb", "", ""]
    assert decoder.finish() == "\ufffd"


@_BOTH
def test_a_batch_equals_its_texts(tokenizer: TextTokenizer) -> None:
    texts = ["", "one", _SAMPLE, "\u4e2d\u6587"]
    batch = tokenizer.encode_batch(texts)
    assert [row.tolist() for row in batch] == [tokenizer.encode(text) for text in texts]
    assert all(row.dtype == np.int64 for row in batch)


def test_the_name_of_end_of_text_inside_a_document_is_text() -> None:
    ids = _BPE.encode("a<|endoftext|>b")
    assert _BPE.end_of_text not in ids
    assert _BPE.decode(ids) == "a<|endoftext|>b"


@_BOTH
def test_end_of_text_is_the_last_id_and_stands_for_no_bytes(tokenizer: TextTokenizer) -> None:
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes()[tokenizer.end_of_text] == 0
    assert tokenizer.token_bytes()[:-1].min() == 1
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


def test_a_line_end_and_its_indent_are_one_token() -> None:
    assert len(_BPE.encode("):\n        ")) == 1
    assert len(_BPE.encode(".first")) == 1


def test_the_smallest_bpe_has_bytes_and_end_of_text_only() -> None:
    tokenizer = train_bpe([_SAMPLE], 257)
    assert tokenizer.vocab_size == 257
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]


def test_a_short_text_gives_fewer_ids_than_asked() -> None:
    assert 257 < train_bpe(["abab abab"], 4096).vocab_size < 300


def test_training_twice_gives_the_same_tokenizer() -> None:
    texts = [_SAMPLE[start:] for start in range(0, 200, 7)]
    assert train_bpe(texts, 300).fingerprint == train_bpe(iter(texts), 300).fingerprint
    assert train_bpe(texts, 301).fingerprint != train_bpe(texts, 300).fingerprint


@_BOTH
def test_saving_and_loading_changes_nothing(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(_SAMPLE) == tokenizer.encode(_SAMPLE)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_saved_bpe_is_read_by_hugging_face(tmp_path: Path) -> None:
    _BPE.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(_SAMPLE).ids == _BPE.encode(_SAMPLE)
    assert theirs.decode(_BPE.encode(_SAMPLE)) == _SAMPLE


def test_unicode_normalisation_of_a_foreign_tokenizer_is_left_out(tmp_path: Path) -> None:
    _BPE.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode("e\u0301")) == "e\u0301"


def _foreign(kind: str) -> str:
    """Return a tokenizer.json that cannot be used, of the named kind."""
    if kind == "word":
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"\u2581word": 0, "</s>": 1}))
        words.add_special_tokens(["</s>"])
        return str(words.to_str())
    content = json.loads(_BPE._text)
    if kind == "no end":
        content["added_tokens"] = []
    elif kind == "lower":
        content["normalizer"] = {"type": "Lowercase"}
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", r"tokenizer\.json is not JSON; give a byte-level tokenizer\.json"),
        ('{"a": 1}', r"is not a tokenizer\.json \("),
        ("[]", r"is not a tokenizer\.json \("),
        (_foreign("word"), r"has the token .*so it is not a byte-level BPE"),
        (_foreign("no end"), r"has no end-of-text token; one of <\|endoftext\|>"),
        (_foreign("lower"), r"does not give every text back exactly"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_says_why(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer_path.*" + message):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_names_the_field_and_the_remedy(tmp_path: Path) -> None:
    message = r"data\.tokenizer_path is .*none\.json, which cannot be read \(No such file.*give a"
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path / "none.json")


def test_a_binary_tokenizer_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match=r"model\.bin is not JSON"):
        load_tokenizer(tmp_path / "model.bin")


def test_a_tokenizer_survives_its_text_verbatim() -> None:
    text = _BPE._text + "\r\n"
    assert BpeTokenizer(text).fingerprint != _BPE.fingerprint
    assert BpeTokenizer(text).encode(_SAMPLE) == _BPE.encode(_SAMPLE)
