"""Start the ranks of a command on this machine, watch them, and end them together.

One forkserver imports torch once and forks every rank from it; ranks meet through a file in a
temporary folder, so no port is searched. Each rank lives in its own session, writes its log to
`logs/rank_<n>.log`, and ends when this process ends, however that happens. Read `world.py` for
what a rank is told about its place.
"""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from gatewise.launch.rank_log import configure_logging, log_tail, redirect, start_line
from gatewise.launch.signals import Postman, StopSignals
from gatewise.launch.world import Place
from gatewise.parallel.beat import read_beat
from gatewise.parallel.errors import ConfigError, RankError, is_lost_peer

__all__ = ["Outcome", "RankFailure", "run_here", "run_ranks", "warm_up"]

Body = Callable[..., Mapping[str, Any]]

_PRELOAD = ["torch", "torch.distributed.device_mesh", "torch.distributed.tensor"]
_GRACE_SECONDS = 2.0  # for the other ranks to say what they saw, once one has failed


class RankFailure(RuntimeError):
    """A rank crashed; the message names the rank and its error in one line."""

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details  # last lines of the traceback or of the log


@dataclass(slots=True)
class Outcome:
    """What a rank left behind."""

    place: Place
    result: Mapping[str, Any] | None = None  # None until the body has returned
    error: str | None = None  # type and message of what it raised
    speaks_for_all: bool = False  # the message names the rank that it is about by itself
    trace: str = ""
    peak_rss_mb: float = 0.0
    exit_code: int | None = None
    seconds: float = field(default_factory=time.monotonic)  # when it ended

    @property
    def failed(self) -> bool:
        """Tell whether the rank ended without a result."""
        return self.result is None


def warm_up(threads: int, *, preload: Sequence[str] = ()) -> None:
    """Start the process that ranks are forked from; it imports in the background.

    Args:
        threads: compute threads of each rank.
        preload: modules to import once for all ranks, beside torch.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    multiprocessing.set_forkserver_preload([*_PRELOAD, *preload])
    forkserver.ensure_running()


def run_here(body: Body, place: Place, args: Sequence[Any], *, log: Path) -> Outcome:
    """Run `body` as a rank in this process.

    Raises:
        RankFailure: if the body raises; the traceback is in `log`.
    """
    handlers: list[logging.Handler] = [logging.FileHandler(log, delay=True)]
    if place.rank == 0:
        handlers.append(logging.StreamHandler())
    configure_logging(handlers, place)
    postman = Postman()
    try:
        with StopSignals(postman.deliver):
            try:
                result = body(place, *args)
            finally:
                postman.cancel()
    except Exception as error:
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(start_line() + traceback.format_exc())
        outcome = Outcome(
            place,
            error=_one_line(error),
            speaks_for_all=isinstance(error, RankError),
            trace=_trace(error),
            exit_code=1,
        )
        raise _failure([outcome], log.parent) from error
    finally:
        for handler in handlers:
            logging.getLogger("gatewise").removeHandler(handler)
            handler.close()
    return Outcome(place, result=result, peak_rss_mb=peak_rss_mb(), exit_code=0)


def run_ranks(
    body: Body, world_size: int, args: Sequence[Any], *, threads: int, logs: Path
) -> list[Outcome]:
    """Run `body(place, *args)` on `world_size` ranks of this machine and return their outcomes.

    A stop signal is passed on to every rank as SIGTERM; a second one ends them at once.

    Args:
        body: a module-level function that returns what rank 0 has to report.
        world_size: number of ranks.
        args: further arguments; they are pickled.
        threads: compute threads of each rank.
        logs: folder of the ranks' logs.

    Raises:
        RankFailure: if a rank raises or dies; the others have been ended.
        KeyboardInterrupt: if ranks that save nothing ended by the signal that was passed on.
    """
    warm_up(threads)
    with tempfile.TemporaryDirectory(prefix="gatewise_") as folder:
        first = Place(
            rank=0,
            world_size=world_size,
            local_rank=0,
            local_world_size=world_size,
            init_method=f"file://{folder}/store",
            threads=threads,
        )
        ranks = _Ranks(body, first, args, logs)
        with StopSignals(ranks.stop):
            try:
                ranks.start()
                outcomes = ranks.wait()
            finally:
                ranks.kill()
    if any(outcome.failed for outcome in outcomes):
        if ranks.were_stopped:
            raise KeyboardInterrupt
        raise _failure(outcomes, logs)
    return outcomes


def peak_rss_mb() -> float:
    """Return the largest resident memory this process ever had, in MiB."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class _Ranks:
    """The processes of one command."""

    def __init__(self, body: Body, first: Place, args: Sequence[Any], logs: Path) -> None:
        places = [replace(first, rank=n, local_rank=n) for n in range(first.world_size)]
        self.outcomes = [Outcome(place) for place in places]
        self._task = (body, args)
        self._logs = logs
        self._processes: list[ForkServerProcess] = []
        self._pipes: dict[int, connection.Connection] = {}  # of ranks that have not reported yet
        self._stops = 0

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        body, args = self._task
        for outcome in self.outcomes:
            reader, writer = context.Pipe(duplex=False)
            log = self._logs / f"rank_{outcome.place.rank}.log"
            process = context.Process(
                target=_rank_main,
                args=(body, outcome.place, args, str(log), writer),
                name=f"gatewise rank {outcome.place.rank}",
                daemon=False,
            )
            process.start()
            writer.close()
            self._processes.append(process)
            self._pipes[outcome.place.rank] = reader
        if self._stops:
            self.stop(signal.SIGTERM)

    def wait(self) -> list[Outcome]:
        """Wait until all ranks ended; once one failed, for the others only a moment."""
        deadline: float | None = None
        running = dict(enumerate(self._processes))
        while running:
            timeout = None if deadline is None else deadline - time.monotonic()
            if timeout is not None and timeout <= 0:
                break
            watched = [process.sentinel for process in running.values()]
            connection.wait(
                [*watched, *(self._pipes[n] for n in running if n in self._pipes)], timeout
            )
            for n, process in list(running.items()):
                self._receive(n)
                if process.exitcode is None:
                    continue
                self._receive(n)  # what it said in its last moment
                self.outcomes[n].exit_code = process.exitcode
                self.outcomes[n].seconds = time.monotonic()
                del running[n]
                if self.outcomes[n].failed and deadline is None:
                    deadline = time.monotonic() + _GRACE_SECONDS
        return self.outcomes

    def stop(self, number: int) -> None:
        """Ask every rank to save and end; the second time end them at once."""
        self._stops += 1
        for process in self._processes:
            if process.pid is not None and process.exitcode is None:
                _send(process.pid, signal.SIGTERM if self._stops == 1 else signal.SIGKILL)

    @property
    def were_stopped(self) -> bool:
        """Tell whether the ranks were asked to end, and this is why they failed.

        A rank that only lost a peer which ended so failed for the same reason.
        """
        failed = [outcome for outcome in self.outcomes if outcome.failed]
        ended = [outcome.exit_code == -signal.SIGTERM for outcome in failed]
        others = [outcome for outcome, asked in zip(failed, ended, strict=True) if not asked]
        return self._stops > 0 and any(ended) and all(_is_consequence(other) for other in others)

    def kill(self) -> None:
        """End what still runs, with everything it started."""
        for process in self._processes:
            if process.exitcode is None and process.pid is not None:
                _send(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.join()

    def _receive(self, n: int) -> None:
        """Take the one message of a rank, if it is there; then its pipe is not watched any more."""
        pipe, outcome = self._pipes.get(n), self.outcomes[n]
        if pipe is None or not pipe.poll():
            return
        try:
            message = pipe.recv()
        except (EOFError, OSError):  # it died without one
            message = {}
        del self._pipes[n]
        pipe.close()
        outcome.result = message.get("result")
        outcome.error = message.get("error")
        outcome.speaks_for_all = message.get("speaks_for_all", False)
        outcome.trace = message.get("trace", "")
        outcome.peak_rss_mb = message.get("peak_rss_mb", 0.0)


def _rank_main(
    body: Body, place: Place, args: Sequence[Any], log: str, pipe: connection.Connection
) -> None:
    """Be a rank: runs in the child process."""
    os.setsid()  # the terminal's Ctrl-C goes to the parent only, which passes it on once
    StopSignals(Postman().deliver).listen()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    redirect(Path(log), keep_stdout=place.rank == 0)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if place.rank == 0:
        handlers.append(logging.StreamHandler(terminal))
    configure_logging(handlers, place)
    message: dict[str, Any] = {}
    code = 0
    try:
        message["result"] = body(place, *args)
    except BaseException as error:
        code = 1
        message["error"] = _one_line(error)
        message["speaks_for_all"] = isinstance(error, RankError)
        message["trace"] = _trace(error)
        traceback.print_exc()
    message["peak_rss_mb"] = peak_rss_mb()
    pipe.send(message)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's shutdown: a process group whose peer is gone may wait in it.
    os._exit(code)


def _end_with_parent() -> None:
    """Wait for the end of the starting process, then end this rank: `kill -9` leaves no orphan."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _send(os.getpid(), signal.SIGKILL)


def _send(pid: int, number: int) -> None:
    """Signal the session of a rank, or the rank where it has not made one yet."""
    try:
        if number == signal.SIGKILL and os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        return


def _failure(outcomes: Sequence[Outcome], logs: Path) -> RankFailure:
    """Name the rank that failed first for a reason of its own."""
    failed = [outcome for outcome in outcomes if outcome.failed and outcome.exit_code is not None]
    cause = min(failed, key=lambda outcome: (_is_consequence(outcome), outcome.seconds))
    log = logs / f"rank_{cause.place.rank}.log"
    if cause.error is not None:
        what = cause.error
    elif cause.exit_code is not None and cause.exit_code < 0:
        name = signal.Signals(-cause.exit_code).name
        what = f"killed by {name}"
        if name == "SIGKILL":
            what += " (by hand, or because memory ran out)"
    else:
        what = f"ended with exit code {cause.exit_code} and no message"
    if cause.error is not None and cause.speaks_for_all:
        return RankFailure(cause.error)
    beat = read_beat(logs, cause.place.rank)
    if cause.error is None and beat is not None and beat.step:
        what = f"{what} in step {beat.step} ({beat.phase})"
    details = cause.trace if cause.error is not None else log_tail(log)
    return RankFailure(
        f"rank {cause.place.rank}: {what} (log: {log})",
        details="\n".join(details.strip().splitlines()[-8:]),
    )


def _is_consequence(outcome: Outcome) -> bool:
    """Tell whether a rank only saw that another one was gone."""
    return outcome.speaks_for_all or is_lost_peer(outcome.error or "")


def _trace(error: BaseException) -> str:
    """Return the traceback to show; a user's mistake needs none, its line says what to do."""
    return "" if isinstance(error, (ConfigError, RankError)) else traceback.format_exc()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (ConfigError, RankError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
