"""Which transformers architecture computes what a model of ours computes, and its tensors' names.

The layouts are those of `training/interop/`; here one must say everything, because exported files
have no place for state of ours. What none has is refused with the reason.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gatewise.moe.config import ModelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.routers.config import RouterConfig
from gatewise.training.config import TrainConfig
from gatewise.training.interop.families import Family, choose_family
from gatewise.training.interop.names import Piece, Same, list_pieces
from gatewise.training.interop.write_config import write_config

__all__ = ["Layout", "Place", "choose_layout"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where some rows of a tensor go."""

    weight: str  # name of the unquantised tensor
    rows: slice

    @property
    def module(self) -> str:
        """Name of the module that has the tensor as its weight."""
        return self.weight.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and settings of one architecture for one model."""

    family: Family
    model: ModelConfig
    router: RouterConfig
    _pieces: dict[tuple[str, int | None], list[Piece]] = field(init=False)

    def __post_init__(self) -> None:
        pieces = defaultdict(list)
        for piece in list_pieces(self.family, self.model, self.router, vocab_size=1):
            assert isinstance(piece.turn, Same)
            pieces[piece.ours, piece.expert].append(piece)
        object.__setattr__(self, "_pieces", dict(pieces))

    def places(self, name: str, rows: int, expert: int | None = None) -> list[Place]:
        """Return where a parameter of ours goes.

        Args:
            name: of the parameter, as in `Decoder.named_parameters`.
            rows: its length, or that of one expert's matrix.
            expert: index of the slice, for the experts' parameters.
        """
        found = self._pieces[f"model/{name}", expert]
        return [Place(piece.theirs, piece.rows or slice(0, rows)) for piece in found]

    def settings(self, config: TrainConfig, vocab_size: int) -> dict[str, Any]:
        """Return config.json of the exported model, without its quantisation."""
        positions = config.data.sequence_length
        record = write_config(
            self.family, self.model, self.router, vocab_size=vocab_size, positions=positions
        )
        return record | {"dtype": "bfloat16"}


def choose_layout(config: TrainConfig, biases: Mapping[str, bool]) -> Layout:
    """Return the architecture that computes what the model computes.

    Args:
        config: of the training run.
        biases: by name of each router state beside the parameters, whether any of it is not 0.

    Raises:
        ConfigError: with the reason, if there is none.
    """
    model, router = config.model, config.router
    family, reasons = choose_family(model, router)
    if family.norm == "latent":
        reasons.append("latent attention is exported by `gatewise convert to_hf` only")
    moved = sorted(name for name, is_set in biases.items() if is_set)
    if moved:
        reasons.append(f"the routers choose with a bias ({moved[0]})")
    if reasons:
        raise ConfigError(
            f"this model has no counterpart in transformers' {family.kind}: {reasons[0]}"
        )
    return Layout(family, model, router)
