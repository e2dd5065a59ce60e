"""`gatewise convert from_megatron`: a distributed checkpoint of Megatron's as a run of ours."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewise.conf.compose import config_to_yaml, load_train_config
from gatewise.conf.fields import field_table
from gatewise.launch.convert_in import adopt
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import Tokenizer, TrainConfig
from gatewise.training.tokenizer import ByteTokenizer, TextTokenizer, load_tokenizer

__all__ = ["run", "split_source", "usage"]

_SOURCE = "source="


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    _, rest = split_source(arguments)
    return usage_text(
        "convert from_megatron source=FOLDER [settings of its model]",
        "Take in a torch_dist checkpoint of a GPT model. Its sizes are not read from it: give\n"
        "model.*, router.* and data.tokenizer_path as for training; what differs is named.",
        field_table(load_train_config(rest)),
    )


def run(arguments: Sequence[str]) -> int:
    """Convert as the command line says and return the exit code."""
    source, rest = split_source(arguments)
    if source is None:
        raise ConfigError("source is not set; give source=FOLDER, a checkpoint of Megatron's")
    config = load_train_config(rest)
    path = Path(source).expanduser()
    return adopt("from_megatron", config.run.dir, lambda folder: _convert(path, config, folder))


def _convert(source: Path, config: TrainConfig, folder: RunFolder) -> Mapping[str, Any]:
    from gatewise.training.megatron.convert import take_in
    from gatewise.training.resume import to_plain

    tokenizer = _tokenizer(config)
    rows = config.embedding_rows(tokenizer.vocab_size)
    meta = {
        **dict.fromkeys(("step", "sample", "tokens", "skipped", "skipped_in_a_row", "updates"), 0),
        "config": to_plain(config),
        "vocab_size": rows,
        "tokenizer": tokenizer.fingerprint,
        "data": None,
        "time": time.time(),
    }
    checkpoints = folder.path / "checkpoints"
    path = take_in(source, config.model, config.router, rows, folder=checkpoints, meta=meta)
    folder.write_config(config_to_yaml(config))
    tokenizer.save(folder.path / "tokenizer.json")
    return {"source": str(source), "checkpoint": str(path), "vocab_size": rows}


def _tokenizer(config: TrainConfig) -> TextTokenizer:
    if config.data.tokenizer_path is not None:
        return load_tokenizer(config.data.tokenizer_path)
    if config.data.tokenizer is Tokenizer.bytes:
        return ByteTokenizer()
    raise ConfigError(
        "data.tokenizer is bpe and data.tokenizer_path is not set; name the tokenizer.json that "
        "the model was trained with"
    )


def split_source(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Part `source=` from the settings of the model."""
    found = [text.removeprefix(_SOURCE) for text in arguments if text.startswith(_SOURCE)]
    rest = [text for text in arguments if not text.startswith(_SOURCE)]
    return (found[-1] if found else None), rest
