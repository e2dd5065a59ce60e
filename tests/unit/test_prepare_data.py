"""Preparing data: the cache, its safety, token files as input, and clear errors."""

import json
import logging
import re
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gatewise.parallel.errors import ConfigError, DataError
from gatewise.training.config import DataConfig, Tokenizer
from gatewise.training.data import PreparedData, open_prepared, prepare_data
from gatewise.training.indexed import TokenFileWriter

_FILES = ["manifest.json", "tokenizer.json", "train.bin", "train.idx"]
_FILES += ["validation.bin", "validation.idx"]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.txt").write_text(f"some \u00e9t\u00e9 text, number {index}\n" * 20)
    return DataConfig(
        path=str(folder), cache=str(tmp_path / "cache"), validation_every=4, sequence_length=32
    )


def _texts(prepared: PreparedData, split: str) -> list[str]:
    file = getattr(prepared, split)
    rows = [file.document(index) for index in range(file.num_documents)]
    assert all(row[-1] == prepared.tokenizer.end_of_text for row in rows)
    return [prepared.tokenizer.decode(row[:-1].tolist()) for row in rows]


def _built(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.getMessage().startswith("tokenised") for record in caplog.records)


@pytest.mark.parametrize("kind", [Tokenizer.bytes, Tokenizer.bpe])
def test_prepared_tokens_are_the_text_with_an_end_after_each_document(
    config: DataConfig, kind: Tokenizer
) -> None:
    config.tokenizer, config.vocab_size = kind, 300
    prepared = prepare_data(config)
    expected = [Path(str(config.path), f"{index}.txt").read_text() for index in range(8)]
    assert _texts(prepared, "validation") == [expected[3], expected[7]]
    assert _texts(prepared, "train") == [expected[index] for index in (0, 1, 2, 4, 5, 6)]
    assert prepared.validation_bytes == len((expected[3] + expected[7]).encode())
    assert prepared.train_bytes == 6 * len(expected[0].encode())
    assert prepared.train.tokens.dtype == np.uint16
    assert sorted(path.name for path in prepared.folder.iterdir()) == _FILES


def test_the_second_call_reads_the_cache(
    config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = prepare_data(config)
    written = (first.folder / "train.bin").stat().st_mtime_ns
    second = prepare_data(config)
    assert _built(caplog) == 1
    assert (second.folder / "train.bin").stat().st_mtime_ns == written
    assert second.fingerprint == first.fingerprint


def test_other_text_or_settings_have_another_cache_folder(config: DataConfig) -> None:
    folders = [prepare_data(config).folder]
    Path(str(config.path), "0.txt").write_text("changed\n" * 50)
    folders.append(prepare_data(config).folder)
    config.validation_every = 3
    folders.append(prepare_data(config).folder)
    config.tokenizer, config.vocab_size = Tokenizer.bpe, 280
    folders.append(prepare_data(config).folder)
    config.vocab_size = 281
    folders.append(prepare_data(config).folder)
    assert len(set(folders)) == 5


def test_ranks_open_what_the_command_prepared(config: DataConfig) -> None:
    prepared = prepare_data(config)
    opened = open_prepared(prepared.folder)
    assert opened.fingerprint == prepared.fingerprint
    assert (opened.train_bytes, opened.validation_bytes) == (
        prepared.train_bytes,
        prepared.validation_bytes,
    )
    assert opened.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    assert np.array_equal(opened.train.tokens, prepared.train.tokens)


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_made_again(
    config: DataConfig, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prepared = prepare_data(config)
    path = prepared.folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    again = prepare_data(config)
    assert _built(caplog) == 2
    assert again.fingerprint == prepared.fingerprint
    assert any(name in record.getMessage() for record in caplog.records)
    assert prepare_data(config).fingerprint == prepared.fingerprint
    assert _built(caplog) == 2


def test_a_manifest_of_another_layout_is_made_again(
    config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = prepare_data(config).folder
    for content in ("[]", "{}", '{"checksum": "x"}'):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"manifest\.json is damaged; delete the folder"):
            open_prepared(folder)
        prepare_data(config)
    assert _built(caplog) == 4


def test_two_at_once_prepare_once_and_agree(
    config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(4) as pool:
        prepared = list(pool.map(lambda _: prepare_data(config), range(4)))
    assert len({item.fingerprint for item in prepared}) == 1
    assert _built(caplog) == 1


def test_what_a_killed_process_left_is_removed(config: DataConfig) -> None:
    folder = prepare_data(config).folder
    left = folder.with_name(f"{folder.name}.tmp-1-dead")
    folder.rename(left)
    assert prepare_data(config).folder == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        folder.name,
        f"{folder.name}.lock",
    ]


def test_an_unfinished_folder_cannot_be_opened(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prepared data .*none: manifest\.json cannot be read"):
        open_prepared(tmp_path / "none")
    folder = prepare_data(config).folder
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin has 0 bytes but its index counts"):
        open_prepared(folder)


def test_a_cache_that_cannot_be_written_names_the_setting(
    config: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config.cache = str(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"data\.cache: .*cannot be written \(.*set data\.cache"):
        prepare_data(config)


def test_a_disk_that_is_full_leaves_no_half_cache(config: DataConfig) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # writing more is an OSError
    try:
        with pytest.raises(ConfigError, match=r"data\.cache: .*cannot be written \(File too large"):
            prepare_data(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in Path(str(config.cache)).iterdir()] == [".lock"]
    prepare_data(config)


def test_a_given_tokenizer_is_used(config: DataConfig) -> None:
    config.tokenizer, config.vocab_size = Tokenizer.bpe, 290
    trained = prepare_data(config)
    config.tokenizer, config.tokenizer_path = Tokenizer.bytes, str(trained.folder)
    given = prepare_data(config)
    assert given.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert given.fingerprint == trained.fingerprint
    assert given.folder != trained.folder


def _megatron_files(tmp_path: Path, documents: list[list[int]]) -> Path:
    with TokenFileWriter(tmp_path / "their_v1.5", np.dtype("<i4")) as writer:
        for document in documents:
            writer.add_document(document)
    return tmp_path / "their_v1.5"


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_every_nth_document_of_a_token_file_is_validation(
    config: DataConfig, tmp_path: Path, suffix: str
) -> None:
    documents = [[65 + index] * 20 + [256] * (index % 2) for index in range(9)]
    config.path = str(_megatron_files(tmp_path, documents)) + suffix
    prepared = prepare_data(config)
    assert _texts(prepared, "validation") == ["D" * 20, "H" * 20]
    assert _texts(prepared, "train") == [letter * 20 for letter in "ABCEFGI"]
    assert prepared.validation_bytes == 40


def test_tokens_outside_the_vocabulary_name_file_id_and_remedy(
    config: DataConfig, tmp_path: Path
) -> None:
    config.path = str(_megatron_files(tmp_path, [[1, 2], [50256]]))
    message = r"their_v1\.5\.bin holds token id 50256, but .* 0 to 256; set data\.tokenizer_path"
    with pytest.raises(DataError, match=message):
        prepare_data(config)
    config.path = str(_megatron_files(tmp_path, [[1, -2]]))
    with pytest.raises(DataError, match=r"holds token id -2"):
        prepare_data(config)


def test_a_token_file_needs_a_given_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    config.path = str(_megatron_files(tmp_path, [[1, 2]]))
    config.tokenizer = Tokenizer.bpe
    with pytest.raises(ConfigError, match=r"no BPE can be trained; set data\.tokenizer_path"):
        prepare_data(config)


def test_half_a_token_file_is_named(config: DataConfig, tmp_path: Path) -> None:
    prefix = _megatron_files(tmp_path, [[1, 2]])
    Path(f"{prefix}.bin").unlink()
    for path in (str(prefix), f"{prefix}.bin"):
        config.path = path
        with pytest.raises(DataError, match=r"their_v1\.5\.bin cannot be read .*needs both"):
            prepare_data(config)


def test_splits_that_are_too_short_name_the_setting(config: DataConfig) -> None:
    config.sequence_length = 1 << 20
    message = r"data\.path=.*the training split has \d+ tokens.*lower data\.sequence_length"
    with pytest.raises(DataError, match=message):
        prepare_data(config)
    config.sequence_length = 32
    rows = Path(str(config.path), "rows.jsonl")
    rows.write_text('{"text": "only one line, but long enough for a sequence of tokens"}\n')
    config.path = str(rows)
    message = r"validation split is empty, because data\.validation_every is 4 and there are 1 doc"
    with pytest.raises(DataError, match=message):
        prepare_data(config)


def test_default_cache_is_in_the_home_folder(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    config.cache = None
    assert prepare_data(config).folder.parent == tmp_path / "home" / ".cache" / "gatewise"

    def no_home() -> Any:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match=r"no home folder; set data\.cache to a folder"):
        prepare_data(config)


def test_the_manifest_counts_tokens_and_bytes(config: DataConfig) -> None:
    prepared = prepare_data(config)
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["train_tokens"] == len(prepared.train)
    assert manifest["validation_tokens"] == len(prepared.validation)
    assert manifest["validation_bytes"] == prepared.validation_bytes
    assert re.fullmatch(r"[0-9a-f]{40}", prepared.folder.name)


def test_a_moved_cache_folder_still_opens(config: DataConfig, tmp_path: Path) -> None:
    prepared = prepare_data(config)
    shutil.copytree(prepared.folder, tmp_path / "elsewhere")
    assert open_prepared(tmp_path / "elsewhere").fingerprint == prepared.fingerprint
