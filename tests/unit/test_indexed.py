"""Token files: our writer and reader, and megatron-core's where it is installed."""

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.parallel.errors import DataError
from gatewise.training.indexed import TokenFile, TokenFileWriter, token_dtype

_DOCUMENTS = [[5, 6, 7], [], [65535], [0, 1]]


def _write(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> TokenFile:
    with TokenFileWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return TokenFile(prefix)


def _megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed"
        )


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=9),
    dtype=st.sampled_from(["<u2", "<i4", "<i8"]),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_documents_make_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str
) -> None:
    file = _write(tmp_path_factory.mktemp("tokens") / "corpus_v1.5", documents, dtype)
    assert file.num_documents == len(documents)
    assert [file.document(index).tolist() for index in range(len(documents))] == documents
    assert file.tokens.tolist() == [token for document in documents for token in document]
    assert file.tokens.dtype == np.dtype(dtype)
    assert len(file) == sum(map(len, documents))


def test_the_bytes_on_disk_are_megatrons_layout(tmp_path: Path) -> None:
    _write(tmp_path / "t", _DOCUMENTS)
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<6H", 5, 6, 7, 65535, 0, 1)
    assert (tmp_path / "t.idx").read_bytes() == (
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, 4, 5)
        + struct.pack("<4i", 3, 0, 1, 2)
        + struct.pack("<4q", 0, 6, 6, 8)
        + struct.pack("<5q", 0, 1, 2, 3, 4)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx"]


def test_tokens_are_mapped_and_read_only(tmp_path: Path) -> None:
    file = _write(tmp_path / "t", _DOCUMENTS)
    assert isinstance(file.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 1


def test_small_vocabularies_take_two_bytes_a_token() -> None:
    assert token_dtype(257) == token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<i4")


def test_megatron_reads_our_files(tmp_path: Path) -> None:
    theirs = _megatron()
    _write(tmp_path / "t", _DOCUMENTS)
    dataset = theirs.IndexedDataset(str(tmp_path / "t"))
    assert [row.tolist() for row in dataset[:]] == _DOCUMENTS
    assert [dataset[index].tolist() for index in range(4)] == _DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.index.dtype == np.uint16


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8, np.int64])
def test_we_read_the_files_of_megatrons_builder(tmp_path: Path, dtype: type) -> None:
    builder = _megatron().IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    builder.add_item(torch.tensor([1, 2, 3]))  # a document of two sequences
    builder.add_item(torch.tensor([4]))
    builder.end_document()
    builder.add_document(np.array([9, 8, 7]), [1, 2])
    builder.finalize(str(tmp_path / "m.idx"))
    file = TokenFile(tmp_path / "m")
    assert [file.document(index).tolist() for index in range(2)] == [[1, 2, 3, 4], [9, 8, 7]]
    assert file.tokens.dtype == np.dtype(dtype)


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(struct.pack("<4i", 1, 2, 3, 4))
    (tmp_path / "m.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ3i3q3q", 1, 4, 3, 3, 1, 2, 1, 0, 4, 12, 0, 2, 3)
    )
    file = TokenFile(tmp_path / "m")
    assert [file.document(index).tolist() for index in range(2)] == [[1, 2, 3], [4]]


def test_an_exception_while_writing_leaves_the_old_files(tmp_path: Path) -> None:
    _write(tmp_path / "t", [[1, 2]])

    def fail() -> None:
        with TokenFileWriter(tmp_path / "t", np.dtype("<u2")) as writer:
            writer.add_document([3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert TokenFile(tmp_path / "t").tokens.tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx"]


@pytest.mark.parametrize("tokens", [[-1], [65536], [[1, 2]]])
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, tokens: list[Any]) -> None:
    with (
        pytest.raises(ValueError, match=r"a document has (token ids|shape)"),
        TokenFileWriter(tmp_path / "t", np.dtype("<u2")) as writer,
    ):
        writer.add_document(tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_is_no_integer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype is float32; a token file holds"):
        TokenFileWriter(tmp_path / "t", np.dtype("float32"))


def _replace(path: Path, at: int, data: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:at] + data + content[at + len(data) :])


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"PK\3\4", r"t\.idx is not a Megatron index"),
        (9, b"\2", r"t\.idx has version 2; only version 1"),
        (17, b"\6", r"t\.idx has token type code 6; integers are"),
        (18, b"\3", r"t\.idx has 122 bytes and should have 110; it is damaged or holds multi"),
        (34, b"\2", r"t\.bin has 12 bytes but its index counts 5 tokens of 2 bytes"),
        (34, struct.pack("<2i", 4, -1), r"t\.idx: a sequence has a negative length"),
        (50, b"\2", r"t\.idx: the sequences do not follow one another"),
        (82, b"\1", r"t\.idx: the documents do not cover all sequences"),
        (90, b"\5", r"t\.idx: the documents do not cover all sequences"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, at: int, data: bytes, message: str) -> None:
    _write(tmp_path / "t", _DOCUMENTS)
    _replace(tmp_path / "t.idx", at, data)
    with pytest.raises(DataError, match=message):
        TokenFile(tmp_path / "t")


def test_a_short_or_missing_file_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "t", _DOCUMENTS)
    (tmp_path / "t.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"t\.bin has 2 bytes but its index counts 6 tokens"):
        TokenFile(tmp_path / "t")
    (tmp_path / "t.bin").unlink()
    with pytest.raises(DataError, match=r"t\.bin cannot be read .*needs both prefix\.bin and"):
        TokenFile(tmp_path / "t")
    (tmp_path / "t.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(DataError, match=r"t\.idx is not a Megatron index"):
        TokenFile(tmp_path / "t")
