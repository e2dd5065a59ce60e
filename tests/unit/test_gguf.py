"""GGUF files of Llama models: settings, tensors, tokenizer, and what is wrong with a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop_runs import drawn_model, state_of

from gatewise.launch.cli import main
from gatewise.launch.restore import open_checkpoint, restore_model
from gatewise.moe.config import ModelConfig
from gatewise.routers.config import RouterConfig
from gatewise.training.interop.families import FAMILIES
from gatewise.training.interop.names import RotaryRows, list_pieces
from gatewise.training.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed (the extra gguf)")

MODEL = ModelConfig(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    num_experts=0,
    dense_width=64,
    qk_norm=False,
    norm_eps=1e-5,
    rope_base=5000.0,
)
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def write(path: Path, state: dict[str, torch.Tensor], **changes: Any) -> None:
    """Write a model as llama.cpp does: queries and keys with neighbours paired."""
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("smollm")
    letters = sorted(_byte_letters())
    writer.add_token_list(["<|endoftext|>", *letters])
    writer.add_token_types([3] + [1] * len(letters))
    writer.add_token_merges([])
    for piece in list_pieces(FAMILIES["llama"], MODEL, RouterConfig(), 257):
        if piece.theirs == changes.get("without"):
            continue
        tensor = piece.place(state[piece.ours])
        if piece.theirs.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = RotaryRows(0, 8).to_theirs(tensor)
        name = piece.theirs
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        values = tensor.contiguous().numpy()
        if tensor.dim() == 2 and changes.get("narrow"):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def take_in(file: Path, run: Path) -> int:
    return main(["convert", "from_gguf", f"source={file}", f"run.dir={run}"])


@pytest.mark.parametrize("narrow", [False, True])
def test_tensors_and_settings_are_those_of_the_model(narrow: bool, tmp_path: Path) -> None:
    state = state_of(drawn_model(MODEL, RouterConfig()))
    write(tmp_path / "m.gguf", state, narrow=narrow)
    assert take_in(tmp_path / "m.gguf", tmp_path / "run") == 0
    stored = open_checkpoint(str(tmp_path / "run"))
    found = state_of(restore_model(stored, device=torch.device("cpu")))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        close = 0.01 if narrow and tensor.dim() == 2 else 0.0
        torch.testing.assert_close(found[name], tensor, atol=close, rtol=0)
    model = stored.config.model
    assert (model.rope_base, model.norm_eps, model.tie_embeddings) == (5000.0, 1e-5, True)
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("caf\u00e9 12\n")) == "caf\u00e9 12\n"
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"tokenizer": "llama"}, "a tokenizer of kind 'llama'"),
        ({"without": "model.norm.weight"}, "1 tensor is missing (model.norm.weight)"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "m.gguf", state_of(drawn_model(MODEL, RouterConfig())), **changes)
    assert take_in(tmp_path / "m.gguf", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_file_that_is_no_gguf_or_too_old_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.gguf").write_text("no model at all, only a line of text")
    (tmp_path / "old.gguf").write_bytes(b"GGUF" + np.array([1, 0, 0, 0], "<u4").tobytes())
    for name, message in (("text", "no GGUF file"), ("old", "version 1"), ("none", "is no file")):
        assert take_in(tmp_path / f"{name}.gguf", tmp_path / name) == 2
        assert message in capsys.readouterr().err
