"""What the lanes of a step did: exposed communication, and one step as a Chrome trace.

Read `parallel/schedule/recorder.py` first. Each rank writes `trace/step_<n>_rank_<r>.json`:
measured lanes and, below them, what was predicted. Perfetto opens several at once. Time zero is
the end of a barrier, so that ranks on different machines agree to within its length.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gatewise.parallel.collectives import Group
from gatewise.parallel.dims import Groups
from gatewise.parallel.runtime import Runtime
from gatewise.parallel.schedule.recorder import Mark, Recorder, split_waits
from gatewise.parallel.schedule.timeline import Interval, Timeline, chrome_events
from gatewise.parallel.streams import clock_for

__all__ = ["LaneMeter", "trace_events"]

_FIRST_STAGE = {"order": "forward", "combine_grad": "backward"}  # of a layer's passes


class LaneMeter:
    """Reads the recorder of a rank's MoE layers after each step.

    Args:
        runtime: of this rank.
        folder: of the run.
        trace: step whose lanes are written down; None: none.
    """

    def __init__(self, runtime: Runtime, folder: Path, *, trace: int | None) -> None:
        self.recorder = Recorder(clock_for(runtime.device))
        self.recorder.is_on = False  # but in steps: evaluation is not measured
        self._runtime, self._folder, self._trace = runtime, folder, trace
        self._origin: Mark | None = None
        self._exposed_ms: list[float] = []  # of each step since the last record

    def begin(self, step: int) -> None:
        """Get ready for a step; all ranks start the one to be traced together."""
        self.recorder.clear()
        self.recorder.is_on = True
        self._origin = None
        if step == self._trace:
            control = self._runtime.groups.control
            if control.handle is not None:
                dist.barrier(group=control.handle)
            self._origin = self.recorder.mark()

    def end(self, step: int, predicted: Mapping[str, Timeline]) -> Timeline:
        """Read what the step did, once the host has waited for it.

        Args:
            step: that has ended.
            predicted: of one layer's "forward" and "backward"; empty: unknown.
        """
        self.recorder.is_on = False
        line = self.recorder.drain(self._origin)
        self._exposed_ms.append(line.exposed_ms())
        if self._origin is not None:
            groups = self._runtime.groups
            lines = _gather_lines(line, groups)
            events = trace_events(line, lines, _members(groups), predicted)
            path = self._folder / "trace" / f"step_{step}_rank_{self._runtime.rank}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"traceEvents": events}) + "\n", encoding="utf-8")
        return line

    def drain(self) -> dict[str, float]:
        """Return the mean over the steps since the last record, in ms."""
        exposed_ms, self._exposed_ms = self._exposed_ms, []
        if not exposed_ms:
            return {}
        return {"schedule/exposed_communication_ms": sum(exposed_ms) / len(exposed_ms)}


def _gather_lines(own: Timeline, groups: Groups) -> Sequence[Timeline]:
    """Return what every rank measured, in the order of ranks."""
    if groups.control.handle is None:
        return [own]
    lines: list[Timeline] = [own] * groups.ranks
    dist.all_gather_object(lines, own, group=groups.control.handle)
    return lines


def _members(groups: Groups) -> dict[str, Group]:
    """Return who takes part in each kind of communication, by the names of stages."""
    experts = groups.experts
    return {
        **dict.fromkeys(("dispatch", "collect", "collect_grad", "dispatch_grad"), experts.rows),
        **dict.fromkeys(("gather", "scatter", "scatter_grad", "gather_grad"), experts.shard),
        **dict.fromkeys(("reduce", "reduce_window"), groups.control),
        "exchange_counts": experts.everyone,
    }


def _stage(interval: Interval) -> str:
    """Return the name of a task's stage, without the layer's."""
    return interval.task.stage.rpartition(".")[2]


def _is_of(stage: str, interval: Interval) -> bool:
    return _stage(interval) == stage


def trace_events(
    own: Timeline,
    lines: Sequence[Timeline],
    groups: Mapping[str, Group],
    predicted: Mapping[str, Timeline],
) -> list[dict[str, Any]]:  # JSON's own types
    """Return the events of a rank's trace.

    Args:
        own: what this rank measured.
        lines: what every rank measured, on one clock.
        groups: by the name of a stage, whose members its communication waits for.
        predicted: of one layer's "forward" and "backward"; may be empty.
    """
    for stage, group in groups.items():
        if group.handle is not None:
            members = [lines[rank] for rank in dist.get_process_group_ranks(group.handle)]
            own = split_waits(own, members, partial(_is_of, stage))
    events = chrome_events(own, "measured", process=0)
    threads = {str(event["name"]): event for event in events if event["ph"] == "X"}
    events += [
        {
            **threads[str(interval.task)],
            "name": "wait for other ranks",
            "ts": round(interval.start_ms * 1e3, 3),
            "dur": round((interval.end_ms - interval.start_ms - interval.work_ms) * 1e3, 3),
            "args": {},
        }
        for interval in own.intervals
        if interval.end_ms - interval.start_ms - interval.work_ms > 1e-3
    ]
    for interval in own.intervals:
        name = _FIRST_STAGE.get(_stage(interval), "")
        if name in predicted and interval.task.chunk == 0:
            line = predicted[name]
            found = chrome_events(line, "predicted", process=1, start_ms=interval.start_ms)
            events += [e for e in found if e["ph"] == "X" or e not in events]
    return events
