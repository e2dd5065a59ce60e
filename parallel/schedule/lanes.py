"""Lanes on CPUs: one thread for each kind of communication, first in, first out.

Read `executor.py` first. A process group of gloo is no lane: it works on several collectives at
once, so a small one overtakes a large one. A thread that waits for each collective before it issues
the next one makes it a lane, and keeps the order the same on every rank. Waiting releases Python's
lock, so the calling thread computes meanwhile.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from gatewise.parallel.schedule.executor import Handle, Issue, PlanRunner, Run
from gatewise.parallel.schedule.plan import Lane
from gatewise.parallel.schedule.recorder import Recorder

__all__ = ["ThreadLanes"]

_Work = Callable[[], None]


class ThreadLanes:
    """A thread for each communication lane, started when a plan first uses it.

    The threads end with `close`, or with this object. Copies have threads of their own.
    """

    def __init__(self) -> None:
        self._inboxes: dict[Lane, queue.SimpleQueue[_Work | None]] = {}
        self._closer: weakref.finalize[Any, Any] | None = None

    def run(self, runner: PlanRunner, run: Run, recorder: Recorder | None) -> None:
        """Run a plan: communication lanes on their threads, the compute lane on this one.

        Raises:
            LaneError: if communication fails; what the other lanes still do is not waited for,
                since it may wait for a rank that is gone.
        """
        under_way = _PassUnderWay(runner, run, recorder)
        for lane, indices in runner.by_lane.items():
            if lane != "compute" and indices:
                self._inbox(lane).put(under_way.work(lane))
        try:
            under_way.work("compute")()
            under_way.wait_for_all()
        except BaseException as error:
            under_way.fail(error)  # an interrupt, for one, of which the threads do not know
            raise

    def start(self, lane: Lane, issue: Issue, after: Handle | None) -> Handle:
        """Let the lane's thread wait for `after`, issue, and wait for the end.

        What goes wrong is raised where the handle is waited for.
        """
        done: Future[None] = Future()

        def work() -> None:
            try:
                if after is not None:
                    after.wait()
                handle = issue()
                if handle is not None:
                    handle.wait()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._inbox(lane).put(work)
        return _Errand(done)

    def close(self) -> None:
        """Let the threads end once they have done what they were given."""
        if self._closer is not None:
            self._closer()
        self._inboxes, self._closer = {}, None

    def _inbox(self, lane: Lane) -> "queue.SimpleQueue[_Work | None]":
        if lane not in self._inboxes:
            inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
            self._inboxes[lane] = inbox
            threading.Thread(
                target=_serve, args=(inbox,), name=f"gatewise lane {lane}", daemon=True
            ).start()
            if self._closer is None:
                self._closer = weakref.finalize(self, _end, self._inboxes)
        return self._inboxes[lane]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ThreadLanes":
        return ThreadLanes()

    def __reduce__(self) -> tuple[type["ThreadLanes"], tuple[()]]:
        return ThreadLanes, ()


def _serve(inbox: "queue.SimpleQueue[_Work | None]") -> None:
    with torch.no_grad():  # a new thread would record for autograd
        while (work := inbox.get()) is not None:
            work()
            del work  # it holds the tensors of its pass


def _end(inboxes: "dict[Lane, queue.SimpleQueue[_Work | None]]") -> None:
    for inbox in inboxes.values():
        inbox.put(None)


@dataclass(frozen=True, slots=True)
class _Errand:
    """Communication that a lane was given."""

    done: Future[None]

    def wait(self) -> None:
        """Return when it has ended, or raise what went wrong."""
        self.done.result()


class _PassUnderWay:
    """What the threads of one pass tell each other."""

    def __init__(self, runner: PlanRunner, run: Run, recorder: Recorder | None) -> None:
        self._runner, self._run, self._recorder = runner, run, recorder
        self._changed = threading.Condition()
        self._ended = [False] * len(runner.tasks)
        self._left = len(runner.tasks)
        self._failure: BaseException | None = None

    def work(self, lane: Lane) -> _Work:
        """Return what the thread of a lane has to do."""

        def work() -> None:
            for index in self._runner.by_lane[lane]:
                if not self._wait_for(index):
                    break
                try:
                    self._runner.perform(index, self._run, self._recorder)
                except BaseException as error:
                    self.fail(error)
                    break
                with self._changed:
                    self._ended[index] = True
                    self._left -= 1
                    self._changed.notify_all()

        return work

    def wait_for_all(self) -> None:
        """Return when every task has ended; raise what went wrong first."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left or self._failure is not None)
            if self._failure is not None:
                raise self._failure

    def _wait_for(self, index: int) -> bool:
        """Wait for what a task needs; return False where the pass has failed."""
        needs = self._runner.needs[index]
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure is not None or all(self._ended[other] for other in needs)
            )
            return self._failure is None

    def fail(self, error: BaseException) -> None:
        """Tell all threads that the pass is over."""
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()
