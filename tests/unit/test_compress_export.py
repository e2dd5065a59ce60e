"""Exported files hold the weights that we compute with, by an unpacker of their own.

The unpackers below work on bits, from the formats' descriptions, and share no code with
the writers.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_models import compressed, settings, trained
from safetensors.torch import load_file
from torch import Tensor
from training_runs import tiny

from gatewise.compression.config import Allocation, CompressConfig, Granularity, GridConfig
from gatewise.compression.export.integers import as_integers, pack_words
from gatewise.compression.export.layout import choose_layout
from gatewise.compression.export.write import export_artefact
from gatewise.compression.formats import TERNARY, ZeroPoint
from gatewise.compression.grids import GridSearch
from gatewise.compression.quantize import round_to_nearest
from gatewise.compression.work import Source
from gatewise.launch.restore import open_checkpoint, restore_model
from gatewise.moe.config import Activation
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import ConfigError
from gatewise.routers.presets import preset

INTEGERS = GridConfig(group=16, clip_steps=4, zero=ZeroPoint.int)
MODEL = {"hidden": 32, "expert_width": 32, "heads": 4, "kv_heads": 2, "tie_embeddings": False}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return trained(tmp_path_factory.mktemp("mixtral"), qk_norm=False, **MODEL)[0]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return trained(tmp_path_factory.mktemp("qwen"), dense_layers=1, **MODEL)[0]


def config_of(**changes: Any) -> CompressConfig:
    return settings(**{"grid": INTEGERS, "attention_bits": 8.0, **changes})


@pytest.fixture(scope="module")
def mixed(mixtral: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artefact whose experts have 1, 2, 3 and 4 bits."""
    config = config_of(widths="1,2,3,4", bits=3.4)
    return compressed(mixtral, config, tmp_path_factory.mktemp("mixed"))[0]


@pytest.fixture(scope="module")
def even(mixtral: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artefact with one width per layer, others in other layers."""
    config = config_of(widths="2,3,4", bits=4.6, granularity=Granularity.layer)
    return compressed(mixtral, config, tmp_path_factory.mktemp("even"))[0]


def export(source: Source, artefact: Path, name: str, folder: Path) -> dict[str, Tensor]:
    export_artefact(artefact, source.config, 257, 256, format_name=name, folder=folder / name)
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / name).glob("*.safetensors")):
        tensors |= load_file(file)
    index = json.loads((folder / name / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(part.nbytes for part in tensors.values())
    return tensors


def ours(artefact: Path) -> Decoder:
    return restore_model(open_checkpoint(str(artefact)), device=torch.device("cpu"))


def expected(model: Decoder) -> dict[str, Tensor]:
    """Return the linear weights by their names in Mixtral, cut by hand."""
    found = {}
    for layer in range(model.config.layers):
        own = f"blocks.{layer}."
        weights = {
            name.removeprefix(own): parameter.detach()
            for name, parameter in model.named_parameters()
            if name.startswith(own)
        }
        qkv = weights["attention.w_qkv"]
        prefix = f"model.layers.{layer}."
        found[f"{prefix}self_attn.q_proj"] = qkv[:32]
        found[f"{prefix}self_attn.k_proj"] = qkv[32:48]
        found[f"{prefix}self_attn.v_proj"] = qkv[48:]
        found[f"{prefix}self_attn.o_proj"] = weights["attention.w_out"]
        w_in, w_out = (weights[f"feed_forward.experts.w_{n}"] for n in ("in_eGD", "out_eDF"))
        for expert in range(4):
            name = f"{prefix}block_sparse_moe.experts.{expert}."
            found[f"{name}w1"], found[f"{name}w3"] = w_in[expert][:32], w_in[expert][32:]
            found[f"{name}w2"] = w_out[expert]
    return found


def codes_of(words: Tensor, bits: int, count: int) -> Tensor:
    """Read each row's first `count` codes from a stream of 32-bit words, lowest bits first."""
    data = words.contiguous().numpy().view("<u1").reshape(len(words), -1)
    bit = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits]
    value = bit.reshape(len(words), count, bits) @ (1 << np.arange(bits))
    return torch.from_numpy(value)


def unpack_gptq(tensors: dict[str, Tensor], module: str, offset: int) -> Tensor:
    """Dequantise a module of a GPTQ checkpoint; `offset` is what version 1 adds to zeros."""
    scale_GN = tensors[f"{module}.scales"].float()
    groups, outputs = scale_GN.shape
    group_K = tensors[f"{module}.g_idx"].long()
    bits = tensors[f"{module}.qweight"].shape[0] * 32 // len(group_K)
    assert int(group_K.max()) == groups - 1
    code_NK = codes_of(tensors[f"{module}.qweight"].t(), bits, len(group_K))
    zero_GN = codes_of(tensors[f"{module}.qzeros"], bits, outputs) + offset
    return scale_GN.t()[:, group_K] * (code_NK - zero_GN.t()[:, group_K])


def unpack_compressed_tensors(tensors: dict[str, Tensor], module: str, bits: int) -> Tensor:
    """Dequantise a module of a pack-quantized checkpoint, in signed numbers."""
    outputs, columns = tensors[f"{module}.weight_shape"].tolist()
    scale_NG = tensors[f"{module}.weight_scale"].float()
    half, groups = 1 << bits - 1, scale_NG.shape[1]
    signed_NK = codes_of(tensors[f"{module}.weight_packed"], bits, columns) - half
    zero_GN = codes_of(tensors[f"{module}.weight_zero_point"].t(), bits, outputs) - half
    assert zero_GN.shape == (groups, outputs)
    group_K = torch.arange(columns) // (columns // groups)
    return scale_NG[:, group_K] * (signed_NK - zero_GN.t()[:, group_K])


def check_kept(tensors: dict[str, Tensor], model: Decoder) -> None:
    """Hold what is not quantised to the model's own, by names written out here."""
    parameters = {name: part.detach().bfloat16() for name, part in model.named_parameters()}
    names = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        "model.norm.weight": "norm_final.gain",
    }
    for layer in range(model.config.layers):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        names |= {
            f"{there}input_layernorm.weight": f"{here}norm_attention.gain",
            f"{there}post_attention_layernorm.weight": f"{here}norm_feed_forward.gain",
            f"{there}block_sparse_moe.gate.weight": f"{here}feed_forward.router.weight",
        }
    for theirs, mine in names.items():
        assert torch.equal(tensors[theirs], parameters[mine]), theirs


def without_zero_at_zero(artefact: Path) -> bool:
    files = [load_file(file) for file in sorted(artefact.glob("model-*.safetensors"))]
    return all(
        bool((part > 0).all()) for file in files for name, part in file.items() if ".zero" in name
    )


def test_c34_gptq_v2_holds_our_weights(mixtral: Source, mixed: Path, tmp_path: Path) -> None:
    tensors = export(mixtral, mixed, "gptq_v2", tmp_path)
    modules = expected(ours(mixed))
    assert len(modules) == 2 * (4 + 3 * 4)
    for name, weight in modules.items():
        assert torch.equal(unpack_gptq(tensors, name, 0), weight), name
    check_kept(tensors, ours(mixed))
    record = json.loads((tmp_path / "gptq_v2" / "config.json").read_text())
    quantisation = record["quantization_config"]
    assert quantisation["checkpoint_format"] == "gptq_v2"
    widths = {entry["bits"] for entry in quantisation["dynamic"].values() if entry}
    assert widths | {quantisation["bits"]} >= {2, 8}
    assert {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")} == set(
        modules
    )


def test_c34_gptq_v1_holds_our_weights_or_says_why_not(
    mixtral: Source, mixed: Path, tmp_path: Path
) -> None:
    if not without_zero_at_zero(mixed):
        with pytest.raises(ConfigError, match=r"stores zero points less one, but .* gptq_v2"):
            export(mixtral, mixed, "gptq", tmp_path)
        assert not list(tmp_path.iterdir())  # nothing half-written
    ternary = config_of(widths="1,1.58", bits=2.4, attention_bits=16.0)
    path, _ = compressed(mixtral, ternary, tmp_path / "run")
    tensors = export(mixtral, path, "gptq", tmp_path)
    modules = {name: part for name, part in expected(ours(path)).items() if "experts" in name}
    for name, weight in modules.items():
        assert torch.equal(unpack_gptq(tensors, name, 1), weight), name
    check_kept(tensors, ours(path))
    skipped = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert any(key.startswith("-:") and "q_proj" in key for key in skipped["dynamic"])


def test_c34_compressed_tensors_holds_our_weights(
    mixtral: Source, even: Path, tmp_path: Path
) -> None:
    tensors = export(mixtral, even, "compressed_tensors", tmp_path)
    record = json.loads((tmp_path / "compressed_tensors" / "config.json").read_text())
    groups = record["quantization_config"]["config_groups"].values()
    bits_of = {
        target.removeprefix("re:^").removesuffix("$").replace("\\", ""): group["weights"][
            "num_bits"
        ]
        for group in groups
        for target in group["targets"]
    }
    modules = expected(ours(even))
    assert bits_of.keys() == modules.keys()
    for name, weight in modules.items():
        found = unpack_compressed_tensors(tensors, name, bits_of[name])
        assert torch.equal(found, weight), name
    check_kept(tensors, ours(even))


def test_c34_mixed_widths_in_a_layer_are_refused_with_the_reason(
    mixtral: Source, mixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="one width for all experts of a layer, but layer"):
        export(mixtral, mixed, "compressed_tensors", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "compressed_tensors"])
def test_c34_float_zeros_are_refused_with_the_remedy(
    name: str, mixtral: Source, tmp_path: Path
) -> None:
    path, _ = compressed(mixtral, settings(allocation=Allocation.uniform), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"compress with grid\.zero=int"):
        export(mixtral, path, name, tmp_path / "out")


def test_c34_dequantised_weights_are_ours_in_bf16(
    mixtral: Source, mixed: Path, tmp_path: Path
) -> None:
    tensors = export(mixtral, mixed, "hf", tmp_path)
    for name, weight in expected(ours(mixed)).items():
        assert torch.equal(tensors[f"{name}.weight"], weight.bfloat16()), name
    assert {part.dtype for part in tensors.values()} == {torch.bfloat16}
    record = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in record
    assert record["eos_token_id"] == 256


@pytest.mark.parametrize("family", ["mixtral", "qwen"])
def test_c34_transformers_computes_our_logits(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    source: Source = request.getfixturevalue(family)
    path, _ = compressed(source, settings(allocation=Allocation.uniform), tmp_path / "run")
    export(source, path, "hf", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = ours(path)
    token_BS = torch.arange(60).view(2, 30) * 4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        wanted = model.logits(model(token_BS).hidden_BSD)
        found = theirs(token_BS).logits
    assert math.isclose(float(found.std()), float(wanted.std()), rel_tol=1e-3)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


def test_an_export_replaces_only_an_export(mixtral: Source, mixed: Path, tmp_path: Path) -> None:
    first = export(mixtral, mixed, "hf", tmp_path)
    again = export(mixtral, mixed, "hf", tmp_path)
    assert first.keys() == again.keys()
    (tmp_path / "hf" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"hf holds 'thesis\.tex', which no export wrote"):
        export(mixtral, mixed, "hf", tmp_path)
    assert (tmp_path / "hf" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "hf" / "config.json").exists()
    (tmp_path / "gptq_v2").write_text("a file")
    with pytest.raises(ConfigError, match="gptq_v2 is no folder of an export"):
        export(mixtral, mixed, "gptq_v2", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq_v2", "hf"]


def test_c14_signs_and_ternary_codes_are_exact_in_two_bits() -> None:
    w_ENK = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    search = GridSearch.wide(low=0.3, high=1.0, steps=5, refine=1, zero=ZeroPoint.int)
    for bits in (1.0, TERNARY):
        (matrix,) = round_to_nearest(w_ENK, [bits], group=16, search=search)
        found = as_integers(matrix, slice(1, 3))
        assert found.bits == 2
        assert found.code_NK.unique().tolist() == ([1, 3] if bits == 1 else [0, 1, 2])
        assert found.zero_NG.unique().tolist() == [2 if bits == 1 else 1]
        code_NK = codes_of(pack_words(found.code_NK, 2), 2, 48)
        group_K = torch.arange(48) // 16
        value_NK = found.scale_NG[:, group_K] * (code_NK - found.zero_NG[:, group_K].int())
        assert torch.equal(value_NK.float(), matrix.dequantise()[1:3])
        if bits == 1:
            assert torch.equal(value_NK.abs(), matrix.scale_NG[1:3][:, group_K] / 2)


def test_words_are_filled_from_the_lowest_bit() -> None:
    code_NK = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]], dtype=torch.uint8)
    words = pack_words(code_NK, 3)
    assert words.shape == (1, 2)
    assert codes_of(words, 3, 11).tolist() == code_NK.tolist()
    assert pack_words(torch.tensor([[255] * 4], dtype=torch.uint8), 8).tolist() == [[-1]]


@pytest.mark.parametrize(
    ("changes", "router", "reason"),
    [
        ({"shared_experts": 1}, "mixtral", "model.shared_experts is 1"),
        ({"activation": Activation.gelu}, "mixtral", "model.activation is gelu"),
        ({}, "rmoe", "router.scorer is recurrent, not linear"),
        ({}, "deepseek_v3", "router.score is sigmoid, not softmax"),
        ({}, "gru_pregate", "a pre-gate"),
        ({"qk_norm": False, "dense_layers": 1}, "mixtral", "dense layers"),
        ({"qk_norm": False}, "switch", "not renormalised"),
    ],
)
def test_c34_a_model_without_a_counterpart_is_refused_with_the_reason(
    changes: dict[str, Any], router: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        choose_layout(tiny(model=changes, router=preset(router)), {})


def test_c34_a_bias_that_moved_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose with a bias"):
        choose_layout(tiny(), {"bias/blocks.0.feed_forward.router": True})
    assert choose_layout(tiny(), {"bias/x": False}).family.kind == "qwen3_moe"
