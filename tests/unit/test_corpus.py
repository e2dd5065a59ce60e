"""Finding text, refusing what is no text, and the split into training and validation."""

import gzip
import importlib.metadata
import json
import logging
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.parallel.errors import ConfigError, DataError
from gatewise.training.config import DataConfig
from gatewise.training.corpus import Corpus, cut_blocks, find_corpus, standard_library_files


def _split(corpus: Corpus) -> tuple[list[str], list[str]]:
    documents = list(corpus.documents())
    return (
        [document.text for document in documents if not document.is_validation],
        [document.text for document in documents if document.is_validation],
    )


def _write_files(folder: Path, count: int) -> None:
    for index in range(count):
        path = folder / f"part{index // 4}" / f"f{index:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of file {index}\n", encoding="utf-8")


def test_default_corpus_is_the_standard_library_without_tests_and_tables() -> None:
    corpus = find_corpus(DataConfig())
    train, validation = _split(corpus)
    files = standard_library_files()
    names = [path.as_posix() for path in files]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
    assert not any("/encodings/" in name or "/pydoc_data/" in name for name in names)
    assert sum(len(text) for text in train + validation) > 3_000_000
    kept = [path for path in files if path.stat().st_size > 0]
    assert len(train) + len(validation) == len(kept)
    assert [text.encode() for text in validation] == [path.read_bytes() for path in kept[9::10]]


def test_standard_library_files_are_sorted_by_relative_path(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a.py", "test/x.py", "_sysconfigdata_x.py", "config-3/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "readme.txt").write_text("no source\n")
    found = [path.relative_to(tmp_path).as_posix() for path in standard_library_files(tmp_path)]
    assert found == ["a.py", "a/z.py", "b.py"]


def test_a_library_without_sources_asks_for_a_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.py files; set data\.path"):
        standard_library_files(tmp_path)


def test_every_nth_file_of_a_folder_is_validation(tmp_path: Path) -> None:
    _write_files(tmp_path, 12)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden").write_text("not data")
    train, validation = _split(find_corpus(DataConfig(path=str(tmp_path), validation_every=4)))
    assert validation == [f"text of file {index}\n" for index in (3, 7, 11)]
    assert len(train) == 9


def test_a_glob_takes_only_what_matches(tmp_path: Path) -> None:
    _write_files(tmp_path, 8)
    config = DataConfig(path=str(tmp_path / "**" / "f0[0-3].txt"), validation_every=2)
    train, validation = _split(find_corpus(config))
    assert len(train) + len(validation) == 4


def test_gzip_gives_the_same_documents_and_fingerprint_as_plain_text(tmp_path: Path) -> None:
    text = "".join(f"line {index}\r\n" for index in range(500))
    (tmp_path / "plain.txt").write_bytes(text.encode())
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain = find_corpus(DataConfig(path=str(tmp_path / "plain.txt")))
    packed = find_corpus(DataConfig(path=str(tmp_path / "packed.txt.gz")))
    assert _split(plain) == _split(packed)
    assert plain.fingerprint == packed.fingerprint


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines_are_documents_and_every_nth_is_validation(tmp_path: Path, suffix: str) -> None:
    rows = [json.dumps({"id": index, "body": f"document {index}\u2028"}) for index in range(6)]
    data = "\n\n".join([*rows, '{"body": ""}']).encode()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    config = DataConfig(path=str(path), text_key="body", validation_every=3)
    train, validation = _split(find_corpus(config))
    assert validation == ["document 2\u2028", "document 5\u2028"]
    assert len(train) == 4


def test_one_file_is_cut_at_line_ends_into_sixteen_kilobyte_blocks(tmp_path: Path) -> None:
    text = "".join(f"{index:07d} some text\n" for index in range(50_000))
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    corpus = find_corpus(DataConfig(path=str(path)))
    assert "".join(document.text for document in corpus.documents()) == text
    train, validation = _split(corpus)
    assert all(block.endswith("\n") for block in validation)
    assert all(16384 <= len(block) < 16384 + 18 for block in validation)
    assert 0.08 < sum(map(len, validation)) / len(text) < 0.1
    assert all(len(run) > 8 * 16384 for run in train[:-1])  # neighbours stay one document


def test_a_short_file_still_has_validation_text(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a line of text\n" * 400, encoding="utf-8")
    _, validation = _split(find_corpus(DataConfig(path=str(path))))
    assert sum(map(len, validation)) > 400


@given(
    text=st.text(st.sampled_from("ab\n\r\u00e9\U0001f600"), max_size=400),
    block_bytes=st.integers(1, 60),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_blocks_joined_are_the_text(text: str, block_bytes: int) -> None:
    blocks = list(cut_blocks(text.splitlines(keepends=True), block_bytes))
    assert "".join(blocks) == text
    assert all(len(block.encode()) >= block_bytes for block in blocks[:-1])
    assert all(len(block.encode()) < block_bytes + 4 * block_bytes for block in blocks)


def test_files_that_are_not_text_are_left_out_of_a_folder_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_files(tmp_path, 4)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "old.txt").write_bytes("na\u00efve".encode("latin1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        train, validation = _split(find_corpus(DataConfig(path=str(tmp_path), validation_every=2)))
    assert len(train) == len(validation) == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert "left out 2 of 7 files that are not text" in message
    assert "image.png is binary (a NUL byte at offset 4)" in message


def test_fingerprint_follows_content_and_split_but_not_the_place(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        _write_files(tmp_path / name, 6)
    (tmp_path / "three" / "part0" / "f00.txt").write_text("other text\n")
    prints = {
        name: find_corpus(DataConfig(path=str(tmp_path / name), validation_every=3)).fingerprint
        for name in ("one", "two", "three")
    }
    again = find_corpus(DataConfig(path=str(tmp_path / "one"), validation_every=2)).fingerprint
    assert prints["one"] == prints["two"]
    assert len({prints["one"], prints["three"], again}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt is empty; give a file with text"),
        ("weights.pt", b"ab\0c", r"weights\.pt is binary \(a NUL byte at offset 2\); give UTF-8"),
        ("latin.txt", b"na\xefve", r"latin\.txt is not UTF-8 \(byte 2\); convert it.*iconv"),
        ("cut.txt", "a\u00e9".encode()[:-1], r"cut\.txt is not UTF-8 \(byte 1\)"),
        (
            "torn.gz",
            gzip.compress(b"x" * 9999, mtime=0)[:-9],
            r"torn\.gz is not a complete gzip file",
        ),
        ("plain.gz", b"no gzip", r"plain\.gz is not a complete gzip file"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', r"bad\.jsonl, line 2 is not JSON"),
        ("key.jsonl", b'{"body": "a", "id": 1}\n', r"data\.text_key=text; it has: body, id; set"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl, line 1 has no text under .* it has: list"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(find_corpus(DataConfig(path=str(tmp_path / name))).documents())


def test_a_character_across_two_reads_is_text(tmp_path: Path) -> None:
    text = "x" * ((1 << 20) - 1) + "\u00e9\n"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(text.encode()[:-2] + b"z\n")
    corpus = find_corpus(DataConfig(path=str(tmp_path / "long.txt")))
    assert "".join(document.text for document in corpus.documents()) == text
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 1048575\)"):
        find_corpus(DataConfig(path=str(tmp_path / "bad.txt")))


def test_a_missing_path_says_what_can_be_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.*does not exist and matches no file; give a"):
        find_corpus(DataConfig(path=str(tmp_path / "nothing")))
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"void, which has no files in it"):
        find_corpus(DataConfig(path=str(tmp_path / "void")))
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        find_corpus(DataConfig(path=str(tmp_path / ("x" * 300))))


def test_a_folder_without_any_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin1").write_bytes(b"\0")
    (tmp_path / "b.bin1").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"a\.bin1 is binary .*none of the 2 files holds text"):
        find_corpus(DataConfig(path=str(tmp_path)))


def test_a_file_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.txt").write_text("text\n")

    def refuse(path: Path, *_args: object) -> None:  # root may read everything, so chmod is no test
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"secret\.txt cannot be read \(Permission denied\); check"):
        find_corpus(DataConfig(path=str(tmp_path / "secret.txt")))


def test_a_dataset_without_the_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"data\.hf is a/b, .*pip install datasets"):
        find_corpus(DataConfig(hf="a/b"))


@pytest.mark.filterwarnings("default")
def test_rows_of_a_dataset_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = [json.dumps({"text": f"row {index}", "id": index}) for index in range(6)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(rows))
    config = DataConfig(hf=str(tmp_path / "set"), validation_every=3)
    assert _split(find_corpus(config))[1] == ["row 2", "row 5"]
    with pytest.raises(DataError, match=r"no column data\.text_key=body; it has: .*text"):
        find_corpus(DataConfig(hf=str(tmp_path / "set"), text_key="body"))
    (tmp_path / "set" / "validation.jsonl").write_text('{"text": "held out", "id": 9}')
    train, validation = _split(find_corpus(config))
    assert (len(train), validation) == (6, ["held out"])
    few = DataConfig(hf=str(tmp_path / "set"), hf_rows=4)
    assert _split(find_corpus(few))[0] == ["row 0", "row 1", "row 2", "row 3"]
    with pytest.raises(DataError, match=r"data\.hf=no/such cannot be loaded"):
        find_corpus(DataConfig(hf="no/such"))


@pytest.mark.filterwarnings("default")
def test_a_dataset_is_the_same_text_from_any_kind_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"text": ["a", "", "b", None, "c"], "n": [1, 2, 3, 4, 5]})
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    found = [
        find_corpus(DataConfig(hf=str(tmp_path / kind), validation_every=2))
        for kind in ("parquet", "saved")
    ]
    assert found[0].fingerprint == found[1].fingerprint
    assert [_split(corpus) for corpus in found] == [(["a", "c"], ["b"])] * 2
    with pytest.raises(DataError, match=r"row 1 has int under data\.text_key=n, not text"):
        find_corpus(DataConfig(hf=str(tmp_path / "parquet"), text_key="n"))


def test_a_dataset_of_an_old_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.18.3")
    with pytest.raises(ConfigError, match=r"datasets is 1\.18\.3, which is too old"):
        find_corpus(DataConfig(hf="a/b"))
