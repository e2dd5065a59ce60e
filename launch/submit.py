"""`gatewise submit`: start a training run, or every point of a sweep, through torchrun or Slurm.

The settings are checked here, before anything starts; a batch script of `templates/` does the rest.
`sweep.py` has the points of `-m`.
"""

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewise.conf.compose import group_choices, load_settings
from gatewise.conf.fields import field_table
from gatewise.conf.schemas import GROUPS
from gatewise.launch.jobs import (
    Request,
    check_free,
    layout,
    note_job,
    prepare,
    read_json,
    script_for,
)
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.script_runner import run_scripts
from gatewise.launch.session import EXIT_CONFIG, EXIT_CRASH, EXIT_OK, EXIT_REQUEUE, run_session
from gatewise.launch.slurm import check_slurm, queue_script, wait_for
from gatewise.launch.snapshot import take_snapshot
from gatewise.launch.submit_config import Launcher, SubmitConfig, SubmitSettings
from gatewise.launch.sweep import run_sweep
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import TrainConfig

__all__ = ["parse", "run", "usage"]

_SUMMARY = """Train through torchrun or Slurm. Takes the fields of `gatewise train` and those below.
The batch script, a copy of the code and the settings are kept in run.dir; the same command again
goes on where the run stopped.
  --dry-run        print the script and the settings' mistakes, and write nothing
  -m, --multirun   values with commas or choice(...), range(...) are swept: each point is a job of
                   its own, run.dir holds them and the summary; finished points are left out
  --collect        with -m: write the summary of what has been run, and start nothing"""
_FLAGS = {"--dry-run": "dry_run", "-m": "multirun", "--multirun": "multirun"}
_FLAGS |= {"--collect": "collect"}


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    settings = [text for text in arguments if text.startswith("submit.")]
    table = field_table(load_settings(SubmitSettings, settings)) | {
        "run.dir": field_table(TrainConfig())["run.dir"]
    }
    groups = {name: group_choices(name) for name in GROUPS}
    return usage_text("submit [--dry-run] [-m]", _SUMMARY, table, groups=groups)


def parse(arguments: Sequence[str]) -> Request:
    """Take the command line apart and check the fields of `submit`.

    Raises:
        ConfigError: for an unknown option, or a field of `submit` that does not take its value.
    """
    flags = {_FLAGS[text]: True for text in arguments if text in _FLAGS}
    rest = [text for text in arguments if text not in _FLAGS]
    own = [text for text in rest if text.lstrip("+").startswith("submit.")]
    overrides = [text for text in rest if text not in own]
    if flags.get("collect") and not flags.get("multirun"):
        raise ConfigError("--collect writes the summary of a sweep; give -m and its settings too")
    request = Request(load_settings(SubmitSettings, own).submit, overrides, **flags)
    for name in ("parallel", "trials"):
        value = getattr(request.submit, name)
        if value is not None and not request.multirun:
            raise ConfigError(f"submit.{name} is {value}, but one run has no points; add -m")
    return request


def run(arguments: Sequence[str]) -> int:
    """Submit as the command line says and return the exit code."""
    request = parse(arguments)
    if request.multirun:
        return run_sweep(request)
    config, overrides = layout(request.submit, request.overrides)
    if request.dry_run:
        path = Path(config.run.dir or f"runs/{config.name}/TIME").expanduser().absolute()
        code = path / "code" / "HASH" if request.submit.snapshot else None
        print(script_for(request.submit, config, overrides, path, code=code), end="")
        return EXIT_OK
    if request.submit.launcher is Launcher.slurm:
        check_slurm()
    path, own = _choose_folders(request.submit, config)
    return run_session(
        "submit",
        own,
        lambda: _submit(request.submit, config, overrides, path, own),
        world_size=config.parallel.ranks,
        interrupt_exit=EXIT_REQUEUE,
    )


def _choose_folders(submit: SubmitConfig, config: TrainConfig) -> tuple[Path, RunFolder]:
    """Return the run's folder, which the job is to take, and the folder of this command in it."""
    if submit.launcher is Launcher.torchrun and submit.nodes > 1:
        if config.run.dir is None:
            raise ConfigError(
                f"submit.nodes is {submit.nodes} but run.dir is not set; give one that all nodes "
                "see, the same on each"
            )
        path = Path(config.run.dir).expanduser().absolute()  # another node may be using it already
        return path, RunFolder.choose(str(path / "submit" / platform.node()), "submit")
    folder = RunFolder.choose(config.run.dir, config.name)
    try:
        check_free(folder.path)
        return folder.path, RunFolder.choose(str(folder.path / "submit"), "submit")
    finally:
        folder.release()


def _submit(
    submit: SubmitConfig,
    config: TrainConfig,
    arguments: Sequence[str],
    path: Path,
    own: RunFolder,
) -> Mapping[str, Any]:
    code = take_snapshot(path / "code") if submit.snapshot else None
    script = prepare(submit, config, arguments, path, own.path, code=code)
    own.write_environment(["submit", *sys.argv[2:]])
    print(f"gatewise submit: {config.name} -> {shlex.quote(str(path))}", flush=True)
    about = {"script": str(own.path / "job.sh"), "run_dir": str(path), "code": code}
    if submit.launcher is not Launcher.slurm:
        (code_,) = run_scripts([script])
        ended = EXIT_CRASH if code_ is None else code_
        told = read_json(path / "result.json")
        if ended in (EXIT_CRASH, EXIT_CONFIG) and told.get("exit") != ended:
            about["error"] = f"the job ended with {ended}; see above and {path / 'logs'}"
        return {**about, "exit": ended, "run": told}
    job = queue_script(own.path / "job.sh")
    note_job(path, job)
    print(f"  Slurm job {job}; its output goes to {path / 'logs' / f'slurm-{job}.log'}")
    if not submit.wait:
        return {**about, "job": job}
    wait_for(job)
    told = read_json(path / "result.json")
    ended = int(told.get("exit", EXIT_CRASH))
    if not told:
        about["error"] = f"job {job} left no result; see {path / 'logs'}"
    return {**about, "job": job, "exit": ended, "run": told}
