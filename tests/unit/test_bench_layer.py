import json
from pathlib import Path

import pytest
import torch

from gatewise.conf.compose import load_settings
from gatewise.launch.bench import run as run_bench
from gatewise.launch.bench import usage
from gatewise.launch.bench_cells import skewed_inputs
from gatewise.launch.bench_layer import LayerBenchConfig, run
from gatewise.launch.bench_peers import DENSE, OURS, Cell, Weights, build
from gatewise.moe.config import Activation
from gatewise.parallel.errors import ConfigError

FIELDS = {
    "experts",
    "top_k",
    "activation",
    "dtype",
    "threads",
    "candidate",
    "ms_median",
    "ratio_to_dense",
    "ratio_spread",
    "drops_tokens",
    "skew",
    "max_over_mean",
}


def test_a_run_writes_one_row_for_each_cell_and_candidate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["tokens=16", "hidden=8", "expert_width=8", "rounds=2"]
    lists = ["cells=4x2", "skewed=4x1", "skew=2", "dtypes=fp32", "activations=gelu", "threads=1"]
    code = run_bench(["layer", *sizes, *lists, "peers=loop", f"run.dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert code == 0, (tmp_path / "logs" / "layer.log").read_text()
    assert printed.splitlines()[-1] == str(tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["allocator"] == "tuned"
    assert [row["candidate"] for row in result["rows"]] == [DENSE, OURS, "loop"] * 2
    for row in result["rows"]:
        assert row.keys() >= FIELDS
        assert row["problem"] is None
        assert row["rounds"] >= 1
        assert row["ms_median"] > 0
    assert result["rows"][0]["ratio_to_dense"] == 1
    assert result["rows"][2]["output_error"] < 1e-5
    assert result["rows"][-1]["max_over_mean"] >= 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cells=8x9", "1 <= top_k <= experts"),
        ("cells=eight", "'eight'"),
        ("cells=", "cells is empty"),
        ("dtypes=fp16", "fp32 and bf16"),
        ("activations=silu", "swiglu, gelu, relu"),
        ("threads=1000", "cores"),
        ("skew=0.5", "at least 1"),
        ("skew=9", "with 8 experts"),
        ("rounds=0", "at least 1"),
        ("peers=tutle", "it takes auto, none"),
        ("cell=8x2", "did you mean 'cells'"),
        ("gradients=gone", "none, zero"),
    ],
)
def test_a_mistake_is_one_line_that_names_field_and_remedy(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as error:
        run([text])
    assert "\n" not in str(error.value)


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'layer'"):
        run_bench(["lyer"])


def test_help_lists_every_field() -> None:
    text = usage(["layer"])
    assert all(name in text for name in LayerBenchConfig.__dataclass_fields__ if name != "run")


@pytest.mark.parametrize("skew", [1.0, 3.2])
def test_inputs_have_the_skew_that_was_asked_for(skew: float) -> None:
    cell = _cell(skew=skew, tokens=2048, hidden=64, experts=8)
    _, _, measured = skewed_inputs(cell, torch.Generator().manual_seed(0))
    assert measured == pytest.approx(skew, abs=0.1 if skew > 1 else 0.3)


@pytest.mark.parametrize("activation", list(Activation))
def test_ours_and_the_loop_are_one_function_and_dense_has_as_many_active_weights(
    activation: Activation,
) -> None:
    cell = _cell(activation=activation, tokens=12)
    inner = 12 if activation is Activation.swiglu else 6
    torch.manual_seed(0)
    weights = Weights(torch.randn(4, 8), torch.randn(4, inner, 8), torch.randn(4, 8, 6))
    x_TD = torch.randn(12, 8)
    ours, loop, dense = (build(name, cell, weights) for name in (OURS, "loop", DENSE))
    assert ours is not None
    assert loop is not None
    assert dense is not None
    torch.testing.assert_close(ours.forward(x_TD), loop.forward(x_TD))
    active = cell.top_k * (weights.w_in_EGD[0].numel() + weights.w_out_EDF[0].numel())
    assert sum(parameter.numel() for parameter in dense.parameters) == active


def test_defaults_are_the_published_cells() -> None:
    config = load_settings(LayerBenchConfig)
    assert (config.tokens, config.hidden, config.expert_width) == (2048, 512, 1024)
    assert config.cells == "8x2,64x2,64x8"


def _cell(
    *,
    activation: Activation = Activation.swiglu,
    skew: float = 1.0,
    tokens: int = 16,
    hidden: int = 8,
    experts: int = 4,
) -> Cell:
    return Cell(
        experts=experts,
        top_k=2,
        activation=activation,
        dtype=torch.float32,
        threads=1,
        skew=skew,
        tokens=tokens,
        hidden=hidden,
        expert_width=6,
    )
