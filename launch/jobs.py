"""One job of `gatewise submit`: its settings, its script, and what lies in `run.dir/submit`."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gatewise.conf.compose import config_to_yaml, load_train_config
from gatewise.launch.job_script import Job, passed_variables, render
from gatewise.launch.run_folder import writable
from gatewise.launch.script_runner import Script
from gatewise.launch.slurm import queued_tasks
from gatewise.launch.submit_config import Launcher, SubmitConfig
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig

__all__ = [
    "Request",
    "check_free",
    "layout",
    "note_job",
    "noted_job",
    "prepare",
    "read_json",
    "script_for",
]

_JOB_FILE = "job.json"  # in a run's folder `submit`: the Slurm job that works there


@dataclass(frozen=True, slots=True)
class Request:
    """A command line, taken apart."""

    submit: SubmitConfig
    overrides: Sequence[str]  # of `gatewise train`
    dry_run: bool = False
    multirun: bool = False
    collect: bool = False


def layout(submit: SubmitConfig, overrides: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Compose a run's settings for the ranks that will be started, and check all of them.

    Returns:
        The settings, and the arguments that lead to them; run.dir is left to the script.

    Raises:
        ConfigError: for every mistake that the job itself would find before it starts to train.
    """
    names = [text.lstrip("+").partition("=")[0] for text in overrides]
    told = list(overrides)
    wanted = None if submit.ranks_per_node is None else submit.nodes * submit.ranks_per_node
    if wanted is not None and "parallel.ranks" not in names:
        told.append(f"parallel.ranks={wanted}")
    config = load_train_config(told)
    ranks = config.parallel.ranks
    if wanted not in (None, ranks):
        raise ConfigError(
            f"parallel.ranks is {ranks}, but submit.nodes x submit.ranks_per_node is "
            f"{submit.nodes} x {submit.ranks_per_node}; leave one of them out"
        )
    if ranks % submit.nodes:
        raise ConfigError(
            f"parallel.ranks is {ranks}, which submit.nodes ({submit.nodes}) does not divide; "
            "every node starts equally many ranks"
        )
    if wanted is None and "parallel.ranks" not in names:
        told.append(f"parallel.ranks={ranks}")
    if "parallel.node" not in names and submit.launcher is not Launcher.local:
        node = ranks // submit.nodes
        told.append(f"parallel.node={node}")
        try:
            config = replace(config, parallel=replace(config.parallel, node=node))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return config, [text for text in told if not text.lstrip("+").startswith("run.dir=")]


def script_for(
    submit: SubmitConfig,
    config: TrainConfig,
    arguments: Sequence[str],
    path: Path,
    *,
    code: Path | None,
) -> str:
    """Return the text of the script that runs `gatewise train` in the folder `path`."""
    if submit.launcher is Launcher.local:
        return shlex.join(_local_command(submit, arguments, path)) + "\n"
    names = submit.passed_names
    job = Job(
        name=config.name,
        run_dir=path,
        arguments=arguments,
        ranks_per_node=config.parallel.ranks // submit.nodes,
        code=code,
        variables=() if names and "all" in names else passed_variables(names, os.environ),
    )
    return render(job, submit)


def prepare(
    submit: SubmitConfig,
    config: TrainConfig,
    arguments: Sequence[str],
    path: Path,
    folder: Path,
    *,
    code: Path | None,
) -> Script:
    """Write what a job needs into a folder and return the process that runs it here.

    Args:
        submit: who starts the ranks.
        config: of the run.
        arguments: of `gatewise train`, without run.dir.
        path: of the run.
        folder: for the script and the settings, below `path`.
        code: folder of the snapshot.
    """
    with writable(path):
        folder.mkdir(parents=True, exist_ok=True)
        (path / "logs").mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(
            config_to_yaml(replace(config, run=replace(config.run, dir=str(path)))),
            encoding="utf-8",
        )
        script = folder / "job.sh"
        script.write_text(script_for(submit, config, arguments, path, code=code), encoding="utf-8")
    names = passed_variables(submit.passed_names, os.environ)
    environment = {name: os.environ[name] for name in names}
    if submit.launcher is not Launcher.local:
        return Script(["bash", str(script)], environment)
    if code is not None:
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(code) + (f":{known}" if known else "")
    return Script(_local_command(submit, arguments, path), {**environment, "PYTHONSAFEPATH": "1"})


def check_free(path: Path) -> None:
    """Raise `ConfigError` if a Slurm job that has not ended is to write into `path`."""
    task = noted_job(path)
    state = None if task is None else queued_tasks(task).get(task)
    if state is not None:
        raise ConfigError(
            f"run.dir is {path}, where Slurm job {task} ({state}) works; wait for it, `scancel "
            f"{task}` or choose another folder"
        )


def note_job(path: Path, job: str) -> None:
    """Remember which Slurm job works in a run's folder."""
    with writable(path):
        text = json.dumps({"job": job}) + "\n"
        (path / "submit" / _JOB_FILE).write_text(text, encoding="utf-8")


def noted_job(path: Path) -> str | None:
    """Return the Slurm job that was last queued for a run's folder; None where there is none."""
    task = read_json(path / "submit" / _JOB_FILE).get("job")
    return None if task is None or shutil.which("squeue") is None else str(task)


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where there is none, or half of one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _local_command(submit: SubmitConfig, arguments: Sequence[str], path: Path) -> list[str]:
    python = submit.python or sys.executable
    return [python, "-m", "gatewise.launch.train", *arguments, f"run.dir={path}"]
