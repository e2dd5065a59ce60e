"""`gatewise export`: a compressed model in the file format of another program."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch

__all__ = ["ExportConfig", "ExportFormat", "run", "usage"]


class ExportFormat(Enum):
    """A file format."""

    hf = "hf"  # transformers: weights dequantised to bf16
    gptq = "gptq"  # version 1: zero points less one
    gptq_v2 = "gptq_v2"
    compressed_tensors = "compressed_tensors"  # pack-quantized


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Settings of the command."""

    checkpoint: str | None = None  # run folder of `gatewise compress`
    format: ExportFormat = ExportFormat.hf
    run: RunConfig = field(default_factory=RunConfig)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    del arguments
    return usage_text(
        "export checkpoint=PATH format=NAME",
        "Write a compressed model for another program, into a folder of the run's folder that has\n"
        "the format's name. What the format cannot say is refused with the reason.",
        field_table(ExportConfig),
    )


def run(arguments: Sequence[str]) -> int:
    """Export as the command line says and return the exit code."""
    config = load_settings(ExportConfig, arguments)
    if config.checkpoint is None:
        raise ConfigError("checkpoint is not set; give checkpoint=PATH, a run of compress")
    from gatewise.launch.restore import open_checkpoint

    stored = open_checkpoint(config.checkpoint)
    if not stored.is_compressed:
        raise ConfigError(
            f"checkpoint is {config.checkpoint!r}, which is not compressed; export takes what "
            "`gatewise compress` made"
        )
    folder = RunFolder.choose(config.run.dir, "export")
    folder.write_environment(sys.argv)
    name = config.format.name
    return run_session("export", folder, lambda: _export(stored, name, folder.path))


def _export(stored: "Stored", name: str, folder: Path) -> Mapping[str, Any]:
    from gatewise.compression.export.write import export_artefact
    from gatewise.compression.pruning import read_pruning
    from gatewise.launch.restore import restore_tokenizer

    target = folder / name
    record = export_artefact(
        stored.path,
        stored.config,
        int(stored.meta["vocab_size"]),
        restore_tokenizer(stored).end_of_text,
        format_name=name,
        folder=target,
        progress=lambda done, total: print(f"export {done}/{total}", flush=True),
    )
    pruned = read_pruning(stored.path) is not None
    print(
        f"{record['architecture']}: {record['tensors']} tensors, {record['payload_bytes']:,} bytes "
        f"in {target}"
    )
    if pruned:
        print("dynamic pruning stays behind: the format has no place for it")
    return {
        "checkpoint": str(stored.path),
        "format": name,
        "exported": str(target),
        "pruning_left_out": pruned,
        **record,
    }
