"""`gatewise submit -m`: every point a job of its own, and a summary at the end.

What has finished with the same settings is left out, the rest starts or goes on. The points are a
grid, or with `submit.trials` Optuna's choice. Read `points.py` first.
"""

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewise.launch.jobs import Request, read_json, script_for
from gatewise.launch.point_jobs import array_script, point_states, queue_points, run_points
from gatewise.launch.points import Combination, Point, check_point, expand, label, make_point
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.search import Search, Trial, check_optuna
from gatewise.launch.session import EXIT_CRASH, EXIT_OK, EXIT_REQUEUE, run_session
from gatewise.launch.slurm import check_slurm
from gatewise.launch.snapshot import take_snapshot
from gatewise.launch.submit_config import Launcher, SubmitConfig
from gatewise.parallel.errors import ConfigError

__all__ = ["run_sweep"]

_LEFT_ALONE = ("finished", "queued")


def run_sweep(request: Request) -> int:
    """Run, queue or collect a sweep and return the exit code."""
    submit = request.submit
    if submit.launcher is Launcher.torchrun and submit.nodes > 1:
        raise ConfigError(
            f"submit.nodes is {submit.nodes}, but the points of a sweep run on one machine unless "
            "submit.launcher=slurm; leave it out"
        )
    search = None
    if submit.trials is not None:
        check_optuna()
        search = Search(request.overrides, draw=submit.draw)
    grid = expand(request.overrides) if search is None else search.ends()
    base = check_point(submit, *grid[0])[0]  # with the folder and the name that all share
    if request.dry_run:
        path = Path(base.run.dir or f"runs/{base.name}_sweep/TIME").expanduser().absolute()
        _show(request, _make_points(submit, grid, path), path)
        return EXIT_OK
    if submit.launcher is Launcher.slurm and not request.collect:
        check_slurm()
    folder = RunFolder.choose(base.run.dir, f"{base.name}_sweep")
    try:
        points = _make_points(submit, grid, folder.path)
    except ConfigError:
        folder.release()
        raise
    return run_session(
        "submit",
        folder,
        lambda: _sweep(request, points, folder, search),
        world_size=base.parallel.ranks,
        interrupt_exit=EXIT_REQUEUE,
    )


def _make_points(submit: SubmitConfig, grid: Sequence[Combination], folder: Path) -> list[Point]:
    """Compose and check every point before any of them starts."""
    return [make_point(submit, values, overrides, folder) for values, overrides in grid]


def _show(request: Request, points: Sequence[Point], path: Path) -> None:
    """Print the points, and the script of the array or of the first."""
    submit, first = request.submit, points[0]
    for point in points:
        print(f"# {label(point.values)} -> {point.path}")
    code = path / "code" / "HASH" if submit.snapshot else None
    if submit.launcher is Launcher.slurm:
        print(array_script(request, points, path, path / "submit" / "points", code), end="")
    else:
        print(script_for(submit, first.config, first.arguments, first.path, code=code), end="")


def _sweep(
    request: Request, points: Sequence[Point], folder: RunFolder, search: Search | None
) -> Mapping[str, Any]:
    from gatewise.launch.sweep_report import PointResult, write_summary

    submit = request.submit
    began = time.monotonic()
    code = None
    if submit.snapshot and not request.collect:
        code = take_snapshot(folder.path / "code")
    about: dict[str, Any] = {"group": points[0].config.wandb.group}
    if search is None:
        about |= _run_grid(request, points, folder, code)
    else:
        points = _run_search(request, search, folder, code)
        about["trials"] = submit.trials
    states = point_states(points)
    rows = [
        PointResult.read(point.values, point.path, states[point.path], steps=point.config.steps)
        for point in points
    ]
    about |= write_summary(rows, folder.path, name=folder.path.name)
    print("\n".join(about.pop("lines")))
    about["sweep_seconds"] = round(time.monotonic() - began, 3)
    return {**about, "exit": _exit_code(rows, request)}


def _run_grid(
    request: Request, points: Sequence[Point], folder: RunFolder, code: Path | None
) -> dict[str, Any]:
    """Run or queue the points that have not finished; return what is to be told of the job."""
    found = point_states(points)
    todo = [point for point in points if found[point.path] not in _LEFT_ALONE]
    done = sum(state == "finished" for state in found.values())
    print(f"gatewise submit: {len(points)} points -> {shlex.quote(str(folder.path))}")
    print(f"  {done} finished before, {len(points) - done - len(todo)} queued", flush=True)
    if request.collect:
        return {}
    if request.submit.launcher is Launcher.slurm:
        return queue_points(request, todo, folder, code)
    if todo:
        run_points(request, todo, code, before=0, total=len(todo))
    return {}


def _run_search(
    request: Request, search: Search, folder: RunFolder, code: Path | None
) -> list[Point]:
    """Run the points that Optuna chooses, `submit.parallel` at a time; return all there are."""
    submit = request.submit
    most = submit.trials
    assert most is not None
    search.open(folder.path / "study.log")
    points: dict[str, Point] = {}  # by what is written of them: one may be chosen twice

    def place(trial: Trial) -> Point:
        values, overrides = trial.combination
        if label(values) not in points:
            points[label(values)] = make_point(submit, values, overrides, folder.path)
        return points[label(values)]

    known = search.trials()
    for trial in known:
        place(trial)
    done = sum(trial.is_told for trial in known)
    print(f"gatewise submit: {most} points by Optuna -> {shlex.quote(str(folder.path))}")
    print(f"  {done} finished before", flush=True)
    tried: set[int] = set()
    while not request.collect:
        batch = search.ask(submit.parallel or 1, most=most, without=tried)
        chosen = {place(trial).path: place(trial) for trial in batch}
        states = point_states(list(chosen.values()))
        todo = [point for path, point in chosen.items() if states[path] not in _LEFT_ALONE]
        was_stopped = False
        if todo and submit.launcher is Launcher.slurm:
            queue_points(request, todo, folder, code)
        elif todo:
            was_stopped = not run_points(
                request, todo, code, before=len(tried), total=max(most - done, len(batch))
            )
        tried |= {trial.number for trial in batch}
        states = point_states(list(chosen.values()))
        for trial in batch:
            path = place(trial).path
            loss = read_json(path / "result.json").get("val_loss")
            if states[path] == "finished" and isinstance(loss, int | float):
                search.tell(trial, loss)
        if was_stopped or not batch or set(states.values()) & {"stopped", "queued"}:
            break
    return list(points.values())


def _exit_code(rows: Sequence[Any], request: Request) -> int:
    """Return 0 if all is done or queued, 1 if a point failed, 85 if the sweep was stopped."""
    states = {row.state for row in rows}
    if request.submit.launcher is Launcher.slurm and not request.submit.wait:
        return EXIT_OK  # the jobs have just been queued
    if "failed" in states:
        return EXIT_CRASH
    if states & {"stopped", "waiting"} and not request.collect:
        return EXIT_REQUEUE
    return EXIT_OK
