"""Two models on the same validation windows: the difference per window, with its standard error.

Losses of single windows differ far more than two models do on one window, so only paired
differences tell small effects of quantisation apart.

Shapes:  W windows   S positions
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.moe.model import Decoder
from gatewise.training.data import PreparedData
from gatewise.training.sequences import validation_windows

__all__ = ["Comparison", "Scores", "compare_scores", "score_windows"]

_WINDOWS = 16  # of a pass


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model made of each window."""

    nats_W: Tensor  # float64
    right_W: Tensor  # int64, targets that the most likely token was
    targets_W: Tensor  # int64

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats_W.sum()) / max(int(self.targets_W.sum()), 1)

    @property
    def accuracy(self) -> float:
        """Share of targets that the most likely token was."""
        return float(self.right_W.sum()) / max(int(self.targets_W.sum()), 1)

    def to_json(self) -> str:
        """Return it as text, exactly."""
        record = {field.name: getattr(self, field.name).tolist() for field in fields(self)}
        return json.dumps(record) + "\n"

    @staticmethod
    def from_json(text: str) -> "Scores":
        """Read what `to_json` wrote."""
        record = json.loads(text)
        return Scores(
            nats_W=torch.tensor(record["nats_W"], dtype=torch.float64),
            right_W=torch.tensor(record["right_W"], dtype=torch.int64),
            targets_W=torch.tensor(record["targets_W"], dtype=torch.int64),
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much worse `after` is than `before`."""

    delta_nats: float  # per token
    standard_error: float  # of it, over windows
    accuracy_loss_relative: float
    accuracy_standard_error: float  # of that, over windows


@torch.no_grad()
def score_windows(
    model: Decoder,
    data: PreparedData,
    *,
    sequence_length: int,
    tokens: int | None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Scores:
    """Score the validation split in windows without overlap.

    Args:
        model: put into evaluation mode.
        data: its validation split.
        sequence_length: inputs of a window.
        tokens: targets at most; None: all.
        progress: told how many windows are done, of how many.
    """
    model.eval()
    device = model.embedding.device
    text = data.validation.tokens
    text = text if tokens is None else text[: tokens + 1]
    windows = validation_windows(len(text), sequence_length)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    length = int(windows.lengths[0])
    for first in range(0, len(windows), _WINDOWS):
        last = min(first + _WINDOWS, len(windows))
        starts_W1 = windows.starts[first:last, None]
        token_WL = torch.from_numpy(text[starts_W1 + np.arange(length)].astype(np.int64)).to(device)
        scored_W1 = torch.from_numpy(windows.first_scored[first:last, None]).to(device)
        target_WS = token_WL[:, 1:]
        counts_WS = torch.arange(length - 1, device=device) >= scored_W1
        hidden_WSD = model(token_WL[:, :-1]).hidden_BSD
        logits_WSV = F.linear(hidden_WSD, model.output_weight).float()
        nats_WS = F.cross_entropy(
            logits_WSV.flatten(0, 1), target_WS.flatten(), reduction="none"
        ).view_as(target_WS)
        right_WS = logits_WSV.argmax(-1) == target_WS
        parts.append(
            (
                torch.where(counts_WS, nats_WS.double(), 0.0).sum(1).cpu(),
                (right_WS & counts_WS).sum(1).cpu(),
                counts_WS.sum(1).cpu(),
            )
        )
        progress(last, len(windows))
    nats, right, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    return Scores(nats, right, targets)


def compare_scores(before: Scores, after: Scores) -> Comparison:
    """Compare two models on the same windows.

    The standard error is that of a ratio of sums, so that a short last window counts for what it
    has.
    """
    delta, error = _per_target(after.nats_W - before.nats_W, before.targets_W)
    lost, lost_error = _per_target((before.right_W - after.right_W).double(), before.targets_W)
    accuracy = before.accuracy or 1.0
    return Comparison(delta, error, lost / accuracy, lost_error / accuracy)


def _per_target(moved_W: Tensor, targets_W: Tensor) -> tuple[float, float]:
    """Return a sum over windows per target, and the standard error of that ratio."""
    total, count = float(targets_W.sum()), len(moved_W)
    ratio = float(moved_W.sum()) / total
    left_W = moved_W - ratio * targets_W.double()
    variance = float(left_W.square().sum()) / max(count - 1, 1)
    return ratio, math.sqrt(variance * count) / total
