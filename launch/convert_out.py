"""`gatewise convert to_hf`: a checkpoint as a folder that transformers loads."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.convert_in import KEPT
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch

__all__ = ["ConvertOutConfig", "OutputType", "hand_over", "run", "usage"]


class OutputType(Enum):
    """Type of the written tensors."""

    auto = None  # as they came; fp32 of a model that was trained here
    fp32 = "F32"
    bf16 = "BF16"
    fp16 = "F16"


@dataclass(kw_only=True, slots=True)
class ConvertOutConfig:
    """Settings of the command."""

    checkpoint: str | None = None  # a run's folder, its checkpoints folder or one step
    out: str | None = None  # the folder to make
    dtype: OutputType = OutputType.auto  # auto: as they came, fp32 of what was trained here
    shard_gb: float = 5.0  # a file holds at most so much, but at least one tensor
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not self.shard_gb > 0:
            raise ConfigError(f"shard_gb is {self.shard_gb}; it must be above 0")


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    del arguments
    return usage_text(
        "convert to_hf checkpoint=PATH out=FOLDER",
        "Write a checkpoint for transformers. State that its layout has no place for goes into\n"
        "gatewise.safetensors beside it, is named, and is read back by convert from_hf.",
        field_table(ConvertOutConfig),
    )


def run(arguments: Sequence[str]) -> int:
    """Convert as the command line says and return the exit code."""
    config = load_settings(ConvertOutConfig, arguments)
    return hand_over(
        "to_hf",
        config.checkpoint,
        config.out,
        config.run.dir,
        lambda stored, out: _convert(config, stored, out),
        if_compressed="use `gatewise export`",
    )


def hand_over(
    way: str,
    checkpoint: str | None,
    out: str | None,
    directory: str | None,
    body: "Callable[[Stored, Path], Mapping[str, Any]]",
    *,
    if_compressed: str,
) -> int:
    """Open a checkpoint and convert it; return the exit code.

    Args:
        way: name of the conversion.
        checkpoint: a run's folder, its checkpoints folder or one step.
        out: the folder to make.
        directory: of the run; None chooses one.
        body: converts the checkpoint into the folder.
        if_compressed: what to do with a compressed checkpoint instead.
    """
    if checkpoint is None or out is None:
        name = "checkpoint" if checkpoint is None else "out"
        raise ConfigError(f"{name} is not set; give checkpoint=PATH and out=FOLDER")
    from gatewise.launch.restore import open_checkpoint

    stored = open_checkpoint(checkpoint)
    if stored.is_compressed:
        raise ConfigError(f"checkpoint is {checkpoint!r}, which is compressed; {if_compressed}")
    folder = RunFolder.choose(directory, "convert")
    folder.write_environment(sys.argv)
    target = Path(out).expanduser().absolute()
    return run_session(f"convert {way}", folder, lambda: body(stored, target))


def _convert(config: ConvertOutConfig, stored: "Stored", out: Path) -> Mapping[str, Any]:
    from gatewise.launch.restore import restore_tokenizer
    from gatewise.training.interop.hand_out import hand_out

    own = stored.path.parent.parent
    end_of_text = restore_tokenizer(stored, fits=False).end_of_text
    written = hand_out(
        stored.path,
        stored.config,
        stored.meta,
        folder=out,
        settings=stored.meta["config"],
        extras=_extras(own),
        end_of_text=end_of_text,
        dtype=config.dtype.value,
        shard_bytes=int(config.shard_gb * 2**30),
        progress=lambda done, total: print(f"convert {done}/{total}", flush=True),
    )
    print(
        f"{written.architecture}: {written.tensors} tensors as {written.dtype}, "
        f"{written.payload_bytes:,} bytes in {out}"
    )
    if written.sidecar:
        print(
            f"gatewise.safetensors: {len(written.sidecar)} tensors that the layout has no place "
            f"for, such as {written.sidecar[0]}"
        )
    for difference in written.differences:
        print(f"transformers computes something else: {difference}; convert from_hf restores it")
    return {
        "checkpoint": str(stored.path),
        "converted": str(out),
        "architecture": written.architecture,
        "tensors": written.tensors,
        "files": written.files,
        "payload_bytes": written.payload_bytes,
        "dtype": written.dtype,
        "sidecar": list(written.sidecar),
        "differences": list(written.differences),
    }


def _extras(run_folder: Path) -> dict[str, str | Path]:
    """Return the files that go along: what came with the model, and the tokenizer."""
    kept = run_folder / KEPT
    extras: dict[str, str | Path] = {}
    if kept.is_dir():
        extras |= {file.name: file for file in sorted(kept.iterdir()) if file.is_file()}
    file = run_folder / "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return extras
    if isinstance(content, dict) and "model" in content:  # bytes need no file
        extras["tokenizer.json"] = file
        plain = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        extras.setdefault("tokenizer_config.json", json.dumps(plain, indent=2) + "\n")
    return extras
