"""Published routers by name: the same values as conf/router/*.yaml, for use without a command.

A test holds the two equal. A preset does not set `model.top_k` nor the experts' activation.
"""

from gatewise.routers.config import (
    BalanceScope,
    RouterConfig,
    ScoreFunction,
)

__all__ = ["PRESETS", "preset"]


def preset(name: str) -> RouterConfig:
    """Return a published router's settings by name; raises `ValueError` for an unknown one."""
    try:
        settings = PRESETS[name]
    except KeyError:
        raise ValueError(
            f"router is {name!r}; known presets: {', '.join(sorted(PRESETS))}"
        ) from None
    return RouterConfig(**settings)  # type: ignore[arg-type]  # values are of mixed types


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
