"""Run a model over fixed batches one block at a time, with only that block in memory.

The model is built on the meta device. What stands outside of the blocks gets memory once; a block
gets it for the time of `resident`. The first block's arguments are caught from the model's own
forward pass, so nothing here repeats how a model prepares its blocks' inputs.

Shapes:  B sequences   S positions   T tokens   D model width   K experts per token
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.moe.model import Block, Decoder
from gatewise.parallel.errors import CheckpointError, DataError
from gatewise.routers.api import Routing
from gatewise.routers.weights import RouterWeights
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.state import model_ranges

__all__ = ["BlockStream", "Fill", "check_names", "give_memory"]

_BLOCK_INPUTS = 4  # hidden states, routing context, rotary tables, cache

Fill = Callable[[Mapping[str, FlatRange]], None]  # writes the named ranges of a checkpoint


class BlockStream:
    """The batches on their way through the blocks.

    Args:
        model: on the meta device; its parameters are fp32 wherever they get memory.
        fill: reads parts of the checkpoint.
        device: where blocks get memory.
    """

    def __init__(self, model: Decoder, fill: Fill, device: torch.device) -> None:
        self.model, self._fill, self._device = model.eval(), fill, device
        self._arguments: list[tuple[Any, ...]] = []  # of the next block, one per batch

    def begin(
        self, token_batches: Sequence[Tensor], *, adjust: Callable[[], None] = lambda: None
    ) -> None:
        """Load what stands outside of the blocks and catch the first block's arguments.

        Args:
            token_batches: int64 (B, S) each.
            adjust: changes weights before they are used, such as rounding them.

        Raises:
            DataError: if a weight is not finite.
        """
        for name, child in self.model.named_children():
            if name != "blocks":
                give_memory(child, self._device)
        for name, parameter in self.model.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device=self._device)
            setattr(self.model, name, nn.Parameter(empty))
        self._load(lambda name: not _is_in_block(name))
        adjust()
        self._arguments = [self._catch(token_BS.to(self._device)) for token_BS in token_batches]

    @contextmanager
    def resident(self, layer: int, *, load: bool = True) -> Iterator[Block]:
        """Give a block memory and its weights; afterwards take the memory away.

        Args:
            layer: index of the block.
            load: False leaves the weights to the caller.

        Raises:
            DataError: if a weight is not finite.
        """
        block = self.block(layer)
        give_memory(block, self._device)
        try:
            if load:
                prefix = f"blocks.{layer}."
                self._load(lambda name: name.startswith(prefix))
            yield block
        finally:
            block.to_empty(device=torch.device("meta"))

    def block(self, layer: int) -> Block:
        """Return a block, in memory or not."""
        block = self.model.blocks[layer]
        assert isinstance(block, Block)
        return block

    @torch.no_grad()
    def run(self, block: Block) -> Iterator[tuple[Any, ...]]:
        """Yield the block's output for each batch; the batches stay before the block."""
        for arguments in self._arguments:
            yield block(*arguments)

    @torch.no_grad()
    def advance(self, block: Block) -> list[Routing | None]:
        """Send all batches through the block; return its routing of each."""
        routings = []
        for index, arguments in enumerate(self._arguments):
            x_BSD, routing, context = block(*arguments)
            self._arguments[index] = (x_BSD, context, *arguments[2:])
            routings.append(routing)
        return routings

    def _load(self, wanted: Callable[[str], bool]) -> None:
        ranges = {
            name: part
            for name, part in model_ranges(self.model).items()
            if wanted(name.partition("/")[2])
        }
        self._fill(ranges)
        for name, part in ranges.items():
            bad = int((~torch.isfinite(part.data)).sum())
            if bad:
                raise DataError(
                    f"checkpoint: {bad} of {part.data.numel()} numbers of '{name}' are not finite; "
                    "it has diverged: take an earlier one"
                )

    @torch.no_grad()
    def _catch(self, token_BS: Tensor) -> tuple[Any, ...]:
        caught: list[tuple[Any, ...]] = []

        def stop(_block: nn.Module, arguments: tuple[Any, ...]) -> None:
            # tickets of a plan made ahead are this block's; without, each block makes its own
            caught.append(arguments[:_BLOCK_INPUTS])
            raise _Caught

        hook = self.model.blocks[0].register_forward_pre_hook(stop)
        try:
            self.model(token_BS)
        except _Caught:
            pass
        finally:
            hook.remove()
        return caught[0]


class _Caught(Exception):
    """The first block was reached."""


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Move a module from the meta device; what is neither parameter nor saved gets its start."""
    module.to_empty(device=device)
    for part in module.modules():
        if isinstance(part, RouterWeights):
            part.reset_state()


def check_names(model: Decoder, saved: Mapping[str, Any], *, source: str) -> None:
    """Compare a checkpoint's tensors with the model's, all of them.

    Args:
        model: on any device.
        saved: name to shape of the checkpoint's tensors, without optimizer state.
        source: the checkpoint, for the message.

    Raises:
        CheckpointError: naming the first tensor that is unknown, missing or of another shape.
    """
    here = {name: part.shape for name, part in model_ranges(model).items()}
    for name in sorted(here.keys() | saved.keys()):
        if name not in here:
            raise CheckpointError(
                f"checkpoint {source} holds '{name}', which this model does not have; compress it "
                "with the version that trained it"
            )
        if name not in saved:
            raise CheckpointError(f"checkpoint {source} lacks '{name}'")
        if tuple(saved[name]) != here[name]:
            raise CheckpointError(
                f"checkpoint {source}: '{name}' is {list(saved[name])}, but the model's is "
                f"{list(here[name])}"
            )


def _is_in_block(name: str) -> bool:
    return name.startswith("blocks.")
