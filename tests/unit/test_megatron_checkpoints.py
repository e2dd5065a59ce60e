"""Megatron-core's distributed checkpoints in and out: layout by a slow truth, and its own model."""

import importlib.util
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder
from gatewise.moe.parallelize import build_model
from gatewise.parallel.collectives import NO_GROUP
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.parallel.runtime import answering_for_cuda
from gatewise.routers.ahead.config import AheadConfig, AheadKind
from gatewise.routers.config import RouterConfig, ScoreFunction, Scorer
from gatewise.training.checkpoint_weights import WeightReader, write_weights
from gatewise.training.megatron.convert import take_in
from gatewise.training.megatron.files import write_files
from gatewise.training.state import model_ranges

IDS, PADDED = 21, 32
MODEL = ModelConfig(
    layers=2,
    hidden=16,
    heads=4,
    kv_heads=2,
    num_experts=4,
    top_k=2,
    expert_width=12,
    qk_norm=True,
    tie_embeddings=False,
    init_std=0.3,
)
ROUTER = RouterConfig(score=ScoreFunction.sigmoid, bias_rate=0.001)
GRU = RouterConfig(scorer=Scorer.recurrent, state_dim=8)


def draw(router: RouterConfig = ROUTER, model: ModelConfig = MODEL) -> dict[str, Tensor]:
    """Return the tensors of a model of ours, biases too, by their names in checkpoints."""
    decoder: Decoder = build_model(
        model,
        router,
        vocab_size=IDS,
        group=NO_GROUP,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=4,
    )
    ranges = model_ranges(decoder)
    found = {name: part.data.view(part.shape).clone() for name, part in ranges.items()}
    for name, tensor in found.items():
        if name.endswith("gain") or (name.startswith("bias/") and router.bias_rate):
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9)) / 4)
    return found


def theirs(ours: dict[str, Tensor], *, apart: bool) -> dict[str, Tensor]:
    """Return Megatron's tensors, written out row by row."""
    width, share = 4, 2  # of a head; query heads per key-value head
    names = {
        "norm_attention.gain": "self_attention.linear_qkv.layer_norm_weight",
        "attention.w_out": "self_attention.linear_proj.weight",
        "attention.norm_q.gain": "self_attention.q_layernorm.weight",
        "attention.norm_k.gain": "self_attention.k_layernorm.weight",
        "norm_feed_forward.gain": "pre_mlp_layernorm.weight",
        "feed_forward.experts.w_in_eGD": "mlp.experts.experts.linear_fc1.weight",
        "feed_forward.experts.w_out_eDF": "mlp.experts.experts.linear_fc2.weight",
        "feed_forward.router.weight": "mlp.router.weight",
    }
    layers = []
    for layer in range(2):
        block = f"model/blocks.{layer}."
        found = {name: ours[block + mine] for mine, name in names.items()}
        qkv_ND, rows = ours[f"{block}attention.w_qkv"], []
        for group in range(2):
            for head in (group * share, group * share + 1, 4 + group, 6 + group):
                rows += [qkv_ND[head * width + row] for row in range(width)]
        found["self_attention.linear_qkv.weight"] = torch.stack(rows)
        found["mlp.router.expert_bias"] = ours[f"bias/blocks.{layer}.feed_forward.router"]
        layers.append(found)
    result = {
        "decoder.final_layernorm.weight": ours["model/norm_final.gain"],
        "embedding.word_embeddings.weight": torch.zeros(PADDED, 16),
        "output_layer.weight": torch.zeros(PADDED, 16),
    }
    result["embedding.word_embeddings.weight"][:IDS] = ours["model/embedding"]
    result["output_layer.weight"][:IDS] = ours["model/head"]
    for name in layers[0]:
        if apart:
            result |= {f"decoder.layers.{i}.{name}": found[name] for i, found in enumerate(layers)}
        else:
            result[f"decoder.layers.{name}"] = torch.stack([found[name] for found in layers])
    return result


def write(folder: Path, tensors: dict[str, Tensor], backend: str = "torch_dist") -> Path:
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    said = {"sharded_backend": backend, "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(said))
    return folder


def take(source: Path, folder: Path, router: RouterConfig = ROUTER) -> dict[str, Tensor]:
    path = take_in(source, MODEL, router, IDS, folder=folder / "checkpoints", meta={})
    reader = WeightReader(path)
    return {name: reader.read(name).clone() for name in reader.specs}


@pytest.mark.parametrize("apart", [False, True])
def test_layers_together_or_apart_come_in_bit_for_bit(apart: bool, tmp_path: Path) -> None:
    ours = draw()
    run = tmp_path / "run"
    write(run / "iter_0000012", theirs(ours, apart=apart) | {"optimizer.state.x": torch.ones(3)})
    (run / "latest_checkpointed_iteration.txt").write_text("12\n")
    found = take(run, tmp_path)
    assert found.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(found[name], tensor), name


def test_routers_of_ours_keep_their_names(tmp_path: Path) -> None:
    ours = draw(GRU)
    tensors = theirs(ours | draw(), apart=True)
    for layer in range(2):
        del tensors[f"decoder.layers.{layer}.mlp.router.expert_bias"]
        del tensors[f"decoder.layers.{layer}.mlp.router.weight"]
        for name in ("weight", "projection"):
            mine = ours[f"model/blocks.{layer}.feed_forward.router.{name}"]
            tensors[f"decoder.layers.{layer}.mlp.router.router.{name}"] = mine
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        mine = ours[f"model/router_cell.{name}"]
        tensors[f"decoder.layers.0.mlp.router.shared.0.{name}"] = mine
    found = take(write(tmp_path / "theirs", tensors), tmp_path, GRU)
    assert torch.equal(found["model/router_cell.weight_hh"], ours["model/router_cell.weight_hh"])
    assert found.keys() == ours.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder.final_layernorm.weight": None}, r"decoder.final_layernorm.weight is missing"),
        ({"decoder.layers.mlp.router.bias": torch.ones(2, 4)}, r"router.bias \[2, 4\] is not kn"),
        (
            {"decoder.layers.self_attention.linear_proj.weight": torch.ones(2, 16, 8)},
            r"linear_proj.weight is \[16, 8\], not \[16, 16\]",
        ),
        ({"decoder.layers.mlp.router.weight": torch.ones(3, 4, 16)}, "has 3 layers, not 2"),
        ({"embedding.word_embeddings.weight": torch.ones(20, 16)}, r"is \[20, 16\], not \[21, 16"),
    ],
)
def test_what_differs_is_named_and_nothing_is_left(
    change: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    tensors = theirs(draw(), apart=False) | change
    source = write(tmp_path / "theirs", {n: t for n, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=words):
        take(source, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_lost_file_and_other_formats_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "theirs", theirs(draw(), apart=False))
    (lost,) = source.glob("*.distcp")
    lost.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"lacks {lost.name}"):
        take(source, tmp_path)
    (tmp_path / "old" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"format torch \(one file per rank\)"):
        take(tmp_path / "old", tmp_path)
    with pytest.raises(CheckpointError, match="has the format zarr"):
        take(write(tmp_path / "zarr", {"x": torch.ones(1)}, "zarr"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no distributed checkpoint .* no metadata.json"):
        take(tmp_path / "empty", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointError, match="no iter_0000007"):
        take(tmp_path / "run", tmp_path)


def test_a_pre_gate_has_no_place(tmp_path: Path) -> None:
    source = write(tmp_path / "theirs", theirs(draw(), apart=False))
    ahead = RouterConfig(ahead=AheadConfig(kind=AheadKind.gru, width=8, heads=2, state=8))
    with pytest.raises(CheckpointError, match="no place for model/ahead"):
        take(source, tmp_path, ahead)


def test_without_megatron_core_writing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[megatron\]'"):
        write_files(tmp_path / "out", {"x": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_an_old_megatron_core_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("megatron.core")
    old.__version__, old.dist_checkpointing = "0.9.0rc1", None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.core", old)
    mapping = ModuleType("mapping")
    mapping.ShardedTensor = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.core.dist_checkpointing.mapping", mapping)
    for name in ("megatron", "megatron.core.dist_checkpointing"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ConfigError, match=r"megatron-core 0\.9\.0rc1 is installed, which is older"):
        write_files(tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_questions_to_cuda_are_answered_for_a_while_only() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to answer")
    before = torch.cuda.current_device
    with answering_for_cuda():
        torch.cuda.synchronize()
        assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.cuda.current_device is before


def test_megatrons_model_computes_ours_and_saves_what_it_was_given(tmp_path: Path) -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    ours = draw()
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in ours.items()}
    checkpoint = write_weights(tmp_path / "ours", shapes, ours.__getitem__, meta={})
    token_BS = torch.randint(IDS, (2, 11), generator=torch.Generator().manual_seed(1))
    settings = {"model": replace(MODEL), "router": ROUTER, "vocab_size": IDS}
    torch.save({**settings, "checkpoint": checkpoint, "token_BS": token_BS}, tmp_path / "in.pt")
    script = Path(__file__).parents[1] / "megatron_model.py"
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    decoder = Decoder(MODEL, ROUTER, IDS).eval()
    for name, part in model_ranges(decoder).items():
        part.data.copy_(ours[name].view(-1))
    with torch.no_grad():
        logits_BSV = decoder.logits(decoder(token_BS).hidden_BSD)
    theirs_BSV = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(theirs_BSV, logits_BSV, rtol=0, atol=1e-4)
    again = take(tmp_path / "again", tmp_path)
    for name, tensor in ours.items():
        assert torch.equal(again[name], tensor), name
