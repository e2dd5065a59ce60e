"""Lanes over real ranks: groups of their own, and an error with a name when a rank is lost."""

import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gatewise.launch.spawn import RankFailure, run_ranks
from gatewise.launch.world import Place
from gatewise.parallel.schedule.executor import run_plan
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.plan import Stage, StageGraph, Task, staged_plan

pytestmark = pytest.mark.dist

GRAPH = StageGraph(
    (
        Stage("send", "inter"),
        Stage("near", "intra", ("send",)),
        Stage("work", "compute", ("near",)),
        Stage("back", "inter", ("work",)),
    )
)
CHUNKS = 4
PATIENCE = 3.0  # seconds after which a collective gives up, in the test of a rank that hangs


class Sums:
    """Each communication task sums one number over the ranks, in the group of its lane."""

    def __init__(self, place: Place, patience: float) -> None:
        timeout = timedelta(seconds=patience)
        dist.init_process_group(
            "gloo",
            init_method=place.init_method,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
        self.rank = place.rank
        self.groups = {lane: dist.new_group(timeout=timeout) for lane in ("inter", "intra")}
        self.value = [torch.full((), float(chunk)) for chunk in range(CHUNKS)]

    def __call__(self, task: Task) -> dist.Work | None:
        lane = GRAPH.stage(task.stage).lane
        if lane == "compute":
            self.value[task.chunk] += 1
            return None
        return dist.all_reduce(self.value[task.chunk], group=self.groups[lane], async_op=True)


def _sums_everything(place: Place) -> dict[str, Any]:
    sums = Sums(place, 60)
    lanes = ThreadLanes()
    for _ in range(5):
        sums.value = [torch.full((), float(chunk)) for chunk in range(CHUNKS)]
        run_plan(GRAPH, staged_plan(GRAPH, CHUNKS), sums, lanes=lanes)
    lanes.close()
    dist.destroy_process_group()
    return {"values": [value.item() for value in sums.value]}


def test_ranks_agree_on_what_their_lanes_move(tmp_path: Path) -> None:
    outcomes = run_ranks(_sums_everything, 2, (), threads=1, logs=tmp_path)
    for outcome in outcomes:
        assert outcome.result == {"values": [2.0 * (4 * chunk + 1) for chunk in range(CHUNKS)]}


def _rank_1_is_lost(place: Place, dies: bool) -> dict[str, Any]:
    sums = Sums(place, 900 if dies else PATIENCE)

    def run(task: Task) -> dist.Work | None:
        if place.rank == 1 and task == Task("near", 2):
            if dies:
                os._exit(7)
            time.sleep(3 * PATIENCE)
        return sums(task)

    run_plan(GRAPH, staged_plan(GRAPH, CHUNKS), run, lanes=ThreadLanes())
    return {}


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "hangs"])
def test_a_rank_lost_in_mid_collective_is_an_error_with_names(tmp_path: Path, dies: bool) -> None:
    began = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(_rank_1_is_lost, 2, (dies,), threads=1, logs=tmp_path)
    assert time.monotonic() - began < 300  # not by the patience of 900 seconds
    # a rank that dies breaks the links of all lanes: the first that notices is named
    any_lane = r"lane (intra, task near|inter, task (send|back)):\d:"
    task = any_lane if dies else "lane intra, task near:2:"
    if dies:
        assert "rank 1" in str(caught.value)
    assert re.search(f"LaneError: rank 0, {task}", (tmp_path / "rank_0.log").read_text())
