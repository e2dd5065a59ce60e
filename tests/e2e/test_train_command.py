"""`gatewise train` and what follows it, as a user types it, on a small text of our own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import CLI, environment, gatewise, losses_of, result_of, write_text

from gatewise.conf.compose import config_from_yaml, load_train_config

pytestmark = pytest.mark.dist

TWO_RANKS = ["parallel.ranks=2", "parallel.expert=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of a text: this project's own sources."""
    return write_text(tmp_path_factory.mktemp("text"), "training")


@pytest.fixture(scope="module")
def trained(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 6 steps on 2 ranks that saved after 3 and 6."""
    cwd = tmp_path_factory.mktemp("trained")
    done = gatewise(
        "train",
        "experiment=tiny",
        *TWO_RANKS,
        *text,
        "steps=6",
        "checkpoint.every=3",
        "run.dir=run",
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(cwd / "run" / "result.json")
    assert len(re.findall(r"^step \d/6  loss ", done.stdout, re.MULTILINE)) == 6
    return cwd / "run"


def test_a_run_leaves_all_its_files(trained: Path, text: list[str]) -> None:
    result = result_of(trained)
    assert result["command"] == "train"
    assert result["exit"] == 0
    assert result["world_size"] == 2
    assert result["steps"] == 6
    assert result["tokens"] == 6 * 8 * 64
    assert result["val_bits_per_byte"] > 0
    assert Path(result["checkpoint"]).name == "step_00000006"
    assert sorted(losses_of(trained)) == [1, 2, 3, 4, 5, 6]
    stored = config_from_yaml((trained / "config.yaml").read_text())
    wanted = ["experiment=tiny", *TWO_RANKS, *text, "steps=6", "checkpoint.every=3", "run.dir=run"]
    assert stored == load_train_config(wanted)
    assert json.loads((trained / "environment.json").read_text())["command_line"][1] == "train"
    assert (trained / "logs" / "rank_1.log").exists()


def test_one_rank_gives_the_same_losses_as_two(
    trained: Path, text: list[str], tmp_path: Path
) -> None:
    done = gatewise("train", "experiment=tiny", *text, "steps=6", "run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(trained), rel=1e-5)


def test_evaluate_gives_the_loss_that_training_reported(trained: Path, tmp_path: Path) -> None:
    done = gatewise("evaluate", f"checkpoint={trained}", "run.dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "result.json")
    result = result_of(tmp_path / "out")
    assert result["val_loss"] == pytest.approx(result_of(trained)["val_loss"], rel=1e-5)
    assert result["perplexity"] > 1
    assert result["tokens"] == 4096


def test_generate_continues_the_prompt_alike_for_a_seed(trained: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        done = gatewise(
            "generate",
            f"checkpoint={trained / 'checkpoints' / 'step_00000003'}",
            'prompt="${x}"',
            "tokens=16",
            f"run.dir={name}",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith('"${x}"')
        texts.append(result_of(tmp_path / name)["text"])
    assert texts[0] == texts[1]
    assert texts[0]


def test_torchrun_ranks_are_used_as_they_are(
    trained: Path, text: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "gatewise.launch.train", "experiment=tiny", "parallel.expert=2"),
            *(*text, "steps=6"),
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    assert done.stdout.splitlines()[-1] == str(folder / "result.json")
    assert result_of(folder)["world_size"] == 2
    assert losses_of(folder) == pytest.approx(losses_of(trained), rel=1e-5)


def start_and_wait_for_step(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a long run and return when it has printed a training step."""
    process = subprocess.Popen(
        [*CLI, "train", *arguments, f"run.dir={folder}"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            return process
    raise AssertionError(process.communicate()[1])


LONG = ["experiment=tiny", "steps=100000", "log_every=5", "optim.schedule=constant"]


def test_a_stop_signal_saves_and_asks_to_be_started_again(text: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_and_wait_for_step(folder, *LONG, *TWO_RANKS, *text)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 85, err
    assert out.splitlines()[-1] == str(folder / "result.json")
    result = result_of(folder)
    assert result["stopped"] is True
    steps = result["steps"]
    assert Path(result["checkpoint"]).name == f"step_{steps:08d}"

    again = ["steps=" + str(steps + 10), "log_every=5", "optim.schedule=constant"]
    done = gatewise(
        "train", "experiment=tiny", *again, *TWO_RANKS, *text, f"run.dir={folder}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"going on after step {steps}" in done.stdout
    numbers = list(losses_of(folder))
    assert numbers == sorted(set(numbers))
    assert result_of(folder)["steps"] == steps + 10
    assert (folder / "config.1.yaml").exists()
    assert (folder / "result.1.json").exists()


def rank_pids(command: int) -> list[int]:
    """Return the ranks of a command: sessions of their own below its forkserver."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent, group, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(path.parent.name)
        if pid == int(group) == int(session) and parent_of(int(parent)) == command:
            found.append(pid)
    return sorted(found)


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_a_killed_rank_ends_the_run_by_name_and_the_run_goes_on_later(
    text: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start_and_wait_for_step(folder, *LONG, *TWO_RANKS, *text, "checkpoint.every=2")
    pids = rank_pids(process.pid)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 1
    assert re.match(r"gatewise: error: rank \d: killed by SIGKILL", err.splitlines()[-1])
    assert out.splitlines()[-1] == str(folder / "result.json")
    assert result_of(folder)["exit"] == 1
    deadline = time.monotonic() + 20
    while any(parent_of(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    last = max(
        int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")
    )
    again = ["experiment=tiny", f"steps={last + 2}", "optim.schedule=constant", *TWO_RANKS, *text]
    done = gatewise("train", *again, f"run.dir={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on after step \d+", done.stdout)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.path=/nonexistent"], "/nonexistent"),
        (["wandb.mode=online"], "wandb.mode is online but"),
        (["checkpoint.load=/nonexistent"], "/nonexistent"),
        (["run.dir=/proc/nowhere"], "run.dir leads to /proc/nowhere"),
    ],
)
def test_a_mistake_ends_with_exit_2_before_ranks_start(
    overrides: list[str], words: str, text: list[str], tmp_path: Path
) -> None:
    if overrides == ["wandb.mode=offline"] and has_wandb():
        pytest.skip("wandb is installed")
    done = gatewise("train", "experiment=tiny", *TWO_RANKS, *text, *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("gatewise: error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not list(tmp_path.rglob("rank_*.log"))


def has_wandb() -> bool:
    import importlib.util

    return importlib.util.find_spec("wandb") is not None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.hidden=64"], "model.hidden is 64 but checkpoint"),
        (["data.tokenizer=bpe", "data.vocab_size=300"], "another tokenizer"),
    ],
)
def test_a_run_does_not_go_on_as_another_model(
    overrides: list[str], words: str, trained: Path, text: list[str], tmp_path: Path
) -> None:
    before = sorted(path.name for path in (trained / "checkpoints").rglob("*"))
    base = ["experiment=tiny", *TWO_RANKS, *text, "steps=9", f"run.dir={trained}"]
    done = gatewise("train", *base, *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in (trained / "checkpoints").rglob("*")) == before
    assert (trained / "tokenizer.json").read_text().count("bytes") >= 1
