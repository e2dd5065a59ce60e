"""Rows of a Hugging Face dataset as documents: streamed, from the hub or from a local folder.

Rows pass one by one and never lie in memory or in the package's own cache as a whole. They are
tokenised into our token files like any other text (`data.py`), so that the order of training, a
restart and the number of ranks are what they are for files. The rows are read twice: for the hash
that names the token files, and to be tokenised.
"""

import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gatewise.parallel.errors import ConfigError, DataError
from gatewise.training.config import DataConfig

__all__ = ["Rows", "open_rows"]

Rows = Callable[[], Iterator[str]]
_OLDEST = 3  # major version of the package


def open_rows(config: DataConfig) -> tuple[Rows, Rows | None]:
    """Return readers of the texts for training and, where the dataset has some, for validation.

    Args:
        config: `hf` is `owner/name`, `owner/name:configuration`, or a folder with parquet, JSON
            Lines, CSV or text files, or one that the package saved; of the training split the
            first `hf_rows` count.

    Raises:
        ConfigError: if the package is not installed, or too old.
        DataError: if the dataset cannot be loaded, or has no such split or column.
    """
    assert config.hf is not None
    splits = _load(config.hf)
    if "train" not in splits:
        raise DataError(
            f"data.hf={config.hf} has no split named train; it has: {', '.join(splits)}"
        )
    held_out = splits.get("validation")
    _check_column(config, splits["train"])
    return (
        lambda: _texts(config, splits["train"], config.hf_rows),
        None if held_out is None else lambda: _texts(config, held_out, None),
    )


def _texts(config: DataConfig, rows: Any, limit: int | None) -> Iterator[str]:  # Any: a dataset
    """Yield the texts that are not empty."""
    number = 0
    try:
        for number, row in enumerate(itertools.islice(rows, limit), 1):
            text = row.get(config.text_key)
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"data.hf={config.hf}, row {number} has {type(text).__name__} under "
                    f"data.text_key={config.text_key}, not text; choose another column"
                )
            if text:
                yield text
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, most of them for no network
        raise DataError(
            f"data.hf={config.hf} broke off after {number} rows ({_first_line(error)}); start "
            "again, or use data.hf_rows to take fewer"
        ) from error


def _check_column(config: DataConfig, rows: Any) -> None:  # Any: a dataset
    names = rows.column_names
    if names is None:  # of a stream without a stated schema, the first row tells
        try:
            names = list(next(iter(rows), {}))
        except Exception as error:  # as above
            raise _cannot_load(str(config.hf), error) from error
    if config.text_key not in names:
        raise DataError(
            f"data.hf={config.hf} has no column data.text_key={config.text_key}; "
            f"it has: {', '.join(names) or 'no rows'}; set data.text_key to one of them"
        )


def _load(name: str) -> Mapping[str, Any]:  # Any: datasets has no types of its own here
    """Open all splits of a dataset without reading their rows."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.hf is {name}, which needs the package datasets; "
            "install it with: pip install datasets"
        ) from error
    version = importlib.metadata.version("datasets")
    if int(version.partition(".")[0]) < _OLDEST:
        raise ConfigError(
            f"data.hf is {name}, but the package datasets is {version}, which is too old; "
            f"install a newer one with: pip install -U 'datasets>={_OLDEST}'"
        )
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            return saved if isinstance(saved, Mapping) else {"train": saved}
        path, configuration = str(folder), None
        if not folder.is_dir():
            path, _, configuration = name.partition(":")
        splits: Mapping[str, Any] = datasets.load_dataset(
            path, configuration or None, streaming=True
        )
    except Exception as error:  # the library raises many kinds, most of them for no network
        raise _cannot_load(name, error) from error
    return splits


def _cannot_load(name: str, error: Exception) -> DataError:
    return DataError(
        f"data.hf={name} cannot be loaded ({_first_line(error)}); check the name and the network, "
        "or use data.path"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
