"""What the stages of one compression pass on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewise.compression.artefact import PARTIAL
from gatewise.compression.config import CompressConfig
from gatewise.compression.load import build_empty, fill_ranges, load_compressed, load_whole
from gatewise.compression.plan import Plan
from gatewise.compression.stream import BlockStream
from gatewise.moe.model import Decoder
from gatewise.training.config import TrainConfig
from gatewise.training.data import PreparedData

__all__ = ["Progress", "Source", "Work"]

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that is compressed, and the text that it is measured on."""

    path: Path
    config: TrainConfig
    meta: Mapping[str, Any]  # what the checkpoint says of itself
    data: PreparedData
    device: torch.device

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.meta["vocab_size"])


@dataclass(slots=True)
class Work:
    """One compression: its settings, its folder, and the plan as far as it is made."""

    source: Source
    config: CompressConfig
    folder: Path
    progress: Progress
    plan: Plan
    batches: list[Tensor] = field(default_factory=list)  # (B, S + 1) each

    @property
    def calibration(self) -> Path:
        """Folder of what was measured."""
        return self.folder / "calibration"

    @property
    def partial(self) -> Path:
        """Folder of the artefact while it is made."""
        return self.folder / PARTIAL

    def inputs(self) -> list[Tensor]:
        """Return the batches without the last position, which is a target only."""
        return [token_BS[:, :-1] for token_BS in self.batches]

    def stream(self) -> BlockStream:
        """Return a stream of the uncompressed model, not begun."""
        source = self.source
        model = build_empty(source.config, source.vocab_size)
        return BlockStream(model, lambda ranges: fill_ranges(source.path, ranges), source.device)

    def moe_layers(self) -> list[int]:
        """Return the layers with experts."""
        return sorted({part.layer for part in self.plan.parts if part.kind == "expert"})

    def load_before(self) -> Decoder:
        """Return the uncompressed model, all of it in memory."""
        source = self.source
        return load_whole(source.config, source.vocab_size, source.path, source.device)

    def load_after(self) -> Decoder:
        """Return the compressed model as far as it is made, dequantised, all of it in memory."""
        source = self.source
        return load_compressed(
            source.config, source.vocab_size, self.partial, self.plan, source.device
        )
