"""Loss of a model on the validation split, over all ranks.

Shapes:  W windows of a pass   S positions
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.moe.model import Decoder
from gatewise.parallel.collectives import Group
from gatewise.routers.api import RoutingContext
from gatewise.training.config import EvaluationConfig
from gatewise.training.data import PreparedData
from gatewise.training.measures.churn import RouteProbe
from gatewise.training.sequences import Windows, validation_windows
from gatewise.training.step import language_loss

__all__ = ["Evaluation", "EvaluationStopped", "evaluate"]


class EvaluationStopped(Exception):
    """Some rank was asked to stop while the ranks evaluated."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Sums over scored targets, and what follows from them."""

    nats: float
    tokens: int
    text_bytes: int  # that the targets stand for; end-of-text tokens stand for none
    churn: float | None = None  # share of probed pairs whose expert changed; None: not known

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; comparable between tokenizers."""
        return self.nats / math.log(2) / max(self.text_bytes, 1)

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def record(self) -> dict[str, float]:
        """Return the values by the names that records use."""
        values = {
            "val/loss": self.loss,
            "val/bits_per_byte": self.bits_per_byte,
            "val/perplexity": self.perplexity,
            "val/tokens": self.tokens,
        }
        return values if self.churn is None else values | {"val/router_churn": self.churn}


@torch.no_grad()
def evaluate(
    model: Decoder,
    data: PreparedData,
    config: EvaluationConfig,
    *,
    sequence_length: int,
    control: Group,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    probe: RouteProbe | None = None,
) -> Evaluation:
    """Score every target of the validation split once.

    Nothing is dropped, no noise is drawn, and no balance state changes. All ranks make equally
    many passes, because experts on other ranks take part in each.

    Args:
        model: put into evaluation mode, and back.
        data: its validation split and bytes per token.
        config: stride, passes, and a limit on targets.
        sequence_length: inputs of a window.
        control: all ranks.
        device: of the model.
        stop: asked between passes; where it is true on one rank, all stop.
        probe: compares the first pass's experts with those of the evaluation before.

    Raises:
        EvaluationStopped: on all ranks, if `stop` was true on one.
    """
    tokens = data.validation.tokens
    if config.tokens is not None:
        tokens = tokens[: config.tokens + 1]
    windows = validation_windows(len(tokens), sequence_length, config.stride)
    token_bytes = torch.from_numpy(data.tokenizer.token_bytes())
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    split = model.split  # ranks that share sequences read the same windows
    readers, reader = control.size // split.parts, control.rank // split.parts
    step = config.micro * readers
    for first in range(0, len(windows), step):
        if _asked_to_stop(stop, control, device):
            model.train(was_training)
            raise EvaluationStopped
        mine = range(first + reader, min(first + step, len(windows)), readers)
        input_WS, target_WS = _read(tokens, windows, mine, config.micro, split.parts)
        padding_T = torch.zeros(input_WS.shape, dtype=torch.bool)
        padding_T[len(mine) :] = True
        padding_T[:, int(windows.lengths[0]) - 1 :] = True
        target_WS = split.own(target_WS)
        bytes_here = (
            torch.where(target_WS >= 0, token_bytes[target_WS.clamp(min=0)], 0).sum().double()
        )
        context = RoutingContext(padding_T=padding_T.flatten().to(device))
        target_WS = target_WS.to(device)
        output = model(input_WS.to(device), context)
        sums[0] += language_loss(model, output, target_WS)
        sums[1] += (target_WS >= 0).sum()
        sums[2] += bytes_here.to(device)
        if probe is not None and first == 0:
            sums[3:] = probe.compare(output.routings).to(device)
    if control.handle is not None:
        dist.all_reduce(sums, group=control.handle)
    model.train(was_training)
    nats, count, text_bytes, kept, pairs = sums.tolist()
    churn = 1 - kept / pairs if pairs else None
    return Evaluation(nats, int(count), int(text_bytes), churn)


def _asked_to_stop(stop: Callable[[], bool], control: Group, device: torch.device) -> bool:
    """Tell all ranks alike whether one of them was asked."""
    if control.handle is None:
        return stop()
    asked = torch.tensor(float(stop()), device=device)
    dist.all_reduce(asked, group=control.handle)
    return bool(asked.item())  # the host waits, once a pass


def _read(
    tokens: "np.ndarray[tuple[int, ...], np.dtype[np.integer]]",
    windows: Windows,
    chosen: range,
    size: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of `chosen` windows.

    They are filled up to `size` rows, and to a multiple of `parts` positions, with what is not
    scored.
    """
    length = int(windows.lengths[0])
    filled = (length - 1 + parts - 1) // parts * parts + 1
    both_WL = np.zeros((size, filled), dtype=np.int64)
    for row, window in enumerate(chosen):
        start = int(windows.starts[window])
        both_WL[row, :length] = tokens[start : start + length]
    input_WS = torch.from_numpy(both_WL[:, :-1])
    target_WS = torch.from_numpy(both_WL[:, 1:].copy())
    for row, window in enumerate(chosen):
        target_WS[row, : int(windows.first_scored[window])] = -100
    target_WS[len(chosen) :] = -100
    target_WS[:, length - 1 :] = -100
    return input_WS, target_WS
