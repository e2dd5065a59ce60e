"""Jobs on a real Slurm with two virtual nodes: done, preempted, cut off, an array, a node down.

Every job has 4 ranks on 2 nodes unless it says otherwise, and must end with the losses of a run
that nobody disturbed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from commands import CLI, ranks_of
from slurm_cluster import SlurmCluster, running_slurm, why_no_slurm

from gatewise.training.sinks import read_records

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm())),
]

RUN = ("experiment=tiny", "model.layers=1", "steps=24", "evaluation.tokens=512")
SLURM = ("submit.launcher=slurm", "submit.head=127.0.0.1", "submit.snapshot=false")
FOUR = ("submit.nodes=2", "submit.ranks_per_node=2", "parallel.expert=2")
# Each step takes a third of a second once, so that a run is not done before the test can hit it.
_SLOW = ",".join(f"{{step: {n}, rank: 0, kind: slow, seconds: 0.3}}" for n in range(3, 25))
SLOW = f"faults=[{_SLOW}]"
# A job that is requeued is for a moment PREEMPTED, NODE_FAIL or something else: not among these.
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of a text of some 100 kB."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        words = (f"{number * i % 97} times {i} " for i in range(700))
        (folder / f"{number:02d}.txt").write_text("".join(words))
    return [f"data.path={folder}", f"data.cache={folder.parent / 'cache'}"]


def submit(cluster: SlurmCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*CLI, "submit", *arguments],
        env={**environment, "WANDB_MODE": "disabled", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def start(cluster: SlurmCluster, folder: Path, *arguments: str) -> str:
    """Queue a job and return its number."""
    done = submit(cluster, *RUN, *SLURM, *arguments, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "submit" / "result.json").read_text())
    assert done.stdout.splitlines()[-1] == str(folder / "submit" / "result.json")
    return str(result["job"])


def losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl")
    found = [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
    assert len(found) == len(dict(found))  # no step twice
    return dict(found)


def output(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "logs").glob("slurm-*.log"))


def finish(cluster: SlurmCluster, job: str, folder: Path, seconds: float = 600) -> str:
    """Wait for a job that must complete and return what it printed."""

    def has_ended(states: list[str]) -> bool:
        return bool(set(states) & ENDS)

    states = cluster.wait(job, until=has_ended, seconds=seconds)
    assert states == ["COMPLETED"], output(folder)
    return output(folder)


def wait_until(condition: Callable[[], bool], folder: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, output(folder)
        time.sleep(0.1)


def hold_after(folder: Path, step: int) -> list[int]:
    """Stop the ranks once a run has recorded a step; return them."""
    file = folder / "metrics.jsonl"
    wait_until(lambda: file.exists() and max(losses(folder), default=0) >= step, folder)
    ranks = ranks_of(folder)
    assert len(ranks) >= 4, output(folder)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    return ranks


def was_preempted(job: Mapping[str, str]) -> bool:
    """Tell it of a job that may have been requeued since, too."""
    return job["PreemptTime"] != "None" or job["Restarts"] != "0"


def let_go(ranks: list[int]) -> None:
    """Let held ranks go on; Slurm may have ended them."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)


@pytest.fixture(scope="module")
def undisturbed(
    cluster: SlurmCluster, text: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, float]:
    """Return the losses of a job that ran through; this is the first of the tests, too."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    printed = finish(cluster, start(cluster, folder, *FOUR, *text), folder)
    assert "the step ended with 0, the ranks with 0" in printed
    result = json.loads((folder / "result.json").read_text())
    assert (result["world_size"], result["steps"], result["exit"]) == (4, 24, 0)
    ranks = sorted(path.name for path in (folder / "logs" / "attempt_0").iterdir())
    assert [name for name in ranks if name.startswith("rank_")] == [
        f"rank_{n}.log" for n in range(4)
    ]
    assert not list(folder.glob(".outcome*"))
    return losses(folder)


def test_a_job_of_four_ranks_on_two_nodes_completes(undisturbed: dict[int, float]) -> None:
    assert list(undisturbed) == list(range(1, 25))
    assert undisturbed[24] < undisturbed[1] - 1


def test_a_preempted_job_saves_comes_back_and_ends_alike(
    cluster: SlurmCluster, text: list[str], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = start(cluster, folder, *FOUR, *text, SLOW)
    ranks = hold_after(folder, 5)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.call("sbatch", *urgent, "--wrap=sleep 1")
    wait_until(lambda: was_preempted(cluster.job(job)), folder)
    let_go(ranks)
    printed = finish(cluster, job, folder)
    assert "the ranks with 85" in printed
    assert "saved; requeued" in printed
    assert re.search(r"going on after step \d+", printed)
    assert cluster.job(job)["Restarts"] == "1"
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-6)
    assert (folder / "logs" / "attempt_1" / "rank_3.log").exists()


def test_a_job_passes_its_time_limit_by_several_requeues(
    cluster: SlurmCluster, text: list[str], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """Slurm looks at limits every half minute, which is why the ranks are held."""
    folder = tmp_path / "run"
    limit = ("submit.time_limit=60", "submit.signal_lead=3000")  # 10 minutes without a signal
    job = start(cluster, folder, *FOUR, *text, SLOW, *limit)
    reached = 0
    for number in (1, 2):
        ranks = hold_after(folder, reached + 4)
        cluster.call("scontrol", "update", f"jobid={job}", "timelimit=50")
        wait_until(lambda n=number: output(folder).count("asking the ranks to save") == n, folder)
        cluster.call("scontrol", "update", f"jobid={job}", "timelimit=60")
        let_go(ranks)
        wait_until(lambda n=number: cluster.job(job)["Restarts"] == str(n), folder)
        reached = max(losses(folder))
    printed = finish(cluster, job, folder)
    assert printed.count("saved; requeued") == 2
    assert len(set(re.findall(r"going on after step (\d+)", printed))) == 2
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-6)


def test_a_job_survives_a_node_that_goes_down(
    cluster: SlurmCluster, text: list[str], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = start(cluster, folder, *FOUR, *text, SLOW, "checkpoint.every=5")
    hold_after(folder, 12)
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", folder)
    finally:
        cluster.bring_back("n2")
    printed = finish(cluster, job, folder)
    assert re.search(r"going on after step \d+", printed)
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-6)


def test_a_sweep_of_four_points_is_one_array(
    cluster: SlurmCluster, text: list[str], tmp_path: Path
) -> None:
    done = submit(
        *(cluster, "-m", *RUN, *SLURM, *text, "steps=5", "submit.wait=true"),
        *("router=rmoe,deepseek_v3", "optim.lr=1e-3,3e-3", f"run.dir={tmp_path / 'sweep'}"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "sweep" / "result.json")
    result = json.loads((tmp_path / "sweep" / "result.json").read_text())
    assert result["states"] == {"finished": 4}
    assert len({row["val_loss"] for row in result["rows"]}) == 4
    assert len(list((tmp_path / "sweep" / "submit").glob(f"slurm-{result['job']}_*.log"))) == 4
    assert (tmp_path / "sweep" / "sweep.svg").exists()


def test_a_mistake_is_never_requeued(
    cluster: SlurmCluster, text: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wrong = submit(cluster, *RUN, *SLURM, "submit.partition=gup", f"run.dir={folder}")
    assert wrong.returncode == 2
    assert "invalid partition specified: gup" in wrong.stderr
    assert "submit.partition can be main, urgent" in wrong.stderr
    job = start(cluster, folder, "data.path=/nonexistent", *text[1:])
    states = cluster.wait(job, until=lambda states: states == ["FAILED"], seconds=400)
    assert states == ["FAILED"]
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "gatewise: error: data.path" in output(folder)
