"""The batch scripts of `templates/`, with the lines between their marks written for one job.

Everything below the marks is the same for a script that a user edits and one that is rendered
here; these functions only write settings.
"""

import fnmatch
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from gatewise.launch.submit_config import Container, Launcher, SubmitConfig

__all__ = ["ARGUMENTS_FILE", "PASSED", "Job", "passed_variables", "render", "template"]

ARGUMENTS_FILE = "arguments"  # in a point's folder `submit`: one argument a line
# What a job may need to know of the shell that it was submitted from; `submit.env` replaces it.
PASSED = (
    *("HOME", "LANG", "LC_*", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ"),
    *("USER", "CONDA_*", "CUDA_*", "GLOO_*", "HF_*", "MKL_*", "MODULE*", "LMOD_*", "NCCL_*"),
    *("OMP_*", "PYTHON*", "SSL_CERT_*", "TORCH_*", "VIRTUAL_ENV", "WANDB_*", "XDG_*"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
_BEGIN, _END = "# --- settings", "# --- end of settings"
_LINE_OF_TASK = '"$((SLURM_ARRAY_TASK_ID + 1))p"'


@dataclass(frozen=True, slots=True)
class Job:
    """What a script runs, beside the settings of `submit`."""

    name: str
    run_dir: Path  # of an array: of the sweep
    arguments: Sequence[str]  # of `gatewise train`, without run.dir; of an array: none
    ranks_per_node: int
    code: Path | None = None  # folder of the snapshot
    variables: Sequence[str] = ()  # names to pass on; empty: all
    points: Path | None = None  # of an array: file with a run folder a line
    num_points: int = 0


def template(launcher: Launcher) -> str:
    """Return the text of a launcher's script as it is shipped."""
    file = files("gatewise.launch") / "templates" / f"{launcher.name}.sh"
    return file.read_text(encoding="utf-8")


def render(job: Job, config: SubmitConfig) -> str:
    """Return the script of a job under torchrun or Slurm."""
    text = template(config.launcher)
    head, _, rest = text.partition(f"{_BEGIN}\n")
    _, _, body = rest.partition(f"{_END}\n")
    options = _sbatch_lines(job, config) if config.launcher is Launcher.slurm else []
    lines = [*options, *_settings(job, config)]
    return "\n".join([head + _BEGIN, *lines, _END, body])


def passed_variables(names: Sequence[str] | None, environ: Mapping[str, str]) -> list[str]:
    """Return the variables of the environment that a job gets.

    Args:
        names: names and patterns; None: `PASSED`; `all` among them: every one.
        environ: of the submitting process.
    """
    patterns = PASSED if names is None else names
    if "all" in patterns:
        return sorted(environ)
    return sorted(
        name for name in environ if any(fnmatch.fnmatchcase(name, one) for one in patterns)
    )


def _sbatch_lines(job: Job, config: SubmitConfig) -> list[str]:
    logs = job.run_dir / ("submit" if job.points else "logs")
    options: dict[str, object] = {
        "job-name": re.sub(r"[^\w.+-]+", "_", job.name),
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": job.ranks_per_node * (config.cores_per_rank or 1),
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time_limit,
        "mem": config.memory,
        "gpus-per-node": config.gpus_per_node,
        "signal": f"B:{config.signal.name}@{config.signal_lead}",
        "open-mode": "append",
        "output": f"{logs}/slurm-{'%A_%a' if job.points else '%j'}.log",
        "export": ",".join(job.variables) or "ALL",
    }
    if job.points:
        most = f"%{config.parallel}" if config.parallel else ""
        options["array"] = f"0-{job.num_points - 1}{most}"
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lines.append("--requeue" if config.max_requeues else "--no-requeue")
    return [f"#SBATCH {line}" for line in [*lines, *(config.sbatch or "").split()]]


def _settings(job: Job, config: SubmitConfig) -> list[str]:
    """Return the assignments; the templates have the same names."""
    srun, prefix = _container(job, config)
    python = config.python or (sys.executable if config.container is Container.none else "python")
    if job.points:
        run_dir = f"$(sed -n {_LINE_OF_TASK} {shlex.quote(str(job.points))})"
    else:
        run_dir = shlex.quote(str(job.run_dir))
    values = {
        "RUN_DIR": run_dir,
        "NODES": None if config.launcher is Launcher.slurm else str(config.nodes),
        "RANKS_PER_NODE": str(job.ranks_per_node),
        "RESTARTS": str(config.restarts),
        "MAX_REQUEUES": str(config.max_requeues),
        "SIGNAL": config.signal.name,
        "HEAD": shlex.quote(config.head) if config.head else "",
        "PORT": str(config.port),
        "PYTHON": shlex.quote(python),
        "CODE": shlex.quote(str(job.code)) if job.code else "",
        "SRUN_OPTIONS": f"({shlex.join(srun)})",
        "PREFIX": f"({shlex.join(prefix)})",
        "ARGUMENTS": f"({shlex.join(job.arguments)})",
    }
    if config.launcher is Launcher.slurm:
        values["PORT"] = None
    else:
        for name in ("MAX_REQUEUES", "SIGNAL", "SRUN_OPTIONS"):
            values[name] = None
    if job.points:
        values["ARGUMENTS"] = None
    lines = [f"{name}={value}" for name, value in values.items() if value is not None]
    if job.points:
        lines.append(f'mapfile -t ARGUMENTS < "$RUN_DIR/submit/{ARGUMENTS_FILE}"')
    if config.setup:
        lines.append(config.setup)
    return lines


def _container(job: Job, config: SubmitConfig) -> tuple[list[str], list[str]]:
    """Return srun's options, and the words before python, that put the ranks into an image."""
    if config.container is Container.none:
        return [], []
    assert config.image is not None
    mounts = [f"{job.run_dir}:{job.run_dir}", *filter(None, (config.mounts or "").split(","))]
    if job.code is not None and not job.code.is_relative_to(job.run_dir):
        mounts.append(f"{job.code}:{job.code}")
    if config.container is Container.pyxis:
        return [f"--container-image={config.image}", f"--container-mounts={','.join(mounts)}"], []
    nv = ["--nv"] if config.gpus_per_node else []
    return [], ["apptainer", "exec", *nv, "--bind", ",".join(mounts), config.image]
