"""Settings of a token-choice router.

Read `api.py` for what a router returns, `topk.py` for the arithmetic.
"""

from dataclasses import dataclass
from enum import Enum

__all__ = ["PRESETS", "BalanceScope", "RouterConfig", "ScoreFunction", "preset"]


class ScoreFunction(Enum):
    """How logits become scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class BalanceScope(Enum):
    """Over which tokens the load of the balance loss is counted."""

    micro_batch = "micro_batch"
    sequence = "sequence"
    global_batch = "global_batch"


@dataclass(kw_only=True, slots=True)
class RouterConfig:
    """Settings of the top-k router; defaults are Mixtral's with a global-batch balance loss.

    Routers raise `ValueError` here for what they can know alone; the number of experts and top_k
    belong to the layer and are checked in `check`.
    """

    kind: str = "topk"
    score: ScoreFunction = ScoreFunction.softmax
    renormalise: bool = True  # divide the chosen scores by their sum (DeepSeek-V3, Mixtral)
    scale: float = 1.0  # multiplies the combine weights after renormalisation
    num_groups: int = 1  # group-limited selection: experts are cut into this many groups
    top_groups: int = 1  # ... of which each token may use this many
    bias_rate: float = 0.0  # step of the balancing bias per optimizer step; 0 is off
    balance_loss: float = 0.01  # weight of the balance loss; 0 is off
    balance_scope: BalanceScope = BalanceScope.global_batch
    z_loss: float = 0.001  # weight of mean(logsumexp(logits)^2); 0 is off
    jitter: float = 0.0  # multiply the router's input by U(1-jitter, 1+jitter) in training

    def __post_init__(self) -> None:
        for name in ("bias_rate", "balance_loss", "z_loss"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"router.{name} is {value}; it must be at least 0")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"router.jitter is {self.jitter}; it must be in [0, 1)")
        if not self.scale > 0:
            raise ValueError(f"router.scale is {self.scale}; it must be above 0")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"router.top_groups is {self.top_groups}; it must be from 1 to "
                f"router.num_groups ({self.num_groups})"
            )

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise `ValueError` where these settings do not fit `num_experts` and `top_k`."""
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"model.top_k is {top_k}; it must be from 1 to model.num_experts ({num_experts})"
            )
        if num_experts % self.num_groups:
            raise ValueError(
                f"router.num_groups is {self.num_groups}, which does not divide "
                f"model.num_experts ({num_experts}); choose a divisor"
            )
        reachable = num_experts // self.num_groups * self.top_groups
        if top_k > reachable:
            raise ValueError(
                f"model.top_k is {top_k} but router.top_groups={self.top_groups} leaves only "
                f"{reachable} experts to choose from; raise router.top_groups"
            )


def preset(name: str) -> RouterConfig:
    """Return a published router's settings by name; raises `ValueError` for an unknown one."""
    try:
        settings = PRESETS[name]
    except KeyError:
        raise ValueError(
            f"router is {name!r}; known presets: {', '.join(sorted(PRESETS))}"
        ) from None
    return RouterConfig(**settings)  # type: ignore[arg-type]  # values are of mixed types


# The same values as conf/router/*.yaml, for people who use the layer without the command line;
# a test holds the two equal.
PRESETS: dict[str, dict[str, object]] = {
    "mixtral": {},
    "switch": {"renormalise": False, "z_loss": 0.0, "jitter": 0.01},
    "qwen3": {"balance_loss": 0.001, "z_loss": 0.0},
    "deepseek_v3": {
        "score": ScoreFunction.sigmoid,
        "scale": 2.5,
        "bias_rate": 0.001,
        "balance_loss": 0.0001,
        "balance_scope": BalanceScope.sequence,
        "z_loss": 0.0,
    },
}
