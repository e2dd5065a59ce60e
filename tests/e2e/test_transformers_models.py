"""Models of transformers: drawn at random and taken in; trained here and handed out."""

import json
import math
from pathlib import Path

import pytest
import torch
from hf_models import LAYOUTS, build, logits_of, needs_transformers
from low_bits import store_fp8, store_mxfp4
from safetensors.torch import load_file

from gatewise.launch.cli import main
from gatewise.launch.restore import open_checkpoint, restore_model
from gatewise.moe.attention import KeyValueCache

needs_transformers()
# transformers warns of its own future while it loads and saves
pytestmark = pytest.mark.filterwarnings("ignore")


def convert(*arguments: str) -> None:
    assert main(["convert", *arguments]) == 0


def random_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_drawn_model_gives_the_same_logits_and_comes_back_bit_for_bit(
    layout: str, tmp_path: Path
) -> None:
    theirs = build(layout, tmp_path / "source")
    convert("from_hf", f"source={tmp_path}/source", f"run.dir={tmp_path}/run")
    ours = restore_model(open_checkpoint(str(tmp_path / "run")), device=torch.device("cpu"))
    token_BS = random_tokens(300)
    wanted = logits_of(theirs, token_BS)
    cache = KeyValueCache()
    with torch.no_grad():
        whole = ours.logits(ours(token_BS).hidden_BSD)
        parts = [
            ours.logits(ours(part, cache=cache).hidden_BSD)
            for part in token_BS.split((9, 1, 13), 1)
        ]
    torch.testing.assert_close(whole, wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=1e-5)
    convert(
        "to_hf", f"checkpoint={tmp_path}/run", f"out={tmp_path}/out", f"run.dir={tmp_path}/export"
    )
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    records = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("source", "out")]
    assert records[0] == records[1]


def test_a_sharded_model_in_bf16_comes_back_bit_for_bit(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path / "source", dtype=torch.bfloat16, max_shard_size="30KB")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 2
    convert("from_hf", f"source={tmp_path}/source", f"run.dir={tmp_path}/run")
    convert(
        "to_hf", f"checkpoint={tmp_path}/run", f"out={tmp_path}/out", f"run.dir={tmp_path}/export"
    )
    before = {
        name: tensor
        for file in (tmp_path / "source").glob("model-*.safetensors")
        for name, tensor in load_file(file).items()
    }
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_weights_of_few_bits_are_what_transformers_makes_of_them(
    method: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    if method == "mxfp4":
        build("gpt_oss", tmp_path / "source", changes={"intermediate_size": 32})
        store_mxfp4(tmp_path / "source")
        settings = Mxfp4Config(dequantize=True)
    else:
        pytest.importorskip("accelerate", reason="transformers reads fp8 with accelerate")
        build("deepseek_v3", tmp_path / "source")
        store_fp8(tmp_path / "source", block=4)
        settings = FineGrainedFP8Config(weight_block_size=(4, 4), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source",
        quantization_config=settings,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    convert("from_hf", f"source={tmp_path}/source", f"run.dir={tmp_path}/run")
    ours = restore_model(open_checkpoint(str(tmp_path / "run")), device=torch.device("cpu"))
    token_BS = random_tokens(300)
    with torch.no_grad():
        found = ours.logits(ours(token_BS).hidden_BSD)
    torch.testing.assert_close(found, logits_of(theirs.eval(), token_BS), atol=1e-4, rtol=1e-5)
    convert(
        "to_hf", f"checkpoint={tmp_path}/run", f"out={tmp_path}/out", f"run.dir={tmp_path}/export"
    )
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    torch.testing.assert_close(logits_of(again.eval(), token_BS), found, atol=1e-4, rtol=1e-5)


TRAINED = {
    "llama": ["model.num_experts=0", "model.qk_norm=false", "model.tie_embeddings=true"],
    "mistral": ["model.num_experts=0", "model.qk_norm=false", "model.attention.window=9"],
    "qwen2": ["model.num_experts=0", "model.qk_norm=false", "model.attention.qkv_bias=true"],
    "qwen3": ["model.num_experts=0", "model.attention.window=9", "model.attention.full_every=2"],
    "mixtral": ["model.qk_norm=false"],
    "qwen3_moe": ["model.attention.head_width=12", "model.dense_layers=1"],
    "olmoe": ["model.attention.norm_whole=true", "router.renormalise=false"],
    "qwen2_moe": [
        "model.qk_norm=false",
        "model.attention.qkv_bias=true",
        "model.shared_experts=1",
        "model.shared_gate=true",
    ],
    "deepseek_v3": [
        "router=deepseek_v3",
        "router.num_groups=2",
        "model.shared_experts=1",
        "model.attention.latent.rank=12",
        "model.attention.latent.plain_width=8",
        "model.attention.latent.rope_width=4",
        "model.attention.latent.value_width=8",
    ],
    "gpt_oss": [
        "model.qk_norm=false",
        "model.clamped_experts=true",
        "router.logit_bias=true",
        "model.attention.qkv_bias=true",
        "model.attention.out_bias=true",
        "model.attention.sinks=true",
        "model.attention.window=16",
        "model.attention.full_every=2",
    ],
}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_model_trained_here_has_the_same_loss_and_text_in_transformers(
    kind: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of {n % 7} and {n * n}\n" for n in range(400)))
    sizes = ["model.layers=2", "model.hidden=32", "model.heads=4", "model.kv_heads=null"]
    sizes += ["model.num_experts=4", "model.expert_width=32", "data.sequence_length=32"]
    settings = [*sizes, *TRAINED[kind], "precision=fp32", "steps=12", "optim.warmup=2"]
    arguments = [f"data.path={text}", f"data.cache={tmp_path}/cache", f"run.dir={run}", "seed=1"]
    arguments += ["model.tie_embeddings=false", "batch.sequences=4", "wandb.mode=off"]
    assert main(["train", *arguments, *settings]) == 0
    convert("to_hf", f"checkpoint={run}", f"out={tmp_path}/out", f"run.dir={tmp_path}/export")
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (record["model_type"], "gatewise" in record) == (kind, False)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = restore_model(open_checkpoint(str(run)), device=torch.device("cpu"))
    prompt = torch.tensor([list(text.read_bytes()[:24])])
    with torch.no_grad():
        logits = ours.logits(ours(prompt).hidden_BSD)[0, :-1]
    loss = float(torch.nn.functional.cross_entropy(logits, prompt[0, 1:]))
    their_logits = logits_of(theirs.eval(), prompt)[0, :-1]
    their_loss = float(torch.nn.functional.cross_entropy(their_logits, prompt[0, 1:]))
    assert math.isclose(loss, their_loss, rel_tol=1e-5)
    found = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert found[0, 24:].tolist() == greedy(ours, prompt, 12)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """Return the most likely token, again and again."""
    cache, found = KeyValueCache(), list[int]()
    token_BS = prompt
    for _ in range(count):
        hidden_D = model(token_BS, cache=cache).hidden_BSD[0, -1]
        found.append(int(model.logits(hidden_D).argmax()))  # type: ignore[operator]  # a module
        token_BS = torch.tensor([[found[-1]]])
    return found
