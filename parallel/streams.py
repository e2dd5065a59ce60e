"""Lanes on GPUs: one stream for each kind of communication; the calling stream computes.

Read `schedule/executor.py` first. The host issues the tasks in the runner's order, which is the
same on every rank; events make a stream wait for what its next task needs. The host waits for
nothing. Lanes start after all that the calling stream was given before, and it goes on after them.
"""

import torch
from torch import Tensor

from gatewise.parallel.schedule.executor import Handle, Issue, Lanes, PlanRunner, Run
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.plan import Lane
from gatewise.parallel.schedule.recorder import Clock, HostClock, Recorder

__all__ = ["StreamClock", "StreamLanes", "clock_for", "lanes_for", "used_here"]


class StreamLanes:
    """A stream of high priority for each communication lane.

    A tensor that crosses from one lane to another must be passed to `used_here` where it is
    consumed.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[Lane, torch.cuda.Stream] = {}

    def run(self, runner: PlanRunner, run: Run, recorder: Recorder | None) -> None:
        """Issue every task of a plan on its lane's stream."""
        compute = torch.cuda.current_stream(self._device)
        begun = compute.record_event()
        streams: dict[Lane, torch.cuda.Stream] = {"compute": compute}
        for lane, indices in runner.by_lane.items():
            if lane != "compute" and indices:
                streams[lane] = self._stream(lane)
                streams[lane].wait_event(begun)
        ended: list[torch.cuda.Event] = []
        for index, lane in enumerate(runner.lanes):
            stream = streams[lane]
            for other in runner.needs[index]:
                if runner.lanes[other] != lane:
                    stream.wait_event(ended[other])
            with torch.cuda.stream(stream):
                runner.perform(index, run, recorder)  # a handle makes the stream wait, not the host
            ended.append(stream.record_event())
        for stream in streams.values():
            if stream is not compute:
                compute.wait_stream(stream)

    def start(self, lane: Lane, issue: Issue, after: Handle | None) -> Handle:
        """Issue on the lane's stream, behind `after` or what the calling stream was given."""
        stream = self._stream(lane)
        if after is None:
            stream.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(stream):
            if after is not None:
                after.wait()
            handle = issue()
            if handle is not None:
                handle.wait()  # a handle makes the stream wait, not the host
        return _Reached(stream.record_event(), self._device)

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        if lane not in self._streams:
            self._streams[lane] = torch.cuda.Stream(self._device, priority=-1)
        return self._streams[lane]


class _Reached:
    """A point of a stream, for which the stream that waits waits; the host does not."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


class StreamClock:
    """Times of a GPU's streams, by events."""

    def mark(self) -> torch.cuda.Event:
        """Return an event at the end of what the current stream was given."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return milliseconds; the host waits until both events are reached."""
        start.synchronize()
        end.synchronize()
        return float(start.elapsed_time(end))


def lanes_for(device: torch.device) -> Lanes:
    """Return the lanes of a device; threads and streams start when a plan uses them."""
    return StreamLanes(device) if device.type == "cuda" else ThreadLanes()


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device's lanes."""
    return StreamClock() if device.type == "cuda" else HostClock()


def used_here(x: Tensor) -> Tensor:
    """Keep a tensor's memory from other use until the current stream has read it; return it."""
    if x.device.type == "cuda":
        x.record_stream(torch.cuda.current_stream(x.device))
    return x
