"""A model that was taken in is a run like any other: evaluate, generate, train and hand out."""

import json
from pathlib import Path

import pytest
from interop_runs import drawn_model, make_run

from gatewise.launch.cli import main
from gatewise.moe.attention_config import AttentionConfig
from gatewise.moe.config import ModelConfig
from gatewise.routers.config import RouterConfig
from gatewise.training.checkpoint_weights import WeightReader
from gatewise.training.tokenizer import train_bpe

MODEL = ModelConfig(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    num_experts=4,
    expert_width=16,
    tie_embeddings=False,
    attention=AttentionConfig(head_width=12),
)


def run(*words: str) -> dict[str, object]:
    """Run a command and return its result."""
    assert main([*words]) == 0
    folder = next(word for word in words if word.startswith("run.dir=")).removeprefix("run.dir=")
    result: dict[str, object] = json.loads((Path(folder) / "result.json").read_text())
    return result


def test_a_model_from_elsewhere_is_evaluated_trained_and_handed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = make_run(tmp_path / "first", drawn_model(MODEL, RouterConfig()))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} plus {n} is {2 * n}\n" for n in range(500)))
    data = [f"data.path={text}", f"data.cache={tmp_path}/cache", "precision=fp32"]
    run("convert", "to_hf", f"checkpoint={first}", f"out={tmp_path}/hf", f"run.dir={tmp_path}/a")
    taken = tmp_path / "taken"
    run("convert", "from_hf", f"source={tmp_path}/hf", f"run.dir={taken}")
    assert "45 of 45 tensors consumed, 0 unused" in capsys.readouterr().out
    before = run("evaluate", f"checkpoint={first}", f"run.dir={tmp_path}/b", *data)
    after = run("evaluate", f"checkpoint={taken}", f"run.dir={tmp_path}/c", *data)
    assert before["val_loss"] == after["val_loss"]
    run("generate", f"checkpoint={taken}", "prompt=1 plus", "tokens=5", f"run.dir={tmp_path}/d")
    tuned = tmp_path / "tuned"
    settings = ["steps=3", "batch.sequences=4", "optim.lr=0.001", "wandb.mode=off"]
    load = f"checkpoint.load={taken}"
    trained = run("train", load, *data, *settings, "data.sequence_length=32", f"run.dir={tuned}")
    assert trained["steps"] == 3
    moved = WeightReader(tuned / "checkpoints/step_00000003")
    start = WeightReader(taken / "checkpoints/step_00000000")
    changed = moved.read("model/embedding") - start.read("model/embedding")
    assert 0 < float(changed.abs().max()) < 0.01  # a step away from what was loaded
    run("convert", "to_hf", f"checkpoint={tuned}", f"out={tmp_path}/o", f"run.dir={tmp_path}/e")
    record = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (record["model_type"], record["head_dim"], record["dtype"]) == (
        "qwen3_moe",
        12,
        "float32",
    )
    assert main(["train", load, *data, "model.hidden=64", f"run.dir={tmp_path}/f"]) == 2
    assert "model.hidden is 64" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from small_models import small_model

    decoder = small_model(MODEL, RouterConfig(), vocab_size=100)
    first, _ = make_run(tmp_path / "first", decoder)
    words = ["prompt=x", f"run.dir={tmp_path}/a"]
    assert main(["generate", f"checkpoint={first}", *words]) == 2
    assert "100 rows in its embedding but its tokenizer has 257 ids" in capsys.readouterr().err


def test_a_text_is_prepared_with_the_models_own_tokenizer_alone(tmp_path: Path) -> None:
    from small_models import small_model

    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} plus {n} is {2 * n}\n" for n in range(500)))
    bpe = train_bpe([text.read_text()], 300)
    decoder = small_model(MODEL, RouterConfig(), vocab_size=300)
    # as a model that was taken in: its settings do not speak of its tokenizer
    taken, _ = make_run(tmp_path / "taken", decoder, tokenizer=bpe.fingerprint)
    bpe.save(taken / "tokenizer.json")
    data = [f"data.path={text}", f"data.cache={tmp_path}/cache", "precision=fp32"]
    run("evaluate", f"checkpoint={taken}", f"run.dir={tmp_path}/a", *data)
    prepared = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(prepared) == 1  # and not in bytes first
