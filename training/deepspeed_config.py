"""Settings of the engine that sums gradients and updates weights, and of DeepSpeed's."""

from dataclasses import dataclass
from enum import Enum

from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.errors import ConfigError

__all__ = ["DeepSpeedConfig", "EngineKind", "check_deepspeed"]


class EngineKind(Enum):
    """Who sums gradients and updates weights."""

    gatewise = "gatewise"  # our own buckets; ZeRO-1 by parallel.shard
    deepspeed = "deepspeed"  # ZeRO 1 and 2, with offload


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """DeepSpeed's ZeRO, where `engine=deepspeed`; docs/interop.md."""

    stage: int = 2  # 1: optimizer state is split over ranks; 2: gradients too
    offload: bool = False  # optimizer state and its update on the host's memory and processor
    bucket_mb: float = 16.0  # gradients that are reduced at once, MiB of fp32

    def __post_init__(self) -> None:
        if self.stage == 3:
            raise ConfigError(
                "deepspeed.stage is 3, but DeepSpeed's ZeRO 3 splits weights of its own MoE layers "
                "only; use deepspeed.stage=2, and parallel.expert for less memory"
            )
        if self.stage not in (1, 2):
            raise ConfigError(
                f"deepspeed.stage is {self.stage}; it must be 1 or 2 (without ZeRO: "
                "engine=gatewise)"
            )
        if not self.bucket_mb > 0:
            raise ConfigError(f"deepspeed.bucket_mb is {self.bucket_mb}; it must be above 0")


def check_deepspeed(parallel: ParallelConfig, *, plans_slices: bool) -> None:
    """Raise `ConfigError` for settings that DeepSpeed's engine has no way to follow.

    Args:
        parallel: degrees.
        plans_slices: whether the schedule may put sums of gradients inside backward passes.
    """
    if parallel.ranks == 1:
        raise ConfigError(
            "engine is deepspeed and parallel.ranks is 1, but ZeRO splits state over ranks; set "
            "parallel.ranks above 1, or engine=gatewise"
        )
    if parallel.shard > 1:
        raise ConfigError(
            f"engine is deepspeed and parallel.shard is {parallel.shard}, but DeepSpeed splits "
            "optimizer state over all ranks that hold the same weights; set parallel.shard=1, or "
            "engine=gatewise"
        )
    if parallel.tensor > 1:
        raise ConfigError(
            f"engine is deepspeed and parallel.tensor is {parallel.tensor}, but DeepSpeed sums "
            "attention's gradients over ranks with other heads; set parallel.tensor=1, or "
            "engine=gatewise"
        )
    if plans_slices:
        raise ConfigError(
            "engine is deepspeed and schedule.profile is set, but what it plans includes slices of "
            "gradient sums, which DeepSpeed sends itself; state schedule.chunks_forward instead of "
            "the profile, or set engine=gatewise"
        )
