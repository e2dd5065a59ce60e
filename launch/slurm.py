"""Slurm's programs: queue a script, ask where it stands. Nothing here knows what a job does."""

import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gatewise.parallel.errors import ConfigError

__all__ = ["check_slurm", "queue_script", "queued_tasks", "wait_for"]

_SECONDS = 120  # for a controller that is busy


def check_slurm() -> None:
    """Raise `ConfigError` where no job can be queued."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "submit.launcher is slurm but sbatch is not on PATH; submit from a login node of the "
            "cluster, look at the script with --dry-run, or set submit.launcher=torchrun"
        )


def queue_script(script: Path, *, cwd: Path | None = None) -> str:
    """Queue a batch script and return the number of the job.

    Raises:
        ConfigError: with what sbatch says, in one line, if it refuses.
    """
    done = _call(["sbatch", "--parsable", str(script)], cwd=cwd)
    if done.returncode:
        said = "; ".join(_said(done.stderr)) or f"exit code {done.returncode}"
        raise ConfigError(f"sbatch refused the job: {said}{_partitions(said)}")
    return done.stdout.strip().partition(";")[0]  # a cluster's name may follow


def queued_tasks(job: str) -> Mapping[str, str]:
    """Return the state of each task of a job that has not ended, by number ("17" or "17_3").

    Raises:
        ConfigError: if Slurm does not answer.
    """
    done = _call(["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={job}"])
    if done.returncode:
        said = "; ".join(_said(done.stderr))
        if "Invalid job id" in said:  # ended long ago
            return {}
        raise ConfigError(f"Slurm does not say whether job {job} still runs: {said}")
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())


def wait_for(job: str, *, seconds: float = 2.0) -> None:
    """Return when all tasks of a job have ended; ask every few seconds, later less often."""
    while queued_tasks(job):
        time.sleep(seconds)
        seconds = min(seconds * 1.2, 30.0)


def _call(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except FileNotFoundError:
        check_slurm()
        raise
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{command[0]} did not answer within {_SECONDS} s; see whether `sinfo` does"
        ) from None


def _said(text: str) -> list[str]:
    """Return the messages of one of Slurm's programs without its name."""
    lines = (re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines())
    return [line for line in lines if line]


def _partitions(said: str) -> str:
    """Name the partitions there are, where the message is about one."""
    if "partition" not in said.lower():
        return ""
    found = _call(["sinfo", "--noheader", "--format=%R"])
    names = ", ".join(sorted(set(found.stdout.split())))
    return f"; submit.partition can be {names}" if found.returncode == 0 and names else ""
