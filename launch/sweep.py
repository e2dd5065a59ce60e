"""`gatewise submit -m`: every point a job of its own, and a summary at the end.

What has finished with the same settings is left out, the rest starts or goes on. Read `points.py`
first.
"""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatewise.conf.compose import config_from_yaml
from gatewise.launch.job_script import ARGUMENTS_FILE, Job, passed_variables, render
from gatewise.launch.jobs import (
    Request,
    note_job,
    noted_job,
    prepare,
    read_json,
    script_for,
)
from gatewise.launch.points import Combination, Point, check_point, expand, label, make_point
from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.script_runner import run_scripts
from gatewise.launch.session import EXIT_CRASH, EXIT_OK, EXIT_REQUEUE, run_session
from gatewise.launch.slurm import check_slurm, queue_script, queued_tasks, wait_for
from gatewise.launch.snapshot import take_snapshot
from gatewise.launch.submit_config import Launcher, SubmitConfig
from gatewise.parallel.errors import ConfigError

__all__ = ["run_sweep"]


def run_sweep(request: Request) -> int:
    """Run, queue or collect a sweep and return the exit code."""
    submit = request.submit
    if submit.launcher is Launcher.torchrun and submit.nodes > 1:
        raise ConfigError(
            f"submit.nodes is {submit.nodes}, but the points of a sweep run on one machine unless "
            "submit.launcher=slurm; leave it out"
        )
    grid = expand(request.overrides)
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
        lambda: _sweep(request, points, folder),
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
        print(_array_script(request, points, path, path / "submit" / "points", code), end="")
    else:
        print(script_for(submit, first.config, first.arguments, first.path, code=code), end="")


def _sweep(request: Request, points: Sequence[Point], folder: RunFolder) -> Mapping[str, Any]:
    from gatewise.launch.sweep_report import PointResult, write_summary

    submit = request.submit
    began = time.monotonic()
    code = None
    if submit.snapshot and not request.collect:
        code = take_snapshot(folder.path / "code")
    found = _states(points)
    todo = [point for point in points if found[point.path] not in ("finished", "queued")]
    done = sum(state == "finished" for state in found.values())
    print(f"gatewise submit: {len(points)} points -> {shlex.quote(str(folder.path))}")
    print(f"  {done} finished before, {len(points) - done - len(todo)} queued", flush=True)
    about: dict[str, Any] = {"group": points[0].config.wandb.group}
    if request.collect:
        pass
    elif submit.launcher is Launcher.slurm:
        about |= _queue(request, todo, folder, code)
    elif todo:
        _run_here(request, todo, code)
    states = _states(points)
    rows = [
        PointResult.read(point.values, point.path, states[point.path], steps=point.config.steps)
        for point in points
    ]
    about |= write_summary(rows, folder.path, name=folder.path.name)
    print("\n".join(about.pop("lines")))
    about["sweep_seconds"] = round(time.monotonic() - began, 3)
    return {**about, "exit": _exit_code(rows, request)}


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


def _states(points: Sequence[Point]) -> dict[Path, str]:
    """Return where each point stands: finished, queued, stopped, failed or waiting."""
    tasks = {point.path: noted_job(point.path) for point in points}
    jobs = {task.partition("_")[0] for task in tasks.values() if task is not None}
    queued = {task for job in sorted(jobs) for task in queued_tasks(job)}
    return {
        point.path: "queued" if tasks[point.path] in queued else _state(point) for point in points
    }


def _state(point: Point) -> str:
    result = read_json(point.path / "result.json")
    if not result:
        was_started = (point.path / "submit" / "exit").exists() or noted_job(point.path)
        return "failed" if was_started else "waiting"
    if result.get("exit") == EXIT_REQUEUE:
        return "stopped"
    if result.get("exit") != EXIT_OK:
        return "failed"
    return "finished" if _same_settings(point) else "waiting"


def _same_settings(point: Point) -> bool:
    """Tell whether a run's stored settings are the point's."""
    file = point.path / "config.yaml"
    try:
        stored = config_from_yaml(file.read_text(encoding="utf-8"), source=str(file))
    except (OSError, ConfigError):
        return False
    load = point.config.checkpoint.load  # the job writes down which step it found
    checkpoint = replace(stored.checkpoint, load=load)
    config = replace(point.config, run=replace(point.config.run, dir=stored.run.dir))
    return replace(stored, checkpoint=checkpoint) == config


def _run_here(request: Request, points: Sequence[Point], code: Path | None) -> None:
    """Run points on this machine; each prints into its own folder."""
    submit = request.submit
    scripts = []
    for point in points:
        script = prepare(
            submit, point.config, point.arguments, point.path, point.path / "submit", code=code
        )
        scripts.append(replace(script, output=point.path / "logs" / "submit.log"))
        (point.path / "submit" / "exit").unlink(missing_ok=True)

    def started(index: int) -> None:
        print(f"  [{index + 1}/{len(points)}] {label(points[index].values)}", flush=True)

    def ended(index: int, status: int) -> None:
        point = points[index]
        with writable(point.path):
            (point.path / "submit" / "exit").write_text(f"{status}\n")
        what = {EXIT_OK: "done", EXIT_REQUEUE: "stopped and saved"}.get(status)
        what = what or f"ended with {status}: see {point.path / 'logs' / 'submit.log'}"
        print(f"  [{index + 1}/{len(points)}] {what}", flush=True)

    run_scripts(scripts, at_once=submit.parallel or 1, started=started, ended=ended)


def _queue(
    request: Request, points: Sequence[Point], folder: RunFolder, code: Path | None
) -> dict[str, Any]:
    """Queue points as the tasks of one Slurm array; with `submit.wait` until all have ended."""
    if not points:
        return {}
    submit = request.submit
    own = folder.path / "submit"
    number = len(list(own.glob("points_*")))  # an earlier array may still be reading its own
    file = own / f"points_{number}"
    with writable(own):
        own.mkdir(exist_ok=True)
        file.write_text("".join(f"{point.path}\n" for point in points), encoding="utf-8")
        script = own / f"array_{number}.sh"
        text = _array_script(request, points, folder.path, file, code)
        script.write_text(text, encoding="utf-8")
        for point in points:
            prepare(
                submit, point.config, point.arguments, point.path, point.path / "submit", code=code
            )
            lines = "".join(f"{text}\n" for text in point.arguments)
            (point.path / "submit" / ARGUMENTS_FILE).write_text(lines, encoding="utf-8")
    job = queue_script(script)
    for task, point in enumerate(points):
        note_job(point.path, f"{job}_{task}")
    print(f"  Slurm job {job}, {len(points)} tasks; their output goes to {own}", flush=True)
    if submit.wait:
        wait_for(job)
    else:
        print("  the same command with --collect writes the summary")
    return {"job": job, "script": str(script)}


def _array_script(
    request: Request, points: Sequence[Point], folder: Path, file: Path, code: Path | None
) -> str:
    """Return the script of an array, whose tasks read their folder and arguments from files."""
    submit, first = request.submit, points[0]
    ranks = {point.config.parallel.ranks for point in points}
    if len(ranks) > 1:
        raise ConfigError(
            f"the points have {sorted(ranks)} ranks, but the tasks of a Slurm array are alike; "
            "sweep them one by one"
        )
    for point in points:
        for text in point.arguments:
            if "\n" in text:
                raise ConfigError(f"{text!r} has several lines, which a Slurm array cannot pass on")
    names = submit.passed_names
    job = Job(
        name=folder.name,
        run_dir=folder,
        arguments=(),
        ranks_per_node=first.config.parallel.ranks // submit.nodes,
        code=code,
        variables=() if names and "all" in names else passed_variables(names, os.environ),
        points=file,
        num_points=len(points),
    )
    return render(job, submit)
