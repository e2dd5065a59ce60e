"""Settings of routers: what is refused, and the presets."""

from enum import Enum
from importlib.resources import files

import pytest
import yaml

from gatewise.routers.config import BalanceScope, RouterConfig, ScoreFunction
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
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(
    settings: dict[str, float], field: str
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
    ],
)
def test_a_setting_that_does_not_fit_the_layer_is_named(
    settings: dict[str, int], num_experts: int, top_k: int, field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        RouterConfig(**settings).check(num_experts, top_k)  # type: ignore[arg-type]


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known presets: deepseek_v3, mixtral, qwen3, switch"):
        preset("mixtrall")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_equals_the_file_of_the_command_line(name: str) -> None:
    text = files("gatewise.conf").joinpath("router", f"{name}.yaml").read_text()
    settings = {
        key: value for key, value in (yaml.safe_load(text) or {}).items() if key != "defaults"
    }
    config = preset(name)
    for key, value in settings.items():
        have = getattr(config, key)
        assert (have.name if isinstance(have, Enum) else have) == value, key
    plain = RouterConfig()
    unnamed = set(RouterConfig.__dataclass_fields__) - settings.keys()
    assert {key for key in unnamed if getattr(config, key) != getattr(plain, key)} == set()


def test_presets_hold_the_published_choices() -> None:
    assert preset("mixtral") == RouterConfig()
    assert not preset("switch").renormalise
    deepseek = preset("deepseek_v3")
    assert deepseek.score is ScoreFunction.sigmoid
    assert deepseek.balance_scope is BalanceScope.sequence
    assert (deepseek.scale, deepseek.bias_rate, deepseek.balance_loss) == (2.5, 1e-3, 1e-4)
