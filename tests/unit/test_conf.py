"""Composition of the settings: every file composes, every mistake is one clear line."""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from gatewise.conf.compose import (
    config_from_yaml,
    config_to_yaml,
    group_choices,
    load_settings,
    load_train_config,
    override_config,
)
from gatewise.conf.fields import field_table
from gatewise.moe.config import ModelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.routers.config import BalanceScope
from gatewise.routers.presets import PRESETS, preset
from gatewise.training.config import Precision, RunConfig, TrainConfig

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_comes_back_from_yaml(experiment: str) -> None:
    config = load_train_config([f"experiment={experiment}"])
    assert config.name == experiment
    assert config_from_yaml(config_to_yaml(config)) == config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_router_files_hold_the_values_of_the_presets(name: str) -> None:
    config = preset(name)
    config.allow_noncausal = config.competing  # else refused
    flag = str(config.allow_noncausal).lower()
    overrides = [f"router={name}", f"router.allow_noncausal={flag}"]
    assert load_train_config(overrides).router == config


def test_there_is_one_router_file_for_each_preset() -> None:
    assert group_choices("router") == sorted(PRESETS)


def test_without_overrides_the_defaults_of_the_dataclasses_hold() -> None:
    assert load_train_config() == TrainConfig()


def test_the_command_line_wins_over_the_experiment_in_any_order() -> None:
    first = load_train_config(["experiment=tiny", "model.layers=3", "steps=5"])
    last = load_train_config(["steps=5", "model.layers=3", "experiment=tiny"])
    assert first == last
    assert (first.model.layers, first.steps, first.model.hidden) == (3, 5, 32)


def test_a_named_router_replaces_all_of_the_experiments_router() -> None:
    config = load_train_config(["experiment=tiny", "router=deepseek_v3"])
    assert config.router == preset("deepseek_v3")


def test_a_field_of_the_router_wins_over_the_named_router() -> None:
    config = load_train_config(["router=deepseek_v3", "router.balance_scope=micro_batch"])
    assert config.router.balance_scope is BalanceScope.micro_batch
    assert config.router.bias_rate == preset("deepseek_v3").bias_rate


def test_the_later_of_two_values_wins() -> None:
    assert load_train_config(["steps=3", "steps=4"]).steps == 4


def test_text_is_taken_as_it_stands() -> None:
    overrides = ["data.path=a, (b) c=d*.txt", "run.dir='my runs/x'", "name=${wandb.project}-1"]
    config = load_train_config(overrides)
    assert config.data.path == "a, (b) c=d*.txt"
    assert config.run.dir == "my runs/x"
    assert config.name == "gatewise-1"


def test_values_are_parsed_by_the_fields_type() -> None:
    config = load_train_config(
        ["optim.lr=1e-4", "batch.micro=null", "recompute=True", "precision=bf16", "+seed=7"]
    )
    assert (config.optim.lr, config.batch.micro, config.recompute) == (1e-4, None, True)
    assert config.precision is Precision.bf16
    assert config.seed == 7


MISTAKES = {
    "modle.layers=3": ["modle.layers", "did you mean 'model.layers'"],
    "model.num_expert=8": ["did you mean 'model.num_experts'"],
    "layers=3": ["did you mean 'model.layers'"],
    "expirement=tiny": ["did you mean 'experiment'"],
    "model=3": ["model is a section", "model.layers"],
    "steps=abc": ["steps is 'abc'", "a whole number"],
    "steps=1,2": ["steps is '1,2'", "a whole number"],
    "steps=1.5": ["steps is '1.5'", "a whole number"],
    "optim.lr=fast": ["optim.lr is 'fast'", "a number"],
    "recompute=maybe": ["recompute is 'maybe'", "true or false"],
    "batch.micro=few": ["a whole number or null"],
    "precision=bf61": ["fp32, bf16, fp64, auto", "did you mean 'bf16'"],
    "router=mixtrl": ["deepseek_v3, ", "did you mean 'mixtral'"],
    "experiment=tny": ["did you mean 'tiny'"],
    "router=null": ["router is 'null'"],
    "router.kind=hash": ["router.kind is 'hash'", "topk"],
    "+new=1": ["unknown setting 'new'"],
    "~steps": ["'~steps'"],
    "-m": ["unknown option '-m'"],
    "steps": ["write steps=..."],
    "hydra.run.dir=x": ["run.dir"],
    "model.layers=0": ["model.layers is 0", "at least 1"],
    "optim.lr=-1": ["optim.lr is -1.0", "above 0"],
    "batch.sequences=0": ["batch.sequences is 0"],
    "model.num_experts=7 parallel.ranks=2 parallel.expert=2": ["model.num_experts is 7"],
    "parallel.ranks=3 parallel.expert=2": ["parallel.expert is 2", "parallel.ranks"],
    "parallel.ranks=32": ["parallel.ranks is 32", "batch.sequences"],
    "model.expert_width=30 parallel.ranks=4 parallel.expert_shard=4": [
        "model.expert_width is 30",
        "parallel.expert_shard (4)",
        "[1, 2]",
    ],
    "model.heads=2 parallel.ranks=4 parallel.tensor=4": [
        "model.heads is 2, which parallel.tensor (4)",
        "parallel.tensor from [1, 2]",
    ],
    "model.kv_heads=2 parallel.ranks=4 parallel.tensor=4": ["model.kv_heads is 2", "multiple of 4"],
    "data.sequence_length=63 parallel.ranks=2 parallel.tensor=2": ["data.sequence_length is 63"],
    "batch.sequences=3 parallel.ranks=4 parallel.tensor=2": [
        "parallel.ranks / parallel.tensor (2)"
    ],
    "router=gru_pregate parallel.ranks=2 parallel.tensor=2": ["router.ahead.kind=off"],
    "router=soft router.allow_noncausal=true parallel.ranks=2 parallel.tensor=2": [
        "router.selector=soft"
    ],
    "parallel.ranks=4 parallel.dispatch=tree": ["'tree'", "direct, 1dh, 2dh"],
    "seed=${nothing}": ["seed", "nothing"],
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_one_line_with_field_and_remedy(overrides: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train_config(overrides.split())
    message = str(caught.value)
    assert "\n" not in message
    for words in MISTAKES[overrides]:
        assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not readable YAML"),
        ("[1, 2]", "mapping"),
        ("", "mapping"),
        ("modle: {layers: 3}", "did you mean 'model.layers'"),
        ("model: {layers: many}", "model.layers"),
        ("router: {kind: hash}", "router.kind is 'hash'"),
        ("steps: -1", "steps is -1"),
    ],
)
def test_a_stored_configuration_that_is_wrong_names_its_file(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_yaml(text, source="old/config.yaml")
    assert words in str(caught.value)
    assert words == "steps is -1" or "old/config.yaml" in str(caught.value)


def test_a_stored_configuration_with_fewer_fields_gets_their_defaults() -> None:
    assert config_from_yaml("steps: 3") == TrainConfig(steps=3)


def test_a_run_is_changed_only_where_the_command_allows() -> None:
    config = load_train_config(["experiment=tiny"])
    changed = override_config(config, ["evaluation.stride=8"], sections=("evaluation",))
    assert changed.evaluation.stride == 8
    assert changed.model == config.model
    with pytest.raises(ConfigError, match=r"model\.layers is the checkpoint's"):
        override_config(config, ["model.layers=8"], sections=("evaluation",))


@dataclass(kw_only=True, slots=True)
class Small:
    count: int = 3  # how many
    factor: float | None = None
    run: RunConfig = field(default_factory=RunConfig)


def test_settings_of_a_small_command_are_read_alike() -> None:
    assert load_settings(Small, ["count=4", "factor=0.5", "run.dir=x"]) == Small(
        count=4, factor=0.5, run=RunConfig(dir="x")
    )
    with pytest.raises(ConfigError, match="did you mean 'count'"):
        load_settings(Small, ["cuont=4"])


def test_the_meaning_of_a_field_is_the_comment_behind_it() -> None:
    assert field_table(Small)["count"].meaning == "how many"
    assert "ranks" in field_table(TrainConfig())["parallel.expert"].meaning


def test_the_table_holds_every_leaf_of_the_tree() -> None:
    def leaves(owner: Any, prefix: str = "") -> list[str]:
        names: list[str] = []
        for item in fields(owner):
            value = getattr(owner, item.name)
            name = f"{prefix}{item.name}"
            names += leaves(value, f"{name}.") if is_dataclass(value) else [name]
        return names

    assert list(field_table(TrainConfig())) == leaves(TrainConfig())


def test_a_value_error_of_a_lower_layer_is_a_config_error() -> None:
    with pytest.raises(ValueError, match="heads"):
        ModelConfig(heads=3)
    with pytest.raises(ConfigError, match="heads"):
        load_train_config(["model.heads=3"])
