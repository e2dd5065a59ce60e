"""State of ours that a layout has no place for: `gatewise.safetensors` and a key of config.json.

    config.json            "gatewise": {"format": 1, "model": {...}, "router": {...}}
    gatewise.safetensors   the tensors under their names in a checkpoint of ours

The key alone says that the router computes something that the layout cannot say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gatewise.parallel.errors import CheckpointError

__all__ = ["KEY", "SIDECAR", "read_sidecar", "sidecar_record", "write_sidecar"]

KEY = "gatewise"
SIDECAR = "gatewise.safetensors"
_FORMAT = 1


def sidecar_record(settings: Mapping[str, Any], *, has_tensors: bool) -> dict[str, Any]:
    """Return the value of the key in config.json.

    Args:
        settings: of a run, as JSON holds them.
        has_tensors: whether there is a file beside.
    """
    return {
        "format": _FORMAT,
        "tensors": SIDECAR if has_tensors else None,
        "model": settings["model"],
        "router": settings["router"],
    }


def write_sidecar(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors; nothing where there are none."""
    from safetensors.torch import save_file

    if tensors:
        own = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(own, folder / SIDECAR, metadata={"format": "pt"})


def read_sidecar(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return settings and tensors beside a layout's own; None and nothing where there are none.

    Raises:
        CheckpointError: if one of key and file is there without the other, or is of a format that
            this version does not read.
    """
    record, file = config.get(KEY), folder / SIDECAR
    if record is None:
        if file.exists():
            raise CheckpointError(
                f"{folder} holds {SIDECAR}, but its config.json has no key {KEY!r}; put back the "
                "config.json that was written with it"
            )
        return None, {}
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise CheckpointError(
            f"{folder}: config.json has {KEY!r} of format {found!r}; this version reads {_FORMAT}"
        )
    if record.get("tensors") is None:
        return record, {}
    if not file.is_file():
        raise CheckpointError(f"{folder}: config.json names {SIDECAR}, which is absent")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return record, load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
