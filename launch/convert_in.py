"""`gatewise convert from_hf`: a folder of transformers as a run that evaluate and train take."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.conf.compose import config_from_yaml, config_to_yaml, load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.training.config import DataConfig, Precision, RunConfig, TrainConfig
from gatewise.training.tokenizer import ByteTokenizer, TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from gatewise.training.interop.source import Source  # imports torch

__all__ = ["ConvertInConfig", "adopt", "convert_folder", "run", "usage"]

KEPT = "hf"  # folder of the run for what came along beside the tensors
_COMPANIONS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_LONGEST_SEQUENCE = 1024  # of the settings that a converted model gets for text


@dataclass(kw_only=True, slots=True)
class ConvertInConfig:
    """Settings of the command."""

    source: str | None = None  # a folder with config.json and safetensors files
    tokenizer: str | None = None  # a tokenizer.json, or bytes; null: the source's own
    run: RunConfig = field(default_factory=RunConfig)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    del arguments
    return usage_text(
        "convert from_hf source=FOLDER",
        "Take in a model that transformers saved. The run's folder then is a checkpoint for\n"
        "evaluate, generate, train (checkpoint.load=), compress and convert to_hf.",
        field_table(ConvertInConfig),
    )


def run(arguments: Sequence[str]) -> int:
    """Convert as the command line says and return the exit code."""
    config = load_settings(ConvertInConfig, arguments)
    if config.source is None:
        raise ConfigError("source is not set; give source=FOLDER, a model that transformers saved")
    source = Path(config.source).expanduser()
    return adopt(
        "from_hf", config.run.dir, lambda folder: convert_folder(source, config.tokenizer, folder)
    )


def adopt(way: str, directory: str | None, body: Any) -> int:  # Any: folder to result
    """Choose a run's folder and fill it."""
    folder = RunFolder.choose(directory, "convert")
    if (folder.path / "checkpoints").exists():
        folder.release()
        raise ConfigError(
            f"run.dir is {folder.path}, which holds checkpoints already; choose another folder"
        )
    folder.write_environment(sys.argv)
    return run_session(f"convert {way}", folder, lambda: body(folder))


def convert_folder(path: Path, tokenizer: str | None, folder: RunFolder) -> Mapping[str, Any]:
    """Turn a folder of transformers into the run that `folder` owns."""
    from gatewise.training.interop.dequantise import open_folder

    source = open_folder(path)
    chosen = _choose_tokenizer(path, tokenizer)
    companions = {name: path / name for name in _COMPANIONS if (path / name).is_file()}
    return write_run(source, chosen, companions, folder)


def write_run(
    source: "Source",
    tokenizer: TextTokenizer,
    companions: Mapping[str, Path],
    folder: RunFolder,
    *,
    name: str = "converted",
) -> Mapping[str, Any]:
    """Write settings, tokenizer, companions and checkpoint of a run; the checkpoint comes last."""
    from gatewise.training.interop.read_config import read_config
    from gatewise.training.interop.sidecar import read_sidecar
    from gatewise.training.interop.take_in import take_in
    from gatewise.training.resume import to_plain

    family, model, router = read_config(source.config, str(source.path))
    record, own = read_sidecar(source.path, source.config)
    if record is not None:
        stored = json.dumps({"model": record["model"], "router": record["router"]})
        settings = config_from_yaml(stored, source=f"{source.path}/config.json")
        ours = replace(settings.model, vocab_size=model.vocab_size)
        if replace(model, capacity=ours.capacity) != ours:
            raise CheckpointError(
                f"{source.path}: config.json says one thing of the model and its key 'gatewise' "
                "another; put back the config.json that was written"
            )
        model, router = ours, settings.router
    positions = int(source.config.get("max_position_embeddings") or _LONGEST_SEQUENCE)
    data = DataConfig(sequence_length=max(2, min(positions, _LONGEST_SEQUENCE)))
    wide = all(tensor.dtype == "F32" for tensor in source.tensors.values())
    config = TrainConfig(
        name=name,
        steps=0,
        precision=Precision.fp32 if wide else Precision.auto,
        model=model,
        router=router,
        data=data,
    )
    folder.write_config(config_to_yaml(config))
    tokenizer.save(folder.path / "tokenizer.json")
    (folder.path / KEPT).mkdir(exist_ok=True)
    for companion, where in companions.items():
        shutil.copyfile(where, folder.path / KEPT / companion)
    meta = {
        **dict.fromkeys(("step", "sample", "tokens", "skipped", "skipped_in_a_row", "updates"), 0),
        "config": to_plain(config),
        "vocab_size": model.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "data": None,
        "time": time.time(),
    }
    path, account = take_in(
        source,
        family,
        model,
        router,
        own=own,
        folder=folder.path / "checkpoints",
        meta=meta,
        progress=_tell,
    )
    print(f"{family.architecture}: {account}")
    return {
        "source": str(source.path),
        "architecture": family.architecture,
        "checkpoint": str(path),
        "tensors": account.total,
        "consumed": account.consumed,
        "sidecar": account.sidecar,
        "vocab_size": model.vocab_size,
    }


def _tell(done: int, total: int) -> None:
    if done == total or done % max(1, total // 5) == 0:
        print(f"convert {done}/{total}", flush=True)


def _choose_tokenizer(path: Path, asked: str | None) -> TextTokenizer:
    """Return the tokenizer that was asked for, or the source's; say it where there is none."""
    if asked == "bytes":
        return ByteTokenizer()
    beside = path / "tokenizer.json"
    if asked is None and not beside.is_file():
        print(f"{path} has no tokenizer.json: text is taken as bytes (tokenizer=PATH names one)")
        return ByteTokenizer()
    try:
        return load_tokenizer(beside if asked is None else asked)
    except ConfigError as error:
        told = str(error).replace("data.tokenizer_path", "tokenizer")
        raise ConfigError(f"{told}, or tokenizer=bytes to do without text") from error
