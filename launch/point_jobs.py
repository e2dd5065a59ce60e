"""The jobs of a sweep's points: where each stands, and how they are started here or by Slurm."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatewise.conf.compose import config_from_yaml
from gatewise.launch.job_script import ARGUMENTS_FILE, Job, passed_variables, render
from gatewise.launch.jobs import Request, note_job, noted_job, prepare, read_json
from gatewise.launch.points import Point, label
from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.script_runner import run_scripts
from gatewise.launch.session import EXIT_OK, EXIT_REQUEUE
from gatewise.launch.slurm import queue_script, queued_tasks, wait_for
from gatewise.parallel.errors import ConfigError

__all__ = ["array_script", "point_states", "queue_points", "run_points"]


def point_states(points: Sequence[Point]) -> dict[Path, str]:
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


def run_points(
    request: Request, points: Sequence[Point], code: Path | None, *, before: int, total: int
) -> bool:
    """Run points on this machine; each prints into its own folder.

    Args:
        request: the command line.
        points: to run.
        code: folder of the snapshot.
        before: number of points that this command has run.
        total: number that it is going to run.

    Returns:
        False if a stop signal ended them or left some unstarted.
    """
    submit = request.submit
    scripts = []
    for point in points:
        script = prepare(
            submit, point.config, point.arguments, point.path, point.path / "submit", code=code
        )
        scripts.append(replace(script, output=point.path / "logs" / "submit.log"))
        (point.path / "submit" / "exit").unlink(missing_ok=True)

    def started(index: int) -> None:
        print(f"  [{before + index + 1}/{total}] {label(points[index].values)}", flush=True)

    def ended(index: int, status: int) -> None:
        point = points[index]
        with writable(point.path):
            (point.path / "submit" / "exit").write_text(f"{status}\n")
        what = {EXIT_OK: "done", EXIT_REQUEUE: "stopped and saved"}.get(status)
        what = what or f"ended with {status}: see {point.path / 'logs' / 'submit.log'}"
        print(f"  [{before + index + 1}/{total}] {what}", flush=True)

    codes = run_scripts(scripts, at_once=submit.parallel or 1, started=started, ended=ended)
    return all(code is not None and code < EXIT_REQUEUE for code in codes)


def queue_points(
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
        text = array_script(request, points, folder.path, file, code)
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


def array_script(
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
