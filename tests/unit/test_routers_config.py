"""Settings of routers: what is refused, and the presets."""

from dataclasses import replace

import pytest

from gatewise.conf.compose import load_train_config
from gatewise.routers.config import (
    BalanceScope,
    BiasRule,
    RouterConfig,
    ScoreFunction,
    Scorer,
    Selector,
)
from gatewise.routers.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"bias_rate": -0.1}, "router.bias_rate is -0.1"),
        ({"balance_loss": float("nan")}, "router.balance_loss is nan"),
        ({"z_loss": -1.0}, "router.z_loss is -1.0"),
        ({"jitter": 1.0}, "router.jitter is 1.0"),
        ({"scale": 0.0}, "router.scale is 0.0"),
        ({"num_groups": 2, "top_groups": 3}, "router.top_groups is 3"),
        ({"top_p": 0.0}, "router.top_p is 0.0"),
        ({"top_p": 1.5}, "router.top_p is 1.5"),
        ({"expert_dropout": 1.0}, "router.expert_dropout is 1.0"),
        ({"state_dim": 0}, "router.state_dim is 0"),
        ({"cosine_dim": 0}, "router.cosine_dim is 0"),
        ({"choice_factor": 0.0}, "router.choice_factor is 0.0"),
        ({"sparsity_rate": 0.5}, "router.sparsity_rate is 0.5"),
        ({"sparsity_rate": 1.2, "balance_loss": 0.0}, "router.balance_loss is 0.0"),
        ({"bias_rule": BiasRule.quantile, "bias_rate": 2.0}, "router.bias_rate is 2.0"),
        ({"bias_rule": BiasRule.quantile, "num_groups": 2}, "router.num_groups is 2"),
        ({"selector": Selector.threshold}, "router.selector is threshold"),
        ({"selector": Selector.top_p, "score": ScoreFunction.sigmoid}, "router.selector is top_p"),
        ({"selector": Selector.top_p, "num_groups": 2}, "router.num_groups is 2"),
        ({"selector": Selector.hash, "bias_rate": 0.1}, "router.bias_rate is 0.1"),
        ({"importance_loss": 0.1}, "set router.balance_scope"),
        ({"first_choice_loss": True}, "router.first_choice_loss is on"),
        ({"load_loss": 0.1, "balance_scope": BalanceScope.sequence}, "router.load_loss is 0.1"),
        ({"learned_noise": True, "scorer": Scorer.mlp}, "router.learned_noise is on"),
        ({"scorer": Scorer.hash}, "router.scorer is hash"),
        ({"selector": Selector.soft, "scorer": Scorer.mlp}, "router.selector is soft"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(
    settings: dict[str, object], field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        RouterConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "num_experts", "top_k", "field"),
    [
        ({}, 8, 0, "model.top_k is 0"),
        ({}, 8, 9, "model.top_k is 9"),
        ({"num_groups": 3}, 8, 2, "router.num_groups is 3"),
        ({"num_groups": 4, "top_groups": 1}, 8, 3, "leaves only 2 experts"),
        ({"selector": Selector.base, "allow_noncausal": True}, 8, 2, "selector=base gives one"),
        ({"random_second": True}, 8, 3, "router.random_second needs exactly 2"),
        ({"selector": Selector.sinkhorn}, 8, 2, "router.selector is sinkhorn"),
        ({"selector": Selector.expert_choice}, 8, 2, "router.selector is expert_choice"),
        ({"selector": Selector.soft}, 8, 2, "set router.allow_noncausal=true"),
    ],
)
def test_a_setting_that_does_not_fit_the_layer_is_named(
    settings: dict[str, object], num_experts: int, top_k: int, field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        RouterConfig(**settings).check(num_experts, top_k, causal=True)  # type: ignore[arg-type]


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"known presets: deepseek_v3, .*mixtral, .*xmoe"):
        preset("mixtrall")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_equals_the_file_of_the_command_line(name: str) -> None:
    config = load_train_config([f"router={name}", "router.allow_noncausal=true"])
    assert replace(preset(name), allow_noncausal=True) == config.router


def test_presets_hold_the_published_choices() -> None:
    assert preset("mixtral") == RouterConfig()
    assert not preset("switch").renormalise
    deepseek = preset("deepseek_v3")
    assert deepseek.score is ScoreFunction.sigmoid
    assert deepseek.balance_scope is BalanceScope.sequence
    assert (deepseek.scale, deepseek.bias_rate, deepseek.balance_loss) == (2.5, 1e-3, 1e-4)
