"""Starting ranks: they meet, report, fail by name, stop on request and leave no orphan."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gatewise.launch.spawn import Outcome, RankFailure, _Ranks, run_here, run_ranks
from gatewise.launch.world import Place
from gatewise.parallel.errors import CheckpointError

pytestmark = pytest.mark.dist


def join(place: Place) -> None:
    dist.init_process_group(
        "gloo",
        init_method=place.init_method,
        rank=place.rank,
        world_size=place.world_size,
    )


def start(body: Callable[..., dict[str, Any]], logs: Path, *args: Any) -> list[Outcome]:
    return run_ranks(body, 2, args, threads=1, logs=logs)


def _sum_of_ranks(place: Place) -> dict[str, Any]:
    join(place)
    total = torch.tensor(float(place.rank))
    dist.all_reduce(total)
    print("a line of rank", place.rank)
    dist.destroy_process_group()
    return {"total": total.item(), "pid": os.getpid()}


def test_ranks_meet_without_a_port_and_report(tmp_path: Path) -> None:
    outcomes = start(_sum_of_ranks, tmp_path)
    assert [outcome.result["total"] for outcome in outcomes if outcome.result] == [1.0, 1.0]
    assert all(outcome.peak_rss_mb > 50 for outcome in outcomes)
    assert os.getpid() not in [outcome.result["pid"] for outcome in outcomes if outcome.result]
    assert "a line of rank 1" in (tmp_path / "rank_1.log").read_text()


def _rank_1_raises(place: Place, error: Exception) -> dict[str, Any]:
    join(place)
    if place.rank == 1:
        raise error
    dist.barrier()  # loses its peer
    return {}


def test_a_rank_that_raises_is_named_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"^rank 1: ZeroDivisionError: no luck ") as caught:
        start(_rank_1_raises, tmp_path, ZeroDivisionError("no\nluck"))
    assert "\n" not in str(caught.value)
    assert "raise error" in caught.value.details
    assert "Traceback" in (tmp_path / "rank_1.log").read_text()


def test_a_users_mistake_on_a_rank_is_told_without_its_type(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"^rank 1: checkpoint x is of another model ") as caught:
        start(_rank_1_raises, tmp_path, CheckpointError("checkpoint x is of another model"))
    assert caught.value.details == ""
    assert "Traceback" in (tmp_path / "rank_1.log").read_text()


def _rank_0_is_killed(place: Place) -> dict[str, Any]:
    join(place)
    if place.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return {}


def test_a_killed_rank_is_named_and_not_the_one_that_lost_it(tmp_path: Path) -> None:
    (tmp_path / "rank_0.log").write_text("=== start before\nan older run's line\n")
    with pytest.raises(RankFailure, match=r"^rank 0: killed by SIGKILL") as caught:
        start(_rank_0_is_killed, tmp_path)
    assert "older" not in caught.value.details


def _rank_1_leaves(place: Place) -> dict[str, Any]:
    if place.rank == 1:
        os._exit(7)
    time.sleep(600)
    return {}


def test_when_one_rank_is_gone_the_others_are_ended(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="rank 1: ended with exit code 7"):
        start(_rank_1_leaves, tmp_path)


def _wait_for_stop(place: Place, marker: Path) -> dict[str, Any]:
    (marker / f"rank_{place.rank}.ready").touch()
    time.sleep(0.5)  # the signal comes before anybody listens
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
    while not stops:
        time.sleep(0.02)
    return {"stopped": True}


def test_a_stop_signal_reaches_every_rank_even_before_it_listens(tmp_path: Path) -> None:
    def stop_when_ready() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready).start()
    outcomes = start(_wait_for_stop, tmp_path, tmp_path)
    assert [outcome.result for outcome in outcomes] == [{"stopped": True}] * 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _sleep(place: Place, marker: Path) -> dict[str, Any]:
    (marker / f"rank_{place.rank}.pid").write_text(str(os.getpid()))
    (marker / f"rank_{place.rank}.ready").touch()
    time.sleep(600)
    return {}


def test_a_rank_that_lost_a_stopped_peer_counts_as_stopped(tmp_path: Path) -> None:
    ranks = _Ranks(_sum_of_ranks, Place(rank=0, world_size=2), (), tmp_path)
    first, second = ranks.outcomes
    first.exit_code = -signal.SIGTERM
    second.exit_code, second.error = 1, "RuntimeError: Connection closed by peer"
    assert not ranks.were_stopped  # nobody asked
    ranks.stop(signal.SIGTERM)
    assert ranks.were_stopped
    second.error = "ValueError: a mistake of its own"
    assert not ranks.were_stopped


ORPHANS = """
import sys
from pathlib import Path
from test_spawn import _sleep
from gatewise.launch.spawn import run_ranks
if __name__ == "__main__":
    run_ranks(_sleep, 2, (Path(sys.argv[1]),), threads=1, logs=Path(sys.argv[1]))
"""


def test_killing_the_command_leaves_no_orphan(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(ORPHANS)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = subprocess.Popen(
        [sys.executable, str(tmp_path / "command.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2, seconds=60)
        pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        assert all(is_running(pid) for pid in pids)
    finally:
        command.kill()
        command.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids), seconds=20)


def wait_until(happened: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _raise_here(place: Place) -> dict[str, Any]:
    raise ValueError(f"on rank {place.rank}")


def test_a_rank_in_this_process_fails_by_name_too(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    with pytest.raises(RankFailure, match="rank 0: ValueError: on rank 0"):
        run_here(_raise_here, Place(rank=0, world_size=1), (), log=log)
    assert "Traceback" in log.read_text()
