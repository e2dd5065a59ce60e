"""Folders of other programs: out and in again, and what is wrong with one is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_runs import drawn_model, make_run, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from gatewise.launch.cli import main
from gatewise.launch.restore import open_checkpoint, restore_model
from gatewise.moe.attention_config import AttentionConfig, LatentConfig
from gatewise.moe.config import Activation, ModelConfig
from gatewise.parallel.errors import ConfigError
from gatewise.routers.config import RouterConfig
from gatewise.routers.presets import preset
from gatewise.training.interop import hand_out
from gatewise.training.interop.families import choose_family
from gatewise.training.interop.names import GateUpColumns, RotaryRows, Transposed, list_pieces

SIZES: dict[str, Any] = {
    "layers": 2,
    "hidden": 16,
    "heads": 4,
    "kv_heads": 2,
    "num_experts": 4,
    "expert_width": 8,
    "tie_embeddings": False,
}
MIXTRAL = ModelConfig(**SIZES, qk_norm=False)
LATENT = LatentConfig(rank=6, query_rank=5, plain_width=4, rope_width=2, value_width=3)
BODIES = {
    "llama": ModelConfig(**SIZES | {"num_experts": 0}, qk_norm=False),
    "qwen2": ModelConfig(
        **SIZES | {"num_experts": 0}, qk_norm=False, attention=AttentionConfig(qkv_bias=True)
    ),
    "mixtral": MIXTRAL,
    "olmoe": ModelConfig(**SIZES, attention=AttentionConfig(norm_whole=True)),
    "qwen2_moe": ModelConfig(
        **SIZES,
        qk_norm=False,
        shared_experts=1,
        shared_width=6,
        shared_gate=True,
        dense_layers=1,
        attention=AttentionConfig(qkv_bias=True),
    ),
    "qwen3_moe": ModelConfig(**SIZES, attention=AttentionConfig(head_width=6)),
    "deepseek_v3": ModelConfig(
        **SIZES | {"kv_heads": None},
        shared_experts=2,
        dense_layers=1,
        attention=AttentionConfig(latent=LATENT),
    ),
    "gpt_oss": ModelConfig(
        **SIZES,
        qk_norm=False,
        clamped_experts=True,
        attention=AttentionConfig(qkv_bias=True, out_bias=True, sinks=True, window=4, full_every=2),
    ),
}
ROUTERS = {
    "deepseek_v3": preset("deepseek_v3"),
    "gpt_oss": RouterConfig(logit_bias=True),
}


def convert(*arguments: str) -> int:
    return main(["convert", *arguments])


def to_hf(run: Path, out: Path, *more: str) -> int:
    return convert("to_hf", f"checkpoint={run}", f"out={out}", f"run.dir={out}.run", *more)


def from_hf(source: Path, run: Path, *more: str) -> int:
    return convert("from_hf", f"source={source}", f"run.dir={run}", *more)


def loaded(run: Path) -> dict[str, Tensor]:
    return state_of(restore_model(open_checkpoint(str(run)), device=torch.device("cpu")))


@pytest.mark.parametrize("kind", BODIES)
def test_a_model_comes_back_from_a_folder_bit_for_bit(kind: str, tmp_path: Path) -> None:
    router = ROUTERS.get(kind, RouterConfig())
    decoder = drawn_model(BODIES[kind], router)
    run, _ = make_run(tmp_path / "run", decoder, biases=kind == "deepseek_v3")
    assert to_hf(run, tmp_path / "out", "shard_gb=0.000004") == 0
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (record["model_type"], "gatewise" in record) == (kind, False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    family, _ = choose_family(BODIES[kind], router)
    pieces = list_pieces(family, BODIES[kind], router, 257)
    assert index["weight_map"].keys() == {piece.theirs for piece in pieces}
    assert from_hf(tmp_path / "out", tmp_path / "back") == 0
    before, after = loaded(run), loaded(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("kind", BODIES)
def test_pieces_fill_each_tensor_exactly_once(kind: str) -> None:
    model, router = BODIES[kind], ROUTERS.get(kind, RouterConfig())
    family, differences = choose_family(model, router)
    assert (family.kind, differences) == (kind, [])
    state = state_of(drawn_model(model, router))
    filled = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in state.items()}
    for piece in list_pieces(family, model, router, 257):
        ones = torch.ones(piece.shape, dtype=torch.int64)
        piece.place(filled[piece.ours]).add_(piece.turn.to_ours(ones))
    for name, count in filled.items():
        alone = name.startswith("bias/") and kind != "deepseek_v3"
        assert bool((count == (0 if alone else 1)).all()), name


@pytest.mark.parametrize(
    "turn", [Transposed(), GateUpColumns(), GateUpColumns(is_bias=True), RotaryRows(2, 4)]
)
def test_a_turn_undoes_itself(turn: Any) -> None:
    theirs = torch.arange(2 * 12 * 8.0).view(2, 12, 8)
    part = theirs[0] if isinstance(turn, RotaryRows) else theirs
    assert torch.equal(turn.to_theirs(turn.to_ours(part)), part)


def test_rotary_pairs_become_halves() -> None:
    rows = torch.arange(10).unsqueeze(1)
    assert RotaryRows(1, 4).to_ours(rows).flatten().tolist() == [0, 1, 3, 2, 4, 5, 6, 8, 7, 9]


@pytest.mark.parametrize(
    ("router", "reason", "tensor"),
    [
        (preset("rmoe"), "router.scorer is recurrent", "model/router_cell.weight_ih"),
        (preset("gru_pregate"), "a pre-gate (gru)", "model/ahead"),
        (preset("deepseek_v3"), "router.score is sigmoid", "bias/blocks.0.feed_forward.router"),
        (
            RouterConfig(bias_rate=0.01),
            "the routers choose with a bias",
            "bias/blocks.0.feed_forward.router",
        ),
    ],
    ids=["recurrent", "pre-gate", "sigmoid", "bias"],
)
def test_state_without_a_place_travels_beside_and_is_named(
    router: RouterConfig,
    reason: str,
    tensor: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decoder = drawn_model(MIXTRAL, router)
    run, _ = make_run(tmp_path / "run", decoder, biases=True)
    assert to_hf(run, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"transformers computes something else: {reason}" in said
    assert any(name.startswith(tensor) for name in load_file(tmp_path / "out/gatewise.safetensors"))
    assert from_hf(tmp_path / "out", tmp_path / "back") == 0
    before, after = loaded(run), loaded(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert open_checkpoint(str(tmp_path / "back")).config.router == router


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sharded folder of Mixtral's layout with a sidecar."""
    folder = tmp_path_factory.mktemp("good")
    run, _ = make_run(folder / "run", drawn_model(MIXTRAL, preset("rmoe")))
    assert to_hf(run, folder / "out", "shard_gb=0.00002") == 0
    return folder / "out"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder's first file, and its index with them."""
    index = folder / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    file = sorted(set(record["weight_map"].values()))[0]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    others = {name: where for name, where in record["weight_map"].items() if where != file}
    record["weight_map"] = others | dict.fromkeys(tensors, file)
    index.write_text(json.dumps(record))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


EMBEDDING = "model.embed_tokens.weight"


def _lose(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(EMBEDDING))


def _add(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))


def _reshape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({EMBEDDING: torch.ones(3, 16)}))


def _retype(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({EMBEDDING: torch.ones(257, 16).int()}))


def _lose_file(folder: Path) -> None:
    sorted(folder.glob("model-*"))[1].unlink()


def _cut_file(folder: Path) -> None:
    file = sorted(folder.glob("model-*"))[1]
    file.write_bytes(file.read_bytes()[:-7])


def _old_form(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"old")


def _lose_sidecar(folder: Path) -> None:
    (folder / "gatewise.safetensors").unlink()


def _lose_key(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    record.pop("gatewise")
    (folder / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose, f"1 tensor is missing ({EMBEDDING})"),
        (_add, "1 tensor is not of this model (model.extra.weight)"),
        (_reshape, f"1 tensor is of another shape ({EMBEDDING} is [3, 16], not [257, 16])"),
        (_retype, f"1 tensor is of a type other than F32, F16, BF16 ({EMBEDDING} is I32)"),
        (_lose_file, "model.safetensors.index.json names model-00002-of-"),
        (_cut_file, "bytes long, not"),
        (_old_form, "pytorch_model.bin, the form of old versions"),
        (_lose_sidecar, "config.json names gatewise.safetensors, which is absent"),
        (_lose_key, "holds gatewise.safetensors, but its config.json has no key"),
        (lambda f: edit_config(f, model_type="bert"), "model_type 'bert'"),
        (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
        (
            lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
            "quantization_config is 'gptq'; this version dequantises fp8 and mxfp4",
        ),
        (lambda f: edit_config(f, num_local_experts=8), "8 tensors are missing"),
        (lambda f: edit_config(f, gatewise={"format": 9}), "of format 9; this version reads 1"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    ],
    ids=lambda value: value.replace(" ", "_")[:30] if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_folder_is_named_and_nothing_is_left(
    damage: Callable[[Path], object],
    message: str,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(good, tmp_path / "source")
    damage(tmp_path / "source")
    assert from_hf(tmp_path / "source", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    if message.startswith("8 tensors"):  # also of the sidecar, whose settings differ
        assert "config.json says one thing" in line
    else:
        assert message in line
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_failed_export_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path / "run", drawn_model(MIXTRAL, RouterConfig()))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hand_out, "write_sidecar", full)
    assert to_hf(run, tmp_path / "out") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out")) + list(tmp_path.glob(".*out*"))


def test_a_folder_that_exists_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path / "run", drawn_model(MIXTRAL, RouterConfig()))
    (tmp_path / "out").mkdir()
    assert to_hf(run, tmp_path / "out") == 2
    assert "which exists; remove it" in capsys.readouterr().err
    assert from_hf(tmp_path, run) == 2
    assert "holds checkpoints already" in capsys.readouterr().err


def test_a_body_without_a_layout_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"model\.activation is gelu, not swiglu"):
        choose_family(ModelConfig(activation=Activation.gelu), RouterConfig())
