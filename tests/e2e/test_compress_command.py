"""`gatewise compress` and what takes its result, as a user types it, on a small text of our own."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import CLI, environment, gatewise, result_of, write_text

pytestmark = pytest.mark.dist

QUICK = ["grid.group=32", "grid.clip_steps=4", "calibration.sequences=16", "text.tokens=2000"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of `experiment=tiny` on this project's own sources."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder, "training")
    done = gatewise(
        "train",
        "experiment=tiny",
        *text,
        f"run.dir={folder / 'run'}",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def small(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a compression that drops experts too."""
    folder = tmp_path_factory.mktemp("small")
    small = folder / "small"
    prune = ["prune=budget", "prune.keep=0.8"]
    arguments = ["compress", f"checkpoint={trained}", "bits=2.4", f"run.dir={small}"]
    done = gatewise(*arguments, *QUICK, *prune, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(small / "result.json")
    assert "pruned by budget: " in done.stdout
    return small


def test_a_checkpoint_is_compressed_evaluated_and_continued(
    trained: Path, small: Path, tmp_path: Path
) -> None:
    result = result_of(small)
    assert result["command"] == "compress"
    assert result["bits"]["paper"] <= 2.4
    assert result["bytes"]["computed"] == result["bytes"]["on_disk"]
    assert result["prune"]["kept_activations"] <= 0.81
    found = result["evaluation"]["pruned"]
    assert found["kept_activations"] == pytest.approx(0.8, abs=0.1)

    done = gatewise("evaluate", f"checkpoint={small}", "run.dir=measured", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loss = result_of(tmp_path / "measured")["val_loss"]
    assert loss == pytest.approx(found["loss"], abs=0.2)  # more of the text
    arguments = ["evaluate", f"checkpoint={small}", "weights=dequantised", "run.dir=reference"]
    done = gatewise(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "reference")["val_loss"] == pytest.approx(loss, abs=0.01)

    arguments = ["generate", f"checkpoint={small}", "prompt=def", "tokens=5", "run.dir=sample"]
    done = gatewise(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sample = result_of(tmp_path / "sample")
    assert (sample["prompt"], sample["weights"]) == ("def", "packed")
    assert sample["tokens_per_second"] > 0

    again = gatewise("compress", f"checkpoint={small}", "run.dir=again", cwd=tmp_path)
    assert again.returncode == 2
    assert "which is compressed" in again.stderr
    other = gatewise(
        "compress", f"checkpoint={trained}", "bits=2", f"run.dir={small}", *QUICK, cwd=tmp_path
    )
    assert other.returncode == 2
    assert "holds a compression with 'bits: 2.4', not 'bits: 2.0'" in other.stderr

    file = small / "compressed" / "model-00001.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1])
        broken = gatewise("evaluate", f"checkpoint={small}", "run.dir=broken", cwd=tmp_path)
    finally:
        file.write_bytes(whole)
    assert broken.returncode == 2
    assert "model-00001.safetensors is" in broken.stderr


def test_two_ranks_hold_the_packed_experts_together(small: Path, tmp_path: Path) -> None:
    ranks = ["parallel.ranks=2", "parallel.expert=2"]
    losses = []
    for name, more in (("one", []), ("two", ranks)):
        words = [f"checkpoint={small}", "evaluation.tokens=2000", f"run.dir={name}", *more]
        done = gatewise("evaluate", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append(result_of(tmp_path / name)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert result_of(tmp_path / "two")["world_size"] == 2

    words = [f"checkpoint={small}", "prompt=def", "tokens=5", "run.dir=sample", *ranks]
    done = gatewise("generate", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sample = result_of(tmp_path / "sample")
    assert (sample["weights"], sample["world_size"]) == ("packed", 2)
    assert done.stdout.startswith("def" + sample["text"])
    split = ["parallel.ranks=2", "parallel.tensor=2"]
    done = gatewise("generate", f"checkpoint={small}", "run.dir=split", *split, cwd=tmp_path)
    assert done.returncode == 2
    assert "parallel.tensor is 2, which is for training" in done.stderr


def test_generation_is_measured_beside_the_uncompressed_model(small: Path, tmp_path: Path) -> None:
    words = [f"checkpoint={small}", "tokens=6", "rounds=1", "run.dir=bench"]
    done = gatewise("bench", "generate", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = result_of(tmp_path / "bench")["rows"]
    assert [row["candidate"].partition(" ")[0] for row in rows][:2] == ["fp32", "bf16"]
    assert [row["candidate"].partition(", ")[2] for row in rows][2:] == ["else fp32", "else bf16"]
    assert rows[1]["speedup_vs_bf16"] == 1
    assert all(row["tokens"] >= 5 for row in rows)
    assert all(row["peak_rss_mb"] > row["weights_mb"] > 0 for row in rows)
    assert rows[3]["weights_mb"] < rows[1]["weights_mb"]


def test_a_compressed_model_is_exported_or_refused_with_the_reason(
    trained: Path, small: Path, tmp_path: Path
) -> None:
    words = ["export", f"checkpoint={small}", "run.dir=out"]
    done = gatewise(*words, "format=hf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "out")
    assert (result["architecture"], result["pruning_left_out"]) == ("Qwen3MoeForCausalLM", True)
    folder = tmp_path / "out" / "hf"
    assert str(folder) == result["exported"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == result["tensors"]
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert result["payload_bytes"] == index["metadata"]["total_size"] < files
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_moe"

    refused = gatewise(*words, "format=gptq", cwd=tmp_path)
    assert refused.returncode == 2
    assert "compress with grid.zero=int" in refused.stderr
    assert not (tmp_path / "out" / "gptq").exists()
    plain = gatewise("export", f"checkpoint={trained}", "run.dir=plain", cwd=tmp_path)
    assert plain.returncode == 2
    assert "which is not compressed" in plain.stderr


def test_a_stopped_compression_goes_on_to_the_same_files(trained: Path, tmp_path: Path) -> None:
    arguments = ["compress", f"checkpoint={trained}", "bits=2.4", *QUICK]
    whole = gatewise(*arguments, f"run.dir={tmp_path / 'whole'}", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*CLI, *arguments, f"run.dir={tmp_path / 'killed'}"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = tmp_path / "killed" / "calibration" / "layer_000.json"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    done = gatewise(*arguments, f"run.dir={tmp_path / 'killed'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in sorted((tmp_path / "whole" / "compressed").iterdir()):
        if file.suffix in (".safetensors", ".json"):
            other = tmp_path / "killed" / "compressed" / file.name
            assert other.read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bits=0.8"], "bits is 0.8 (budget=paper), but this model takes from"),
        (["bits=2.4", "widths=1,7"], "widths is '1,7'"),
        (["bits=2.4", "bitz=3"], "unknown setting 'bitz'; did you mean 'bits'?"),
        (["bits=2.4", "calibration.sequences=99999"], "the training split has only"),
        (["bits=2.4", "checkpoint=nowhere"], "checkpoint is 'nowhere', which is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    arguments: list[str], message: str, trained: Path, tmp_path: Path
) -> None:
    words = [f"checkpoint={trained}", f"run.dir={tmp_path / 'run'}", *arguments]
    done = gatewise("compress", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "compressed").exists()
