"""Settings of the decoder and of its MoE layers, with the arithmetic of their sizes."""

from dataclasses import dataclass, field
from enum import Enum

from gatewise.moe.attention_config import AttentionConfig, RopeConfig
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
    shared_width: int | None = None  # of all shared experts; None: shared_experts * expert_width
    shared_gate: bool = False  # a sigmoid of the token scales the shared experts' output
    activation: Activation = Activation.swiglu
    clamped_experts: bool = False  # gpt-oss: biases and a clamped swiglu; whole on each rank
    qk_norm: bool = True
    tie_embeddings: bool = True
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rope_base: float = 10000.0
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm_eps: float = 1e-6
    init_std: float = 0.02
    vocab_size: int | None = None  # rows of the embedding; None: as many as the tokenizer has ids
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
        for name in ("dense_width", "shared_width", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1 or null")
        if self.shared_width is not None and not self.shared_experts:
            raise ValueError(
                f"model.shared_width is {self.shared_width} but model.shared_experts is 0; set it "
                "to how many experts that width stands for, such as 1"
            )
        if self.shared_gate and not self.shared_experts:
            raise ValueError(
                "model.shared_gate is true but model.shared_experts is 0; there is nothing to scale"
            )
        self._check_heads()
        if self.clamped_experts and self.activation is not Activation.swiglu:
            raise ValueError(
                f"model.activation is {self.activation.name}, but model.clamped_experts are those "
                "of gpt-oss; use activation=swiglu"
            )
        if self.clamped_experts and self.capacity.factor is not None:
            raise ValueError(
                f"model.capacity.factor is {self.capacity.factor}; with model.clamped_experts "
                "nothing is dropped, set it to null"
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"model.top_k is {self.top_k}; it must be from 1 to model.num_experts "
                f"({self.num_experts})"
            )

    def _check_heads(self) -> None:
        """Refuse heads that do not fit the width."""
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(
                f"model.kv_heads is {self.kv_heads}; it must divide model.heads ({self.heads})"
            )
        if self.attention.latent.is_on:  # whose widths are its own
            if self.kv_heads not in (None, self.heads):
                raise ValueError(
                    f"model.kv_heads is {self.kv_heads}; latent attention has as many as "
                    f"model.heads ({self.heads})"
                )
            return
        if self.attention.norm_whole and not self.qk_norm:
            raise ValueError(
                "model.attention.norm_whole is true but model.qk_norm is false; set both"
            )
        name, width = "model.attention.head_width", self.attention.head_width
        if width is None:
            if self.hidden % self.heads:
                raise ValueError(
                    f"model.heads is {self.heads}, which does not divide model.hidden "
                    f"({self.hidden}); choose a divisor, or set model.attention.head_width"
                )
            name, width = "model.hidden / model.heads", self.hidden // self.heads
        if width % 2:
            raise ValueError(
                f"{name} is {width}; rotary position embeddings need an even width per head"
            )

    def head_width(self) -> int:
        """Return the width of a head's queries and keys."""
        latent = self.attention.latent
        if latent.is_on:
            return latent.plain_width + latent.rope_width
        return self.attention.head_width or self.hidden // self.heads

    def rope_width(self) -> int:
        """Return how much of a head's width has rotary positions."""
        latent = self.attention.latent
        return latent.rope_width if latent.is_on else self.head_width()

    def shared(self) -> int:
        """Return the inner width of the shared experts together; 0 where there are none."""
        if self.shared_width is not None:
            return self.shared_width
        return self.shared_experts * self.expert_width

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
    hidden = config.hidden
    matrices = 3 if config.activation is Activation.swiglu else 2
    attention = _attention_parameters(config)
    expert = matrices * hidden * config.expert_width
    if config.clamped_experts:
        expert += (matrices - 1) * config.expert_width + hidden
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
    common += num_moe * (matrices * hidden * config.shared() + hidden * config.shared_gate)
    common += routers
    return ParameterCount(
        total=common + num_moe * config.num_experts * expert,
        active=common + num_moe * config.top_k * expert,
        router=routers,
    )


def _attention_parameters(config: ModelConfig) -> int:
    """Count the parameters of one attention layer, its norms of queries and keys included."""
    hidden, heads, extra = config.hidden, config.heads, config.attention
    width, kv_heads, latent = config.head_width(), config.kv_heads or config.heads, extra.latent
    if latent.is_on:
        query = hidden * heads * width
        if latent.query_rank is not None:
            query = latent.query_rank * (hidden + 1 + heads * width)
        down = (latent.rank + latent.rope_width) * hidden + latent.rank
        up = heads * (latent.plain_width + latent.value_width) * latent.rank
        return query + down + up + hidden * heads * latent.value_width
    rows = (heads + 2 * kv_heads) * width
    count = rows * hidden + hidden * heads * width + extra.sinks * heads
    count += rows * extra.qkv_bias + hidden * extra.out_bias
    norms = (heads + kv_heads) * width if extra.norm_whole else 2 * width
    return count + norms * config.qk_norm
