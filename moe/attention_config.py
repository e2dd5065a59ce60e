"""Settings of attention: the variants that published models have, all off by default.

Source:  llama3 scaling of positions: Llama 3.1's release; YaRN: arXiv:2309.00071; latent
         attention (MLA): DeepSeek-V2, arXiv:2405.04434; sinks and windows: gpt-oss's release.
"""

from dataclasses import dataclass, field
from enum import Enum

__all__ = ["AttentionConfig", "LatentConfig", "RopeConfig", "RopeScaling"]


class RopeScaling(Enum):
    """How rotary frequencies are stretched for texts longer than those of pretraining."""

    none = "none"
    linear = "linear"  # all divided by the factor
    llama3 = "llama3"  # slow ones divided, fast ones kept, a ramp between
    yarn = "yarn"  # a ramp over the dims, and queries and keys scaled


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """Scaling of rotary positions; `model.rope_base` is the base."""

    scaling: RopeScaling = RopeScaling.none
    factor: float = 1.0
    original_length: int = 0  # positions of pretraining; llama3 and yarn
    low_factor: float = 1.0  # llama3
    high_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ramp starts and ends at whole dims
    attention_factor: float | None = None  # yarn: of queries and keys; null: from the factor
    mscale: float = 0.0  # yarn: weight in the attention factor; 0: none
    mscale_all: float = 0.0  # yarn: the same, of the whole; also scales latent attention

    def __post_init__(self) -> None:
        for name in ("factor", "low_factor", "high_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"model.rope.{name} is {value}; it must be above 0")
        needs_length = self.scaling in (RopeScaling.llama3, RopeScaling.yarn)
        if needs_length and self.original_length < 1:
            raise ValueError(
                f"model.rope.original_length is {self.original_length}; with model.rope.scaling="
                f"{self.scaling.name} it is the length of pretraining, at least 1"
            )
        if self.scaling is RopeScaling.llama3 and not self.high_factor > self.low_factor:
            raise ValueError(
                f"model.rope.high_factor is {self.high_factor}; it must be above "
                f"model.rope.low_factor ({self.low_factor})"
            )


@dataclass(kw_only=True, slots=True)
class LatentConfig:
    """Latent attention: keys and values come from one narrow vector per token; rank 0 is off."""

    rank: int = 0  # width of the vector that keys and values come from
    query_rank: int | None = None  # the same for queries; null: straight from the input
    plain_width: int = 128  # of a head's queries and keys, without positions
    rope_width: int = 64  # of a head's queries and keys, with positions; keys share it
    value_width: int = 128  # of a head's values

    @property
    def is_on(self) -> bool:
        """Whether attention is latent."""
        return self.rank > 0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"model.attention.latent.rank is {self.rank}; it must be at least 0")
        for name in ("query_rank", "plain_width", "rope_width", "value_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.attention.latent.{name} is {value}; it must be at least 1")
        if self.rope_width % 2:
            raise ValueError(
                f"model.attention.latent.rope_width is {self.rope_width}; rotary position "
                "embeddings need an even width"
            )


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """What attention may have beside heads."""

    head_width: int | None = None  # null: hidden / heads
    norm_whole: bool = False  # model.qk_norm over all heads together (OLMoE), not per head
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None  # a position sees so many, itself included; null: all before it
    full_every: int = 0  # with a window, every so-many-th layer sees all; 0: none does
    sinks: bool = False  # each head may attend to nothing, by a learned logit (gpt-oss)
    latent: LatentConfig = field(default_factory=LatentConfig)

    def __post_init__(self) -> None:
        for name in ("head_width", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.attention.{name} is {value}; it must be at least 1")
        if self.full_every < 0:
            raise ValueError(
                f"model.attention.full_every is {self.full_every}; it must be at least 0"
            )
        if self.latent.is_on:
            for name in ("qkv_bias", "out_bias", "sinks", "norm_whole", "window", "head_width"):
                value = getattr(self, name)
                if value:
                    raise ValueError(
                        f"model.attention.{name} is {value}, which latent attention has not; set "
                        "model.attention.latent.rank=0 or leave it out"
                    )

    def window_of(self, layer: int) -> int | None:
        """Return how many positions a position of a layer sees; None for all before it."""
        if self.full_every and (layer + 1) % self.full_every == 0:
            return None
        return self.window

    @property
    def plain(self) -> bool:
        """Whether there is nothing beside heads, so that ranks can split them."""
        extra = (self.norm_whole, self.qkv_bias, self.out_bias, self.sinks, self.latent.is_on)
        return not any(extra)
