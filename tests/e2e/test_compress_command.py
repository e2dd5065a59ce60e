"""`gatewise compress` and what takes its result, as a user types it, on a small text of our own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "gatewise.launch.cli"]
QUICK = ["grid.group=32", "grid.clip_steps=4", "calibration.sequences=16", "text.tokens=2000"]


def gatewise(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of `experiment=tiny` on this project's own sources."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text"
    text.mkdir()
    for number, path in enumerate(sorted((ROOT / "training").glob("*.py"))):
        (text / f"{number:02d}.txt").write_text(path.read_text(encoding="utf-8"))
    done = gatewise(
        "train",
        "experiment=tiny",
        f"data.path={text}",
        f"data.cache={folder / 'cache'}",
        f"run.dir={folder / 'run'}",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_checkpoint_is_compressed_evaluated_and_continued(trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    arguments = ["compress", f"checkpoint={trained}", "bits=2.4", f"run.dir={small}", *QUICK]
    done = gatewise(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(small / "result.json")
    result = result_of(small)
    assert result["command"] == "compress"
    assert result["bits"]["paper"] <= 2.4
    assert result["bytes"]["computed"] == result["bytes"]["on_disk"]

    done = gatewise("evaluate", f"checkpoint={small}", "run.dir=measured", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loss = result_of(tmp_path / "measured")["val_loss"]
    assert loss == pytest.approx(result["evaluation"]["loss_after"], abs=0.2)  # more of the text
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
    file.write_bytes(file.read_bytes()[:-1])
    broken = gatewise("evaluate", f"checkpoint={small}", "run.dir=broken", cwd=tmp_path)
    assert broken.returncode == 2
    assert "model-00001.safetensors is" in broken.stderr


def test_a_stopped_compression_goes_on_to_the_same_files(trained: Path, tmp_path: Path) -> None:
    arguments = ["compress", f"checkpoint={trained}", "bits=2.4", *QUICK]
    whole = gatewise(*arguments, f"run.dir={tmp_path / 'whole'}", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*CLI, *arguments, f"run.dir={tmp_path / 'killed'}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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
