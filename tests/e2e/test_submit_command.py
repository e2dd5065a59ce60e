"""`gatewise submit` through torchrun: sweeps from one command, a stop, two agents and a crash."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import CLI, environment, losses_of, ranks_of, result_of, write_text
from wandb_logs import finished_log

from gatewise.launch.job_script import template
from gatewise.launch.submit_config import Launcher
from gatewise.training.wandb_files import find_wandb_files

pytestmark = pytest.mark.dist

RUN = ("experiment=tiny", "model.layers=1", "evaluation.tokens=512", "parallel.ranks=2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of a text: this project's own sources."""
    return write_text(tmp_path_factory.mktemp("text"), "routers")


def submit(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "submit", *arguments],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def recorded(folder: Path) -> dict[int, float]:
    return losses_of(folder) if (folder / "metrics.jsonl").exists() else {}


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def sweep(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two routers at two rates, tracked offline where there is a client."""
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    grid = ("router=rmoe,deepseek_v3", "optim.lr=1e-3,3e-3", "submit.parallel=2")
    offline = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    one_rank = (*RUN[:-1], "parallel.ranks=1", "steps=4", f"run.dir={folder}")
    done = submit("-m", *one_rank, *text, *grid, **offline)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == str(folder / "result.json")
    return folder


def test_a_sweep_of_two_routers_and_two_rates_runs_through_torchrun(sweep: Path) -> None:
    result = result_of(sweep)
    assert result["states"] == {"finished": 4}
    assert len({row["val_loss"] for row in result["rows"]}) == 4
    page = (sweep / "sweep.md").read_text()
    assert len(re.findall(r"^\| (?:rmoe|deepseek_v3) +\| 0\.00[13] .* 4/4 ", page, re.M)) == 4
    assert (sweep / "sweep.svg").read_text().count("<polyline") == 4
    results = [result_of(path.parent) for path in sweep.glob("router=*/result.json")]
    assert [found["steps"] for found in results] == [4] * 4
    (code,) = (sweep / "code").iterdir()
    for script in sweep.glob("router=*/submit/job.sh"):
        assert f"CODE={code}" in script.read_text()
        assert "-m torch.distributed.run" in script.read_text()


def test_the_points_of_a_sweep_are_runs_of_one_group_in_the_clients_own_files(sweep: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    logs = [find_wandb_files(folder) for folder in sorted(sweep.glob("router=*"))]
    assert [len(files) for files in logs] == [1] * 4
    runs = [finished_log(files[0]) for files in logs]
    assert {run.group for run in runs} == {"sweep"}
    assert len({run.run_id for run in runs}) == 4
    assert sorted(run.name for run in runs) == [
        f"router={router} optim.lr={rate}"
        for router in ("deepseek_v3", "rmoe")
        for rate in ("0.001", "0.003")
    ]
    settings = [(run.config["router"]["scorer"], run.config["optim"]["lr"]) for run in runs]
    assert settings == [
        ("linear", 0.001),
        ("linear", 0.003),
        ("recurrent", 0.001),
        ("recurrent", 0.003),
    ]
    assert [[row["train/step"] for row in run.rows] for run in runs] == [[1, 2, 3, 4]] * 4


def test_a_search_trains_points_of_an_interval(text: list[str], tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the extra optuna")
    folder = tmp_path / "search"
    one_rank = (*RUN[:-1], "parallel.ranks=1", "steps=2", f"run.dir={folder}")
    searched = ("optim.lr=tag(log,interval(1e-4,1e-2))", "submit.trials=2")
    done = submit("-m", *one_rank, *text, *searched, "submit.launcher=local")
    assert done.returncode == 0, done.stderr + done.stdout
    result = result_of(folder)
    assert result["states"] == {"finished": 2}
    rates = [row["values"]["optim.lr"] for row in result["rows"]]
    assert all(1e-4 <= float(rate) <= 1e-2 for rate in rates)
    assert result["best_val_loss"] == result["rows"][0]["val_loss"] < result["rows"][1]["val_loss"]
    stored = [
        re.search(r"^  lr: (.*)$", (folder / f"optim.lr={rate}" / "config.yaml").read_text(), re.M)
        for rate in rates
    ]
    assert [found and found[1] for found in stored] == rates


def test_a_stopped_run_ends_with_85_and_goes_on(text: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = (*RUN, *text, "optim.schedule=constant", f"run.dir={folder}")
    process = subprocess.Popen(
        [*CLI, "submit", *settings, "steps=100000"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: len(recorded(folder)) > 1 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 85
    assert out.splitlines()[-1] == str(folder / "submit" / "result.json")
    result = result_of(folder / "submit")
    assert result["exit"] == result["run"]["exit"] == 85
    assert not ranks_of(folder)
    steps = result["run"]["steps"]
    done = submit(*settings, f"steps={steps + 3}")
    assert done.returncode == 0, done.stderr
    assert f"going on after step {steps}" in done.stdout
    assert list(recorded(folder)) == list(range(1, steps + 4))


def test_two_agents_start_all_ranks_again_after_one_has_died(
    text: list[str], tmp_path: Path
) -> None:
    """The shipped script, edited as a user would, started twice: two nodes of one rank each."""
    folder = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"NODES": 2, "RANKS_PER_NODE": 1, "RESTARTS": 2, "HEAD": "127.0.0.1"}
    values |= {"RUN_DIR": folder, "PORT": port, "PYTHON": sys.executable}
    script = template(Launcher.torchrun)
    for name, value in values.items():
        script, count = re.subn(rf"^{name}=\S*", f"{name}={value}", script, flags=re.M)
        assert count == 1
    (tmp_path / "job.sh").write_text(script)
    faults = "faults=[{step: 12, rank: 1, kind: kill}]"
    agents = [
        subprocess.Popen(
            ["bash", tmp_path / "job.sh", *RUN, *text, "steps=20", "checkpoint.every=5", faults],
            env={**environment(), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        printed = "".join(agent.communicate(timeout=400)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert re.search(r"going on after step (5|10)\b", printed)
    assert list(recorded(folder)) == list(range(1, 21))
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["attempt"] for attempt in attempts] == [1, 2]
    assert sorted(path.name for path in (folder / "logs").glob("attempt_*/rank_1.log")) == [
        "rank_1.log",
        "rank_1.log",
    ]
