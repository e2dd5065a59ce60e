"""Choose fused optimizers and norms: NVIDIA Apex's on a GPU where it is built, else torch's."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gatewise.moe.attention import NormFunction, RMSNorm, rms_norm
from gatewise.training.apex_package import find_apex

__all__ = ["Fused", "choose_fused", "use_norms"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fused:
    """What was chosen."""

    adam: Callable[..., torch.optim.Optimizer] | None = None  # Apex's; None: torch's fused AdamW
    norm: NormFunction = rms_norm

    def __str__(self) -> str:
        adam = "NVIDIA Apex's FusedAdam" if self.adam else "torch's fused AdamW"
        norm = "torch's" if self.norm is rms_norm else "NVIDIA Apex's"
        return f"optimizer: {adam}; norms: {norm}"


def choose_fused(device: torch.device) -> Fused:
    """Choose for a device and log the choice; a package that is not NVIDIA's is named."""
    package = find_apex()
    fused = Fused()
    if package.problem and (package.unrelated or device.type == "cuda"):
        _log.warning("%s", package.problem)
    if package.nvidia and device.type == "cuda":
        fused = Fused(
            _load_adam() if package.fused_adam else None,
            _load_norm() if package.fused_norms else rms_norm,
        )
    _log.info("%s", fused)
    return fused


def use_norms(model: torch.nn.Module, function: NormFunction) -> None:
    """Let all norms of a model compute with `function`."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.function = function


def _load_adam() -> Callable[..., torch.optim.Optimizer]:
    from apex.optimizers import FusedAdam

    adam: Callable[..., torch.optim.Optimizer] = FusedAdam  # apex ships no types
    return adam


def _load_norm() -> NormFunction:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    def apex_rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        y: torch.Tensor = fused_rms_norm_affine(x, gain, gain.shape, eps)
        return y

    return apex_rms_norm
