"""Settings of the decoder and of its MoE layers, with the arithmetic of their sizes."""

from dataclasses import dataclass, field
from enum import Enum

from gatewise.routers.ahead.shapes import pregate_parameters
from gatewise.routers.config import RouterConfig
from gatewise.routers.shapes import router_parameters

__all__ = [
    "Activation",
    "CapacityConfig",
    "CapacityOrder",
    "ModelConfig",
    "ParameterCount",
    "count_parameters",
]


class Activation(Enum):
    """The experts' non-linearity; swiglu has a gate and an up projection, the others one."""

    swiglu = "swiglu"
    gelu = "gelu"
    relu = "relu"


class CapacityOrder(Enum):
    """Which pairs an expert over its capacity keeps."""

    probs = "probs"  # the largest combine weights
    position = "position"  # the first tokens
    choice = "choice"  # all first choices before any second, then the first tokens
    random = "random"  # random token selection


@dataclass(kw_only=True, slots=True)
class CapacityConfig:
    """Dropping of pairs; `factor` None (the default) drops nothing."""

    factor: float | None = None  # capacity = ceil(factor * top_k * tokens / num_experts)
    order: CapacityOrder = CapacityOrder.probs

    def __post_init__(self) -> None:
        if self.factor is not None and not self.factor > 0:
            raise ValueError(
                f"model.capacity.factor is {self.factor}; it must be above 0, or null to drop none"
            )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A decoder whose feed-forward layers are dense or Mixture-of-Experts.

    With `num_experts=0` every layer is dense.
    """

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int | None = None  # grouped-query attention; None: as many as heads
    num_experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    shared_experts: int = 0  # experts of expert_width that every token passes
    dense_layers: int = 0  # the first layers are dense
    moe_every: int = 1  # after those, every moe_every-th layer is MoE
    dense_width: int | None = None  # None: top_k + shared_experts times expert_width
    activation: Activation = Activation.swiglu
    qk_norm: bool = True
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    capacity: CapacityConfig = field(default_factory=CapacityConfig)

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "expert_width", "moe_every"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1")
        for name in ("num_experts", "shared_experts", "dense_layers"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"model.{name} is {value}; it must be at least 0")
        if self.dense_width is not None and self.dense_width < 1:
            raise ValueError(
                f"model.dense_width is {self.dense_width}; it must be at least 1 or null"
            )
        if self.hidden % self.heads:
            raise ValueError(
                f"model.heads is {self.heads}, which does not divide model.hidden "
                f"({self.hidden}); choose a divisor"
            )
        if self.hidden // self.heads % 2:
            raise ValueError(
                f"model.hidden / model.heads is {self.hidden // self.heads}; rotary position "
                "embeddings need an even width per head"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(
                f"model.kv_heads is {self.kv_heads}; it must divide model.heads ({self.heads})"
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"model.top_k is {self.top_k}; it must be from 1 to model.num_experts "
                f"({self.num_experts})"
            )

    def is_moe(self, layer: int) -> bool:
        """Tell whether feed-forward layer `layer` (from 0) has experts."""
        if not self.num_experts or layer < self.dense_layers:
            return False
        return (layer - self.dense_layers + 1) % self.moe_every == 0

    def moe_layers(self) -> list[int]:
        """Return the indices of the MoE layers."""
        return [layer for layer in range(self.layers) if self.is_moe(layer)]

    def feed_forward_width(self) -> int:
        """Return the inner width of dense layers."""
        if self.dense_width is not None:
            return self.dense_width
        return (self.top_k + self.shared_experts) * self.expert_width


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Sizes of a decoder; a test holds them to the built modules."""

    total: int
    active: int  # a token's share: all but the experts that it does not use
    router: int


def count_parameters(
    config: ModelConfig, vocab_size: int, router: RouterConfig | None = None
) -> ParameterCount:
    """Count the parameters of a decoder from its settings; `router` None is a linear one."""
    hidden, width = config.hidden, config.hidden // config.heads
    kv_heads = config.kv_heads or config.heads
    matrices = 3 if config.activation is Activation.swiglu else 2
    attention = (config.heads + 2 * kv_heads) * width * hidden + hidden * hidden
    attention += 2 * width if config.qk_norm else 0
    expert = matrices * hidden * config.expert_width
    dense = matrices * hidden * config.feed_forward_width()
    num_moe = len(config.moe_layers())
    router = router or RouterConfig()
    routers = router_parameters(
        router, hidden=hidden, num_experts=config.num_experts, layers=num_moe
    ) + pregate_parameters(
        router.ahead, vocab_size=vocab_size, num_experts=config.num_experts, layers=num_moe
    )
    common = vocab_size * hidden * (1 if config.tie_embeddings else 2) + hidden
    common += config.layers * (attention + 2 * hidden) + (config.layers - num_moe) * dense
    common += num_moe * config.shared_experts * expert + routers
    return ParameterCount(
        total=common + num_moe * config.num_experts * expert,
        active=common + num_moe * config.top_k * expert,
        router=routers,
    )
