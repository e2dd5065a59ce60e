"""Published routers by name: the same values as conf/router/*.yaml, for use without a command.

A test holds the two equal. A preset does not set `model.top_k` nor the experts' activation.
"""

import copy

from gatewise.routers.ahead.config import AheadConfig, AheadKind
from gatewise.routers.config import BalanceScope, RouterConfig, ScoreFunction, Scorer, Selector

__all__ = ["PRESETS", "preset"]


def preset(name: str) -> RouterConfig:
    """Return a published router's settings by name; raises `ValueError` for an unknown one."""
    try:
        settings = PRESETS[name]
    except KeyError:
        raise ValueError(
            f"router is {name!r}; known presets: {', '.join(sorted(PRESETS))}"
        ) from None
    # a copy: a section (ahead) is an object that the caller may change
    return RouterConfig(**copy.deepcopy(settings))  # type: ignore[arg-type]  # of mixed types


PRESETS: dict[str, dict[str, object]] = {
    "mixtral": {},
    "switch": {"renormalise": False, "z_loss": 0.0, "jitter": 0.01},
    "gshard": {
        "balance_scope": BalanceScope.micro_batch,
        "first_choice_loss": True,
        "random_second": True,
        "z_loss": 0.0,
    },
    "shazeer": {
        "learned_noise": True,
        "importance_loss": 0.1,
        "load_loss": 0.1,
        "balance_scope": BalanceScope.micro_batch,
        "balance_loss": 0.0,
        "z_loss": 0.0,
    },
    "qwen3": {"balance_loss": 0.001, "z_loss": 0.0},
    "deepseek_v3": {
        "score": ScoreFunction.sigmoid,
        "scale": 2.5,
        "bias_rate": 0.001,
        "balance_loss": 0.0001,
        "balance_scope": BalanceScope.sequence,
        "z_loss": 0.0,
    },
    "deepseek_v4": {
        "score": ScoreFunction.sqrt_softplus,
        "scale": 1.5,
        "hash_layers": 3,
        "bias_rate": 0.001,
        "balance_loss": 0.0001,
        "balance_scope": BalanceScope.sequence,
        "z_loss": 0.0,
    },
    "xmoe": {"scorer": Scorer.cosine, "z_loss": 0.0},
    "expert_choice": {
        "selector": Selector.expert_choice,
        "renormalise": False,
        "balance_loss": 0.0,
        "z_loss": 0.0,
    },
    "sinkhorn": {
        "selector": Selector.sinkhorn,
        "renormalise": False,
        "balance_loss": 0.0,
        "z_loss": 0.0,
    },
    "hash": {
        "scorer": Scorer.hash,
        "selector": Selector.hash,
        "balance_loss": 0.0,
        "z_loss": 0.0,
    },
    "sigma_moe": {
        "score": ScoreFunction.sigmoid,
        "renormalise": False,
        "expert_dropout": 0.05,
        "batch_entropy_loss": 0.001,
        "balance_scope": BalanceScope.micro_batch,
        "balance_loss": 0.0,
        "z_loss": 0.0,
    },
    "remoe": {
        "score": ScoreFunction.relu,
        "selector": Selector.threshold,
        "renormalise": False,
        "sparsity_rate": 1.2,
        "balance_loss": 1e-8,
        "z_loss": 0.0,
    },
    "top_p": {
        "selector": Selector.top_p,
        "renormalise": False,
        "top_p": 0.4,
        "token_entropy_loss": 0.0001,
        "z_loss": 0.0,
    },
    "moe_x": {"scorer": Scorer.sparsity, "z_loss": 0.0},
    "soft": {"selector": Selector.soft, "balance_loss": 0.0, "z_loss": 0.0},
    "rmoe": {"scorer": Scorer.recurrent, "state_dim": 128, "z_loss": 0.0},
    "readme_pregate": {"ahead": AheadConfig(kind=AheadKind.read_me, per_layer=False)},
    "gru_pregate": {"ahead": AheadConfig(kind=AheadKind.gru)},
}
