"""Blends of token files: shares, order, resumption, and what is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import LENGTH, make_trainer, tiny

from gatewise.conf.compose import load_train_config
from gatewise.parallel.errors import ConfigError, DataError
from gatewise.training.blend import BlendedOrder, BlendPart, parse_blend
from gatewise.training.config import DataConfig
from gatewise.training.data import PreparedData, prepare_data
from gatewise.training.indexed import TokenFileWriter

PARTS = (BlendPart(4000, 0.6), BlendPart(900, 0.3), BlendPart(2500, 0.1))


def write(prefix: Path, letter: str, documents: int, length: int = 40) -> str:
    with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
        for _ in range(documents):
            writer.add_document([ord(letter)] * length + [256])
    return str(prefix)


def megatrons_helpers() -> Any:
    """Load the compiled helpers alone: importing megatron-core takes many seconds."""
    spec = importlib.util.find_spec("megatron")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for f in folders for path in Path(f).glob("core/datasets/helpers_cpp*.so")]
    if not found:
        pytest.skip("megatron-core is not installed")
    own = importlib.util.spec_from_file_location("helpers_cpp", found[0])
    assert own is not None
    assert own.loader is not None
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return module


@pytest.fixture
def blended(tmp_path: Path) -> DataConfig:
    a, b = write(tmp_path / "a", "A", 40), write(tmp_path / "b", "B", 20)
    return DataConfig(blend=f"3 {a} 1 '{b}'", cache=str(tmp_path / "cache"), sequence_length=LENGTH)


@pytest.fixture
def data(blended: DataConfig) -> PreparedData:
    return prepare_data(blended)


def test_shares_are_kept_at_every_length_also_past_the_pattern() -> None:
    order = BlendedOrder(PARTS, 16, seed=1)
    part_B, number_B = order.sources(range(30_000))
    for count in (10, 100, 1000, 4096, 4097, 12_345, 30_000):
        found = np.bincount(part_B[:count], minlength=3)
        assert np.abs(found - count * np.array([0.6, 0.3, 0.1])).max() <= 5
    for part in range(3):  # no sample of a part is passed over or comes twice
        assert np.array_equal(number_B[part_B == part], np.arange((part_B == part).sum()))


def test_a_sample_comes_whole_from_its_part_and_is_the_same_in_any_batch() -> None:
    order = BlendedOrder(PARTS, 16, seed=1)
    starts_B = order.starts(range(5000))
    part_B, _ = order.sources(range(5000))
    first_P = np.array([0, 4000, 4900])
    last_P = np.array([4000, 4900, 7400])
    assert (starts_B >= first_P[part_B]).all()
    assert (starts_B + 17 <= last_P[part_B]).all()
    assert order.starts([4321, 17]).tolist() == [starts_B[4321], starts_B[17]]
    assert BlendedOrder(PARTS, 16, seed=2).starts(range(99)).tolist() != starts_B[:99].tolist()


def test_the_pattern_is_megatrons() -> None:
    helpers = megatrons_helpers()
    part_B = np.zeros(3000, np.int16)
    number_B = np.zeros(3000, np.int64)
    weights = np.array([0.6, 0.3, 0.1])
    helpers.build_blending_indices(part_B, number_B, weights, 3, 3000, False)
    mine = BlendedOrder(PARTS, 16, seed=1).sources(range(3000))
    assert np.array_equal(mine[0], part_B)
    assert np.array_equal(mine[1], number_B)


def test_a_blend_trains_on_its_shares_and_validates_on_all(
    data: PreparedData, tmp_path: Path
) -> None:
    assert [round(part.weight, 3) for part in data.blend] == [0.75, 0.25]
    assert [part.tokens for part in data.blend] == [36 * 41, 18 * 41]
    assert len(data.validation) == 6 * 41
    trainer, _ = make_trainer(tiny(4), data, tmp_path)
    letters = []
    for _ in range(4):
        (batch_BS,), _ = trainer._read_micro_batches()
        letters += [chr(int(row[row != 256][0])) for row in batch_BS]
        trainer.run_step()
    trainer.close()
    assert letters.count("A") == 24
    assert letters.count("B") == 8


def test_other_shares_are_another_preparation(data: PreparedData, blended: DataConfig) -> None:
    assert blended.blend is not None
    blended.blend = "1" + blended.blend[1:]
    other = prepare_data(blended)
    assert other.folder != data.folder
    assert [part.weight for part in other.blend] == [0.5, 0.5]
    assert prepare_data(blended).blend == other.blend  # from the cache


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.7", "must alternate weights and prefixes"),
        ("0.7 a b", "must alternate"),
        ("0.7 'a", "must alternate"),
        ("a 0.7", "'a' where the weight of 0.7 should stand"),
        ("0 a", "a number above 0"),
        ("nan a", "a number above 0"),
    ],
)
def test_a_text_that_is_no_blend_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_blend(text)


def test_missing_and_short_files_are_named(blended: DataConfig, tmp_path: Path) -> None:
    good = blended.blend
    blended.blend = f"{good} 1 {tmp_path / 'nothing'}"
    with pytest.raises(DataError, match=r"data.blend names .*nothing, but there is no"):
        prepare_data(blended)
    blended.blend = f"{good} 1 {write(tmp_path / 'short', 'C', 1, length=5)}"
    with pytest.raises(DataError, match="one sequence needs"):
        prepare_data(blended)
    with pytest.raises(ConfigError, match=r"data.path and data.blend are both set"):
        DataConfig(path="a", blend=good)


def test_the_command_line_takes_megatrons_text() -> None:
    config = load_train_config(["data.blend='0.7 shop/code 0.3 shop/talk'"])
    assert config.data.blend is not None
    assert parse_blend(config.data.blend) == [(0.7, "shop/code"), (0.3, "shop/talk")]
