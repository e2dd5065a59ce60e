"""Emulated nodes: made, shaped, used by ranks, and gone afterwards; these tests need root."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gatewise.launch.testbed import PORT, Links, Testbed, missing_for_namespaces
from gatewise.parallel.errors import ConfigError


def _reason() -> str:
    """Return why nodes cannot be made here, or nothing."""
    missing = missing_for_namespaces()
    if missing:
        return f"network namespaces need {missing}"
    try:
        with Testbed(2, Links(1000, 1000)):
            return ""
    except ConfigError as error:
        return str(error)


pytestmark = pytest.mark.dist


@pytest.fixture(autouse=True, scope="module")
def _nodes_can_be_made() -> None:
    reason = _reason()
    if reason:
        pytest.skip(reason)


def nodes(pid: int) -> list[str]:
    """Return the nodes that a process has."""
    folder = Path("/run/netns")
    return [path.name for path in folder.iterdir() if path.name.startswith(f"gw{pid}x")]


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    small = ["tokens=64", "width=64", "expert_width=64", "max_chunks=2", "policies=fsmoe"]
    command = [
        sys.executable,
        "-m",
        "gatewise.launch.cli",
        "bench",
        "schedule",
        f"run.dir={folder}",
    ]
    return subprocess.Popen(
        [*command, "testbed=namespaces", *small, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(command: "subprocess.Popen[str]", words: str) -> None:
    """Wait until a command has printed something."""
    assert command.stdout is not None
    assert any(words in line for line in command.stdout)


def test_rows_take_the_links_of_their_lane_and_nodes_are_removed(tmp_path: Path) -> None:
    command = start(tmp_path, "links=1000/4000", "trials=2", "nodes=3", "tokens=192")
    out, err = command.communicate(timeout=200)
    assert command.returncode == 0, err
    result = json.loads((tmp_path / "result.json").read_text())
    assert out.splitlines()[-1] == str(tmp_path / "result.json")
    assert result["testbed"] == "namespaces"
    assert result["cannot_show"] == ""
    rows = 192 * 64 * 4
    for row in result["rows"]:
        assert row["links"] == "shaped"
        # two ranks a node, two passes; a third of the rows stays on each node; headers on top
        assert 1 < row["inter_bytes"] / (2 * 2 * 2 * rows * 2 / 3) < 1.2
        assert 1 < row["intra_bytes"] / (2 * 2 * 2 * rows) < 1.2
    assert not nodes(command.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_ranks_and_removes_the_nodes(tmp_path: Path, number: int) -> None:
    command = start(tmp_path, "links=10/10", "trials=1000")
    wait_for(command, "measuring costs")
    assert len(nodes(command.pid)) == 2
    command.send_signal(number)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 130
    assert err.splitlines()[-1] == "gatewise: error: stopped by a signal"
    assert not nodes(command.pid)


def test_a_rank_that_dies_under_way_is_named_and_nodes_are_removed(tmp_path: Path) -> None:
    command = start(tmp_path, "links=10/10", "trials=1000", "timeout=20")
    wait_for(command, "measuring costs")
    # ranks carry the number of their log; the one of rank 2 has it open
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and _has_open(path, tmp_path / "logs" / "rank_2.log"):
            os.kill(int(path.name), signal.SIGKILL)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 1
    assert "gatewise: error: rank 2: killed by SIGKILL" in err.splitlines()[-1]
    assert not nodes(command.pid)


def test_a_link_that_goes_down_ends_the_measurement_within_the_timeout(tmp_path: Path) -> None:
    command = start(tmp_path, "links=10/10", "trials=1000", "timeout=3")
    wait_for(command, "measuring costs")
    time.sleep(2)  # other ranks may still connect; at 10 Mbit/s there is enough left to measure
    node = min(nodes(command.pid))
    subprocess.run(["ip", "-n", node, "link", "set", PORT, "down"], check=True)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 1
    last = err.splitlines()[-1]
    # in an operation that is measured, or where ranks meet before and after
    task = r"(inter|meeting):\d+"
    assert re.search(rf"rank \d: LaneError: rank \d, lane inter, task {task}: .*[Tt]imed out", last)
    assert not nodes(command.pid)


def _has_open(process: Path, file: Path) -> bool:
    try:
        return any(os.readlink(link) == str(file) for link in (process / "fd").iterdir())
    except OSError:  # ended meanwhile
        return False


def test_nodes_of_a_killed_command_are_removed_by_the_next_one() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    subprocess.run(["ip", "netns", "add", f"gw{gone.pid}x0"], check=True)
    with Testbed(2, Links(None, None)) as made:
        assert nodes(gone.pid) == []
        assert len(nodes(os.getpid())) == len(made.names)
    assert nodes(os.getpid()) == []
