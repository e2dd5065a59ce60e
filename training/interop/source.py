"""Where tensors come from: a folder of safetensors files, looked through before any is read."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gatewise.parallel.errors import CheckpointError

__all__ = ["FolderSource", "Source", "StoredTensor", "check_tensors", "read_json_file"]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100 << 20
_SHOWN = 3  # names of each kind in a message


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it, such as BF16
    file: str


class Source(Protocol):
    """A model of another program, its tensors under transformers' names."""

    path: Path
    config: dict[str, Any]  # as in config.json; Any: JSON
    tensors: Mapping[str, StoredTensor]

    def read(self, name: str) -> Tensor:
        """Return one tensor in its own type."""
        ...


class FolderSource:
    """A folder that transformers wrote: config.json and safetensors files.

    Args:
        path: of the folder.

    Raises:
        CheckpointError: naming what is absent, damaged or of a form that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(
                f"source is {path}, which is no folder; give one with config.json"
            )
        self.config: dict[str, Any] = read_json_file(path / "config.json")
        named = self._named_files()
        found: dict[str, StoredTensor] = {}
        for file in sorted(set(named.values())):
            found |= _read_header(path / file)
        self.tensors: Mapping[str, StoredTensor] = found
        lost = sorted(name for name, file in named.items() if self._file_of(name) != file)
        lost += sorted(name for name in self.tensors if name not in named and len(named))
        if lost and (path / INDEX).exists():
            raise CheckpointError(
                f"{path}: {INDEX} and the files disagree on {_some(lost)}; the folder is incomplete"
            )

    def read(self, name: str) -> Tensor:
        """Return one tensor in its own type."""
        from safetensors import safe_open

        with safe_open(self.path / self.tensors[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def _file_of(self, name: str) -> str | None:
        found = self.tensors.get(name)
        return None if found is None else found.file

    def _named_files(self) -> dict[str, str]:
        """Return by tensor the file that holds it, from the index, or of the only file."""
        index = self.path / INDEX
        if index.exists():
            named: dict[str, str] = read_json_file(index).get("weight_map") or {}
            absent = sorted({file for file in named.values() if not (self.path / file).is_file()})
            if absent or not named:
                raise CheckpointError(
                    f"{self.path}: {INDEX} names {_some(absent) or 'no file'}, which is absent; "
                    "fetch the missing files"
                )
            return named
        if (self.path / _SINGLE).is_file():
            return dict.fromkeys(_read_header(self.path / _SINGLE), _SINGLE)
        old = sorted(file.name for file in self.path.glob("*.bin"))
        if old:
            raise CheckpointError(
                f"{self.path} holds {old[0]}, the form of old versions; save the model again with "
                "a present transformers, which writes safetensors"
            )
        raise CheckpointError(f"{self.path} has neither {_SINGLE} nor {INDEX}")


def read_json_file(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is absent or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it is no JSON object")
    return content


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor], source: str
) -> None:
    """Compare names, shapes and types both ways.

    Args:
        expected: what the settings call for.
        found: what there is.
        source: for messages.

    Raises:
        CheckpointError: one line with the first names of each kind of difference.
    """
    problems = []
    missing = [name for name in expected if name not in found]
    if missing:
        problems.append(f"{_count(missing)} missing ({_some(missing)})")
    extra = [name for name in found if name not in expected]
    if extra:
        problems.append(f"{_count(extra)} not of this model ({_some(extra)})")
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    if wrong:
        problems.append(f"{_count(wrong)} of another shape ({_some(wrong)})")
    odd = [
        f"{n} is {t.dtype}" for n, t in found.items() if n in expected and t.dtype not in _DTYPES
    ]
    if odd:
        known = ", ".join(_DTYPES)
        problems.append(f"{_count(odd)} of a type other than {known} ({_some(odd)})")
    if problems:
        raise CheckpointError(
            f"{source} does not hold the model of its config.json: {'; '.join(problems)}"
        )


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Read what a safetensors file says of itself, and check that it is as long as it says."""
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
            size = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= size <= _LONGEST_HEADER:
                raise ValueError("its head is not that of a safetensors file")
            header = json.loads(stream.read(size))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [8 + size, *(8 + size + entry["data_offsets"][1] for entry in tensors.values())]
        length = os.path.getsize(path)
        if length != max(ends):
            raise ValueError(f"it is {length} bytes long, not {max(ends)}")
        return {
            name: StoredTensor(tuple(entry["shape"]), entry["dtype"], path.name)
            for name, entry in tensors.items()
        }
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
