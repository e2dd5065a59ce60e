"""Settings of routing ahead of the layers: who decides, from what, and who weighs the experts.

Read `docs/pregating.md` for the classes R0 to R4.
"""

from dataclasses import dataclass
from enum import Enum

__all__ = [
    "AheadConfig",
    "AheadKind",
    "AheadTrunk",
    "AheadWeights",
    "Exchange",
    "HashFill",
]


class AheadKind(Enum):
    """Who chooses the experts of all layers before layer 0."""

    off = "off"  # nobody: each layer's router chooses when its input is there
    read_me = "read_me"  # a head on the trunk
    gru = "gru"  # a GRU over the layers, on the trunk
    hash = "hash"  # a table by token id


class AheadTrunk(Enum):
    """What a pre-gate knows of a token."""

    embedding = "embedding"  # the token id alone
    block = "block"  # its prefix: one causal transformer block on an embedding of its own


class AheadWeights(Enum):
    """Where the combine weights of the chosen experts come from."""

    layer = "layer"  # the layer's own router, restricted to the chosen experts
    pregate = "pregate"  # the pre-gate's scores; the layers have no router


class Exchange(Enum):
    """When ranks tell each other how many rows they will send."""

    layer = "layer"  # in every layer, as without a pre-gate
    micro_batch = "micro_batch"  # once before layer 0
    step = "step"  # once per optimizer step, for all its micro-batches


class HashFill(Enum):
    """How a table gives experts to token ids."""

    balanced = "balanced"  # so that every expert gets equally many tokens of the training text
    random = "random"  # by a hash of the id alone


@dataclass(kw_only=True, slots=True)
class AheadConfig:
    """Settings of the pre-gate; `kind=off` (the default) has none.

    With weights of the layers' own routers the pre-gate has no gradient from the language model:
    it learns to choose as these routers would (`distil`).
    """

    kind: AheadKind = AheadKind.off
    weights: AheadWeights = AheadWeights.layer
    per_layer: bool = True  # false: one decision for all layers
    trunk: AheadTrunk = AheadTrunk.block
    width: int = 128  # of the trunk
    heads: int = 4  # of the trunk's attention
    state: int = 128  # width of the GRU over layers
    distil: float = 1.0  # weight of KL(layer's router || pre-gate), mean over layers; 0 is off
    temperature: float = 1.0  # of both sides of it
    exchange: Exchange = Exchange.micro_batch
    fill: HashFill = HashFill.balanced  # of hash tables, where router.hash_table names no file

    def __post_init__(self) -> None:
        for name in ("width", "heads", "state"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"router.ahead.{name} is {value}; it must be at least 1")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"router.ahead.heads is {self.heads}; router.ahead.width ({self.width}) divided "
                "by it must be a whole even number"
            )
        if not self.distil >= 0:
            raise ValueError(f"router.ahead.distil is {self.distil}; it must be at least 0")
        if not self.temperature > 0:
            raise ValueError(f"router.ahead.temperature is {self.temperature}; it must be above 0")
        if self.kind is AheadKind.gru and not self.per_layer:
            raise ValueError(
                "router.ahead.per_layer is false, but the GRU of router.ahead.kind=gru decides "
                "layer by layer; set it to true, or use router.ahead.kind=read_me"
            )
        if self.kind is AheadKind.hash and self.weights is AheadWeights.pregate:
            raise ValueError(
                "router.ahead.weights is pregate, but a hash table has no scores; set it to layer"
            )

    @property
    def is_on(self) -> bool:
        """Tell whether experts are chosen before layer 0."""
        return self.kind is not AheadKind.off

    @property
    def weighs(self) -> bool:
        """Tell whether the weights come from the pre-gate, and the layers have no scorer."""
        return self.is_on and self.weights is AheadWeights.pregate

    @property
    def learns(self) -> bool:
        """Tell whether the pre-gate has parameters."""
        return self.kind in (AheadKind.read_me, AheadKind.gru)

    def decisions(self, layers: int) -> int:
        """Return how many different decisions a token gets in a model of `layers` MoE layers."""
        return layers if self.per_layer else min(1, layers)
