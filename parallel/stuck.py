"""Who did not arrive: a report when ranks wait for one that does not come.

A rank whose collective fails writes `logs/stuck/rank_<n>.json`: what it was doing, the last
collective of each group from torch's flight recorder, and its Python stacks. That makes the ranks
write theirs whose watch sees no progress (`Watch`). From these files each failing rank derives the
same sentence, and the lowest writes `logs/stuck/report.txt`.

Source: gloo's entries in the flight recorder are numbered per group when a rank joins a collective,
        and are never marked as completed; so the rank whose number is lower has not arrived.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewise.parallel.beat import Beat, is_gone, read_beat

__all__ = ["Finding", "Watch", "explain_stuck", "find_missing", "report_stuck"]

_PATIENCE_SECONDS = 3.0  # for the other ranks' files
_MACHINERY = ("/threading.py", "/concurrent/futures/thread.py")  # of threads that wait for work


@dataclass(frozen=True, slots=True)
class Finding:
    """What the ranks' files say together."""

    missing: tuple[int, ...]  # ranks that others wait for
    text: str  # one line


class Watch:
    """Writes this rank's file when another rank has written one and this one stands still.

    Args:
        folder: of the run's logs.
        rank: of this process.
        world: number of ranks; with one nothing is watched.
        groups: name of each process group with its ranks.
        beat: of this rank.
        timeout: seconds after which a collective fails.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        *,
        groups: Mapping[str, Sequence[int]],
        beat: Beat,
        timeout: float,
    ) -> None:
        self.logs, self.rank, self.world = folder, rank, world
        self.groups, self.beat, self._timeout = groups, beat, timeout
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._written = False
        self._began = time.time()
        self._thread: threading.Thread | None = None
        if world > 1:
            self.path.unlink(missing_ok=True)
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    @property
    def path(self) -> Path:
        """This rank's file."""
        return self.logs / "stuck" / f"rank_{self.rank}.json"

    def close(self) -> None:
        """End the watch."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def write(self, error: BaseException | None) -> None:
        """Write this rank's file, once.

        Args:
            error: of the collective that failed; None where this rank only stands still.
        """
        with self._lock:
            if self._written:
                return
            self._written = True
            known = {
                "rank": self.rank,
                "step": self.beat.step,
                "phase": self.beat.phase,
                "still_seconds": round(time.time() - self.beat.at, 3),
                "time": time.time(),
                "error": None if error is None else " ".join(str(error).split())[:500],
                "groups": {name: list(ranks) for name, ranks in self.groups.items()},
                **_last_collectives(),
                "stacks": _stacks(error),
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".partial")
            temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
            temporary.replace(self.path)

    def _run(self) -> None:
        """Look for other ranks' files while there is no progress."""
        while not self._end.wait(min(0.5, self._timeout / 8)):
            if time.time() - self.beat.at > self._timeout / 2 and self._somebody_wrote():
                self.write(None)
                return

    def _somebody_wrote(self) -> bool:
        try:
            files = list(self.path.parent.glob("rank_*.json"))
            return any(file.stat().st_mtime >= self._began for file in files)
        except OSError:  # one was replaced meanwhile
            return False


def report_stuck(watch: Watch, error: BaseException) -> str:
    """Write this rank's file, wait a moment for the others', and return one line for the user."""
    began = time.time()
    watch.write(error)
    deadline = began + _PATIENCE_SECONDS
    reports: dict[int, Mapping[str, Any]] = {}
    while time.time() < deadline:
        reports = _read_reports(watch)
        silent = [rank for rank in range(watch.world) if rank not in reports]
        beats = {rank: read_beat(watch.logs, rank) for rank in silent}
        if all(beat is not None and is_gone(beat) for beat in beats.values()):
            break
        time.sleep(0.05)
    finding = explain_stuck(watch, reports, error)
    failed = [rank for rank, report in reports.items() if report["error"] is not None]
    if watch.rank == min(failed, default=watch.rank):
        _write_report(watch.path.with_name("report.txt"), finding, reports)
    return f"{finding.text} (report: {watch.path.with_name('report.txt')})"


def explain_stuck(
    watch: Watch, reports: Mapping[int, Mapping[str, Any]], error: BaseException
) -> Finding:
    """Say who is missing, where, and since which step."""
    silent = [rank for rank in range(watch.world) if rank not in reports]
    why = " ".join(str(error).split())
    gone = [r for r in silent if (beat := read_beat(watch.logs, r)) is not None and is_gone(beat)]
    if gone:
        beat = read_beat(watch.logs, gone[0])
        assert beat is not None
        text = f"rank {gone[0]}: its process {beat.pid} ended in step {beat.step} ({beat.phase})"
        return Finding(tuple(gone), text)
    missing = find_missing(reports)
    if not missing.missing:
        if silent:
            beat = read_beat(watch.logs, silent[0])
            where = f"last seen in step {beat.step} ({beat.phase})" if beat else "never seen"
            return Finding(tuple(silent), f"rank {silent[0]}: does not answer, {where}: {why}")
        return Finding((), f"ranks wait for each other in step {watch.beat.step}: {why}")
    first = missing.missing[0]
    beat = read_beat(watch.logs, first)
    step = beat.step if beat else watch.beat.step
    return Finding(missing.missing, f"rank {first}: did not go on in step {step}; {missing.text}")


def find_missing(reports: Mapping[int, Mapping[str, Any]]) -> Finding:
    """Compare the last collectives of all ranks, group by group.

    A rank is missing where another member of a group has joined a later collective. Of several,
    those count that no other rank keeps waiting: which are behind everywhere.
    """
    behind: dict[int, tuple[str, str, int, list[int]]] = {}
    waiting: set[int] = set()
    groups = {
        (name, tuple(ranks)): None
        for report in reports.values()
        for name, ranks in report["groups"].items()
    }
    for name, ranks in groups:
        last = {r: reports[r]["last"].get(name) for r in ranks if r in reports}
        if any(entry is None and reports[r]["forgot"] for r, entry in last.items()):
            continue  # the recorder no longer holds what this rank did in the group
        number = {r: entry["number"] if entry else 0 for r, entry in last.items()}
        furthest = max(number.values(), default=0)
        ahead = sorted(r for r, n in number.items() if n == furthest)
        late = [r for r in number if number[r] < furthest]
        if not late:
            continue
        waiting.update(ahead)
        entry = last[ahead[0]]
        assert entry is not None
        for r in late:
            behind.setdefault(r, (name, entry["what"], furthest, ahead))
    missing = tuple(sorted(r for r in behind if r not in waiting)) or tuple(sorted(behind))
    if not missing:
        return Finding((), "every rank has joined the same collectives")
    name, what, furthest, ahead = behind[missing[0]]
    waits = f"rank {ahead[0]} waits" if len(ahead) == 1 else f"ranks {_list(ahead)} wait"
    text = f"{waits} for it at {what} (number {furthest} of group '{name}')"
    if len(missing) > 1:
        text += f"; ranks {_list(missing[1:])} are missing too"
    return Finding(missing, text)


def _read_reports(watch: Watch) -> dict[int, Mapping[str, Any]]:
    reports = {}
    for rank in range(watch.world):
        file = watch.path.with_name(f"rank_{rank}.json")
        try:
            if file.stat().st_mtime >= watch._began - 1:
                reports[rank] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return reports


def _write_report(path: Path, finding: Finding, reports: Mapping[int, Mapping[str, Any]]) -> None:
    """Write all that is known for a person to read."""
    lines = [finding.text, ""]
    for rank, report in sorted(reports.items()):
        lines += [
            f"rank {rank}: step {report['step']} ({report['phase']}), "
            f"no progress for {report['still_seconds']} s",
            f"  error: {report['error'] or 'none'}",
        ]
        lines += [
            f"  last in group '{name}': {entry['what']} number {entry['number']}"
            for name, entry in sorted(report["last"].items())
        ]
        lines += ["  " + line for line in report["stacks"]]
        lines.append("")
    temporary = path.with_suffix(".partial")
    temporary.write_text("\n".join(lines), encoding="utf-8")
    temporary.replace(path)


def _last_collectives() -> dict[str, Any]:
    """Return the last collective of each group that this rank has joined.

    `forgot` tells whether the recorder was too small for all that happened.
    """
    import torch

    # a private name: torch has no public way to read the recorder of a CPU backend
    dump: bytes = torch._C._distributed_c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
    entries = json.loads(dump).get("entries", [])
    last: dict[str, dict[str, Any]] = {}
    for entry in entries:
        _, name = entry["process_group"]
        number = int(entry["collective_seq_id"])
        if number >= last.get(name, {"number": 0})["number"]:
            kind = entry["profiling_name"].rpartition(":")[2]
            sizes = "x".join(str(n) for n in (entry["input_sizes"] or [[]])[0])
            last[name] = {"number": number, "what": f"{kind} of {sizes or 'one'} numbers"}
    return {"last": last, "forgot": bool(entries) and int(entries[0]["record_id"]) > 0}


def _stacks(error: BaseException | None) -> list[str]:
    """Return the Python stack of every thread that does something of ours, innermost call last.

    Args:
        error: that the calling thread has raised; its stack is shown instead of the thread's.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        stack: Sequence[traceback.FrameSummary] = traceback.extract_stack(frame)
        if ident == threading.get_ident():
            stack = traceback.extract_tb(error.__traceback__) if error else ()
        ours = [entry for entry in stack if not entry.filename.endswith(_MACHINERY)]
        ours = [entry for entry in ours if "/multiprocessing/" not in entry.filename]
        if ours and ours[-1].name != "_end_with_parent":
            lines.append(f"thread {names.get(ident, ident)} of process {os.getpid()}:")
            lines += [f"  {e.filename}:{e.lineno} {e.name}: {e.line}" for e in ours[-12:]]
    return lines


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
