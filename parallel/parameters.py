"""What the trainer must know of each parameter to reduce, update and save it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "Label",
    "Owner",
    "ParameterSpec",
    "Part",
    "Span",
    "cut_spans",
    "owned_parts",
    "take_spans",
]

Label = Literal["dense", "embedding", "router", "expert"]
# Which ranks hold the same values, and so sum their gradients: all, those with the same experts,
# or those with the same attention heads.
Owner = Literal["all", "expert", "tensor"]


@dataclass(frozen=True, slots=True)
class Span:
    """Where consecutive local elements lie in a flattened whole tensor.

    There are `rows` runs of `run` elements, `stride` apart, the first from `start` on. A stride of
    0 stands for one run that is not a part of rows.
    """

    start: int
    rows: int
    run: int
    stride: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.run


def cut_spans(spans: Sequence[Span], start: int, end: int) -> list[Span]:
    """Return where the local elements [start, end) of those of `spans` lie.

    At most three spans come of each: the end of a run, whole runs, the start of a run.
    """
    found: list[Span] = []
    offset = 0
    for span in spans:
        low, high = max(start - offset, 0), min(end - offset, span.numel)
        offset += span.numel
        if low >= high:
            continue
        first, last = low // span.run, (high - 1) // span.run
        begins = low % span.run
        ends = high - last * span.run
        at = span.start + first * span.stride
        if first == last:
            found.append(Span(at + begins, 1, ends - begins, span.stride))
            continue
        if begins:
            found.append(Span(at + begins, 1, span.run - begins, span.stride))
            first += 1
        whole = last - first + (ends == span.run)
        if whole:
            at = span.start + first * span.stride
            found.append(Span(at, whole, span.run, span.stride))
        if ends != span.run:
            found.append(Span(span.start + last * span.stride, 1, ends, span.stride))
    return found


def take_spans(whole: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return the elements of a whole tensor that lie in `spans`, flat."""
    flat = whole.flatten()
    parts = [flat.as_strided((s.rows, s.run), (s.stride, 1), s.start).flatten() for s in spans]
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter with its place in the whole model.

    Where ranks hold different parts of it, `spans` tell where our elements lie, in their order, in
    the flattened whole; without any, we hold it all.
    """

    name: str
    parameter: nn.Parameter
    label: Label
    owner: Owner
    decay: bool  # weight decay applies
    shape: tuple[int, ...]  # of the whole tensor
    spans: tuple[Span, ...] = ()

    @property
    def start(self) -> int:
        """Where our first element lies in the flattened whole."""
        return self.spans[0].start if self.spans else 0

    def cut(self, start: int, end: int) -> list[Span]:
        """Return where our elements [start, end) lie in the flattened whole."""
        return cut_spans(self.spans or (Span(0, 1, self.parameter.numel()),), start, end)

    def local(self) -> Tensor:
        """Return this rank's values, flattened."""
        return self.parameter.detach().view(-1)


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive elements of one parameter within a flat range that this rank owns."""

    spec: ParameterSpec
    start: int  # of the flattened local parameter
    end: int
    offset: int  # of the first of them in the owned range

    def of(self, flat: Tensor) -> Tensor:
        """Return these elements of a tensor that holds the owned range."""
        return flat[self.offset : self.offset + self.end - self.start]


def owned_parts(placed: Iterable[tuple[int, ParameterSpec]], owned: slice) -> list[Part]:
    """Cut an owned range of parameters that lie side by side into the parts of each.

    Args:
        placed: where each parameter starts, and which it is.
        owned: of the elements of all of them.
    """
    found = []
    for place, spec in placed:
        start, end = max(place, owned.start), min(place + spec.parameter.numel(), owned.stop)
        if start < end:
            found.append(Part(spec, start - place, end - place, start - owned.start))
    return found
