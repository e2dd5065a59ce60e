"""`gatewise bench kernels`: its rows, and what it refuses."""

import json
from pathlib import Path

import pytest

from gatewise.conf.compose import load_settings
from gatewise.launch.bench import run as run_bench
from gatewise.launch.bench_kernels import KernelBenchConfig
from gatewise.parallel.errors import ConfigError

FIELDS = {"candidate", "bits", "threads", "us_median", "speedup_vs_fp32", "relative_error"}


def test_a_run_writes_one_row_for_each_candidate_thread_count_and_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["rows=32", "columns=128", "rounds=2", "calls=2", "footprint_mb=0", "threads=1"]
    layer = ["hidden=64", "expert_width=32", "experts=4", "group=64", "bits=8,3,1"]
    code = run_bench(["kernels", *sizes, *layer, f"run.dir={tmp_path}"])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "result.json")
    assert code == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    matrix = ["fp32", "bf16", "torch int8pack", "torch int4pack"]
    matrix += [f"gatewise {bits} bit" for bits in (8, 3, 1)]
    whole = ["fp32", "fp32 loop", "bf16", "bf16 loop", "gatewise 2 bit"]
    assert [row["candidate"] for row in rows] == matrix * 2 + whole * 2
    assert [row["cache"] for row in rows] == (
        ["cold"] * 7 + ["hot"] * 7 + ["cold"] * 5 + ["hot"] * 5
    )
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["us_median"] > 0
        bound = {"fp32": 1e-5, "fp32 loop": 1e-5}.get(row["candidate"], 0.03)
        assert row["relative_error"] < bound, row
        if row["candidate"] == "fp32":
            assert row["speedup_vs_fp32"] == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("bits=5", "bits has '5'; it takes some of 1, 2, 3, 4, 8"),
        ("bits=", "bits is empty"),
        ("threads=999", "threads has '999'"),
        ("group=12", "group is 12; it must be a multiple of 8"),
        ("top_k=17", "experts is 16; it must be at least top_k"),
        ("calls=0", "calls is 0; it must be at least 1"),
    ],
)
def test_a_setting_that_cannot_work_is_named(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load_settings(KernelBenchConfig, [text])


def test_the_layer_can_be_left_out() -> None:
    assert load_settings(KernelBenchConfig, ["layer_bits="]).layer_bits == ""
