"""Gradients of the loss by the output of every MoE layer, which `fisher` costs need.

One backward pass of the whole model per calibration batch; this is the only part of a compression
that holds all blocks at once. A batch's gradients go to a file of their own, as bf16 (a relative
error of 2^-8 in the terms of a sum), so a killed run goes on with the next batch.

Shapes:  B sequences   S positions   T tokens   D model width
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block, Decoder
from gatewise.parallel.errors import DataError
from gatewise.training.step import language_loss

__all__ = ["measure_gradients", "read_gradients"]


def measure_gradients(
    model: Decoder,
    token_batches: Sequence[Tensor],
    folder: Path,
    *,
    progress: Callable[[int], None] = lambda _done: None,
) -> None:
    """Write the gradients of each batch that is not there yet.

    Args:
        model: fp32, all its weights; its parameters' gradients are not touched.
        token_batches: int64 (B, S + 1): the last position is a target only.
        folder: for the files; made if it does not exist.
        progress: told the number of finished batches.

    Raises:
        DataError: if a gradient is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    for index, token_BS in enumerate(token_batches):
        file = folder / _name(index)
        if not file.exists():
            found = _output_gradients(model, token_BS)
            for layer, gradient_TD in found.items():
                if not bool(torch.isfinite(gradient_TD).all()):
                    raise DataError(
                        f"layer {layer}: gradients of calibration batch {index} are not finite; "
                        "the checkpoint has diverged: take an earlier one"
                    )
            _write(file, found)
        progress(index + 1)


def read_gradients(folder: Path, batches: int, layer: int) -> Tensor:
    """Return the gradients (T, D) of a layer over all batches, bf16."""
    from safetensors import safe_open

    parts = []
    for index in range(batches):
        with safe_open(folder / _name(index), framework="pt") as tensors:
            parts.append(tensors.get_tensor(str(layer)))
    return torch.cat(parts)


def _output_gradients(model: Decoder, token_BS: Tensor) -> dict[str, Tensor]:
    token_BS = token_BS.to(model.embedding.device)
    found: dict[str, Tensor] = {}
    with _only_activations(model), _outputs(model) as outputs:
        output = model(token_BS[:, :-1])
        loss = language_loss(model, output, token_BS[:, 1:])
        layers = sorted(outputs)
        gradients = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
        for layer, gradient_TD in zip(layers, gradients, strict=True):
            found[str(layer)] = gradient_TD.detach().bfloat16().cpu()
    return found


@contextmanager
def _only_activations(model: Decoder) -> Iterator[None]:
    """Ask no parameter for a gradient but the embedding, where the graph has to start."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(parameter is model.embedding)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def _outputs(model: Decoder) -> Iterator[dict[int, Tensor]]:
    """Collect the output of every MoE layer of the next forward pass."""
    found: dict[int, Tensor] = {}
    hooks = []
    for block in model.blocks:
        assert isinstance(block, Block)
        if isinstance(block.feed_forward, MoELayer):

            def keep(
                _module: nn.Module, _arguments: Any, output: Any, layer: int = block.layer
            ) -> None:
                found[layer] = output[0]

            hooks.append(block.feed_forward.register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(tensors, temporary)
    temporary.replace(file)


def _name(index: int) -> str:
    return f"gradients_{index:05d}.safetensors"
