"""Engines: what is refused before ranks start, and which fused parts are chosen."""

import importlib.metadata
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from training_runs import tiny

from gatewise.launch import engines
from gatewise.launch.cli import main
from gatewise.moe.attention import RMSNorm, rms_norm
from gatewise.parallel.errors import ConfigError
from gatewise.training.apex_package import find_apex
from gatewise.training.config import DeepSpeedConfig, EngineKind
from gatewise.training.fused import choose_fused, use_norms
from gatewise.training.schedule_config import ScheduleConfig


def zero(**settings: object) -> None:
    tiny(**{"ranks": 4, "expert": 2, "engine": EngineKind.deepspeed, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranks": 1, "expert": 1}, "parallel.ranks is 1"),
        ({"shard": 2}, "parallel.shard is 2"),
        ({"parallel": {"tensor": 2}}, "parallel.tensor is 2"),
        (
            {"schedule": ScheduleConfig(policy="fsmoe", profile="costs.json")},
            "schedule.profile is set",
        ),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_with_a_remedy(
    settings: dict[str, object], words: str
) -> None:
    zero()
    with pytest.raises(ConfigError, match=words) as caught:
        zero(**settings)
    assert "engine=gatewise" in str(caught.value)
    tiny(**{"ranks": 4, **settings})  # type: ignore[arg-type]  # our own engine can


@pytest.mark.parametrize(("stage", "words"), [(3, "its own MoE layers"), (0, "must be 1 or 2")])
def test_other_stages_of_zero_are_refused(stage: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DeepSpeedConfig(stage=stage)


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def find(name: str) -> str:
        if name == "deepspeed" and version is not None:
            return version
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(engines.importlib.metadata, "version", find)


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "the package deepspeed is not installed"), ("0.18.9", "older than 0.19")],
)
def test_a_missing_or_old_deepspeed_is_one_line_before_ranks_start(
    version: str | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, version)
    command = ["train", "experiment=tiny", "parallel.ranks=2", "engine=deepspeed"]
    assert main([*command, f"run.dir={tmp_path}"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "pip install -e '.[deepspeed]'" in error
    assert len(error.splitlines()) == 1


def test_without_ninja_or_a_compiler_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(ranks=2, engine=EngineKind.deepspeed)
    install(monkeypatch, "0.19.8")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engines.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    monkeypatch.setattr(engines, "find_compiler", lambda: "/usr/bin/g++")
    with pytest.raises(ConfigError, match="needs ninja"):
        engines.check_engine(config)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "ninja").touch(0o755)
    engines.check_engine(config)
    assert engines.shutil.which("ninja") == str(tmp_path / "scripts" / "ninja")
    monkeypatch.setattr(engines, "find_compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        engines.check_engine(config)


# --- Apex


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
    """Make packages that can be found, but not used."""
    for part in ("apex", *parts):
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)


def test_without_apex_torchs_are_chosen_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fused = choose_fused(torch.device("cpu"))
    assert (fused.adam, fused.norm) == (None, rms_norm)
    assert "optimizer: torch's fused AdamW; norms: torch's" in caplog.text


def test_an_unrelated_apex_is_named_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(tmp_path, monkeypatch)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.10.dev0")
    for device in ("cpu", "cuda"):
        assert choose_fused(torch.device(device)).adam is None
    assert "apex 0.9.10.dev0 is not NVIDIA's Apex but an unrelated one" in caplog.text


def test_parts_of_apex_that_were_not_built_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(tmp_path, monkeypatch, "apex/optimizers", "apex/normalization", "fused_layer_norm_cuda")
    package = find_apex()
    assert (package.nvidia, package.fused_adam, package.fused_norms) == (True, False, True)
    assert package.problem is not None
    assert "amp_C" in package.problem
    assert choose_fused(torch.device("cpu")).norm is rms_norm  # its kernels are CUDA's
    assert package.problem not in caplog.text


def test_the_norm_of_apex_takes_the_place_of_torchs_where_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(
        tmp_path,
        monkeypatch,
        "apex/optimizers",
        "apex/normalization",
        "amp_C",
        "fused_layer_norm_cuda",
    )
    calls = []

    def fused_rms_norm_affine(
        x: torch.Tensor, gain: torch.Tensor, shape: torch.Size, eps: float
    ) -> torch.Tensor:
        calls.append(shape)
        return F.rms_norm(x, shape, gain, eps)

    for name, content in (
        ("apex.optimizers", {"FusedAdam": torch.optim.AdamW}),
        ("apex.normalization.fused_layer_norm", {"fused_rms_norm_affine": fused_rms_norm_affine}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    fused = choose_fused(torch.device("cuda"))
    assert fused.adam is torch.optim.AdamW
    assert str(fused) == "optimizer: NVIDIA Apex's FusedAdam; norms: NVIDIA Apex's"
    norm, x = RMSNorm(8, 1e-5), torch.randn(3, 8, dtype=torch.bfloat16)
    before = norm(x)
    use_norms(norm, fused.norm)
    assert torch.equal(norm(x), before)
    assert calls == [(8,)]
