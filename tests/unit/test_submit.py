"""`gatewise submit`: checks before anything starts, the scripts, and what they tell each other."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gatewise.launch import outcome, run_folder
from gatewise.launch.cli import main
from gatewise.launch.job_script import PASSED, passed_variables, template
from gatewise.launch.jobs import layout
from gatewise.launch.outcome import answer_script
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.script_runner import Script, run_scripts
from gatewise.launch.snapshot import take_snapshot
from gatewise.launch.submit import parse
from gatewise.launch.submit_config import Launcher, SubmitConfig
from gatewise.launch.world import Place
from gatewise.parallel.errors import ConfigError

TINY = ["experiment=tiny", "parallel.ranks=4"]
SLURM = ["submit.launcher=slurm", "submit.nodes=2"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["submit.nodes=0"], "submit.nodes is 0; it must be at least 1"),
        (["submit.launcher=slrum"], "did you mean 'slurm'"),
        (["submit.partitions=x"], "did you mean 'submit.partition'"),
        (["submit.partition=gpu"], "submit.partition is gpu, which only Slurm knows"),
        (["submit.wait=true"], "submit.wait is True, which only Slurm knows"),
        ([*SLURM, "submit.time_limit=soon"], "submit.time_limit is 'soon'"),
        ([*SLURM, "submit.time_limit=2"], "submit.time_limit is 2 (120 s), not more than"),
        ([*SLURM, "submit.memory=lots"], "submit.memory is 'lots'"),
        ([*SLURM, "submit.sbatch=exclusive"], "its words are options of sbatch"),
        ([*SLURM, "submit.container=pyxis"], "submit.image is None; set both"),
        (["submit.container=pyxis", "submit.image=x"], "pyxis needs submit.launcher=slurm"),
        (["submit.env=TOKEN=secret"], "names of variables without values"),
        (["submit.nodes=2"], "submit.head is not set"),
        (["submit.nodes=2", "submit.head=a"], "run.dir is not set; give one that all nodes"),
        (["-m", "seed=1,2", "submit.nodes=2", "submit.head=a"], "points of a sweep run on one"),
        (["submit.launcher=local", "submit.nodes=2"], "submit.launcher=local starts the ranks"),
        (["submit.parallel=2"], "one run has no points; add -m"),
        (["submit.ranks_per_node=3"], "parallel.ranks is 4, but submit.nodes x"),
        (["submit.nodes=3", "submit.head=a"], "submit.nodes (3) does not divide"),
        (["model.layer=3"], "did you mean 'model.layers'"),
        (["--dryrun"], "unknown option '--dryrun'"),
        (["--collect"], "--collect writes the summary of a sweep"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    overrides: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *TINY, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gatewise: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("12:00:00", 43200), ("2-00", 172800), ("1-2:3:4", 93784)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(text: str, seconds: int) -> None:
    assert SubmitConfig(launcher=Launcher.slurm, time_limit=text).limit_seconds == seconds


def test_ranks_follow_from_nodes_and_back() -> None:
    config, arguments = layout(SubmitConfig(nodes=2, ranks_per_node=4, head="a"), TINY[:1])
    assert (config.parallel.ranks, config.parallel.node) == (8, 4)
    assert arguments == [*TINY[:1], "parallel.ranks=8", "parallel.node=4"]
    config, arguments = layout(SubmitConfig(nodes=2, head="a"), [*TINY, "run.dir=x"])
    assert (config.parallel.ranks, config.parallel.node) == (4, 2)
    assert arguments == [*TINY, "parallel.node=2"]


def dry_run(*overrides: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["submit", "--dry-run", *TINY, *overrides]) == 0
    return capsys.readouterr().out


def settings(text: str) -> list[str]:
    found = re.search(r"^# --- settings\n(.*)^# --- end of settings\n", text, re.M | re.S)
    assert found is not None
    return found[1].splitlines()


def test_the_slurm_script_has_the_settings_and_the_shipped_body(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/h", "WANDB_API_KEY": "secret", "OTHER": "x"})
    text = dry_run(
        *SLURM,
        *("submit.partition=gpu", "submit.account=a", "submit.time_limit=1:00:00"),
        *("submit.gpus_per_node=2", "submit.memory=64G", "submit.cores_per_rank=3"),
        *("submit.sbatch=--exclusive --constraint=a", "submit.setup=module load cuda"),
        *("submit.container=pyxis", "submit.image=i.sqsh", "submit.mounts=/data:/data"),
        *("name=my run", f"run.dir={tmp_path}", "optim.lr=1e-3"),
        capsys=capsys,
    )
    assert settings(text) == [
        "#SBATCH --job-name=my_run",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=a",
        "#SBATCH --time=1:00:00",
        "#SBATCH --mem=64G",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --signal=B:USR2@120",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={tmp_path}/logs/slurm-%j.log",
        "#SBATCH --export=HOME,WANDB_API_KEY",
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        "#SBATCH --constraint=a",
        f"RUN_DIR={tmp_path}",
        "RANKS_PER_NODE=2",
        "RESTARTS=0",
        "MAX_REQUEUES=100",
        "SIGNAL=USR2",
        "HEAD=",
        "PYTHON=python",
        f"CODE={tmp_path}/code/HASH",
        "SRUN_OPTIONS=(--container-image=i.sqsh --container-mounts="
        f"{tmp_path}:{tmp_path},/data:/data)",
        "PREFIX=()",
        "ARGUMENTS=(experiment=tiny parallel.ranks=4 'name=my run' optim.lr=1e-3 parallel.node=2)",
        "module load cuda",
    ]
    assert "secret" not in text
    mark = "# --- end of settings\n"
    assert text.partition(mark)[2] == template(Launcher.slurm).partition(mark)[2]


def test_the_torchrun_script_has_the_settings_and_the_shipped_body(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = dry_run(
        *("submit.nodes=2", "submit.head=node0", "submit.restarts=3", "submit.snapshot=false"),
        *("submit.container=apptainer", "submit.image=i.sif", f"run.dir={tmp_path}"),
        capsys=capsys,
    )
    assert settings(text) == [
        f"RUN_DIR={tmp_path}",
        "NODES=2",
        "RANKS_PER_NODE=2",
        "RESTARTS=3",
        "HEAD=node0",
        "PORT=29400",
        "PYTHON=python",
        "CODE=",
        f"PREFIX=(apptainer exec --bind {tmp_path}:{tmp_path} i.sif)",
        "ARGUMENTS=(experiment=tiny parallel.ranks=4 parallel.node=2)",
    ]
    mark = "# --- end of settings\n"
    assert text.partition(mark)[2] == template(Launcher.torchrun).partition(mark)[2]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text


@pytest.mark.parametrize("launcher", [Launcher.slurm, Launcher.torchrun])
def test_a_shipped_script_sets_what_a_rendered_one_sets(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    def names(lines: list[str]) -> set[str]:
        return {found[1] for line in lines if (found := re.match(r"(#SBATCH --[\w-]+|\w+)=", line))}

    text = dry_run(f"submit.launcher={launcher.name}", capsys=capsys)
    shipped, rendered = (names(settings(one)) for one in (template(launcher), text))
    assert rendered - shipped <= {"#SBATCH --export"}
    assert shipped - rendered <= {"#SBATCH --time"}
    for name in shipped:  # nothing is set that the script does not use
        assert name.startswith("#") or len(re.findall(rf"\b{name}\b", text)) > 1
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_listed_variables_are_passed_on() -> None:
    environ = {"HOME": "", "PATH": "", "NCCL_DEBUG": "", "SECRET": "", "MY_A": "", "MY_B": ""}
    assert passed_variables(None, environ) == ["HOME", "NCCL_DEBUG", "PATH"]
    assert passed_variables(["MY_*", "HOME"], environ) == ["HOME", "MY_A", "MY_B"]
    assert passed_variables(["all"], environ) == sorted(environ)
    assert "WANDB_*" in PASSED


def test_a_snapshot_is_imported_instead_of_the_installed_program(tmp_path: Path) -> None:
    code = take_snapshot(tmp_path / "code")
    assert take_snapshot(tmp_path / "code") == code
    assert [path.name for path in (tmp_path / "code").iterdir()] == [code.name]
    module = code / "gatewise" / "launch" / "world.py"
    module.write_text(module.read_text() + "\nWHERE = __file__\n")
    assert (code / "gatewise" / "conf" / "train.yaml").exists()
    assert (code / "gatewise" / "launch" / "templates" / "slurm.sh").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import gatewise.launch.world as w; print(w.WHERE)"],
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(module), done.stderr


def put_program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of programs that comes first on PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_without_sbatch_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert main(["submit", *TINY, *SLURM, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "submit.launcher is slurm but sbatch is not on PATH" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_sbatch_refuses_is_passed_on_in_one_line(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_program(
        programs,
        "sbatch",
        "echo 'sbatch: error: invalid partition specified: gup' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid partition name' >&2\nexit 1",
    )
    put_program(programs, "sinfo", "echo main; echo urgent; echo main")
    arguments = [*SLURM, "submit.partition=gup", f"run.dir={tmp_path / 'run'}"]
    assert main(["submit", *TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "gatewise: error: sbatch refused the job: invalid partition specified: gup; Batch job "
        "submission failed: Invalid partition name; submit.partition can be main, urgent\n"
    )
    result = tmp_path / "run" / "submit" / "result.json"
    assert captured.out.splitlines()[-1] == str(result)
    assert json.loads(result.read_text())["exit"] == 2


def test_a_queued_job_is_noted_and_its_folder_is_taken(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_program(programs, "sbatch", "echo '17;cluster'")
    put_program(programs, "squeue", "echo '17 PENDING'")
    arguments = ["submit", *TINY, *SLURM, f"run.dir={tmp_path / 'run'}"]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "run" / "submit" / "result.json").read_text())
    assert result["job"] == "17"
    assert (tmp_path / "run" / "submit" / "config.yaml").exists()
    capsys.readouterr()
    assert main(arguments) == 2
    assert "where Slurm job 17 (PENDING) works" in capsys.readouterr().err
    put_program(programs, "squeue", "echo 'slurm_load_jobs error: Invalid job id' >&2; exit 1")
    assert main(arguments) == 0


def test_a_folder_in_use_names_process_machine_and_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    held = RunFolder.choose(str(tmp_path), "x")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert main(["submit", *TINY, f"run.dir={tmp_path}"]) == 2
    expected = rf"process {os.getpid()} on \S+ \(Slurm job 41\) is using"
    assert re.search(expected, capsys.readouterr().err)
    held.release()
    RunFolder.choose(str(tmp_path), "x").release()


def test_a_start_waits_for_processes_of_its_own_job_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    held = RunFolder.choose(str(tmp_path), "x")
    timer = threading.Timer(0.3, held.release)
    timer.start()
    RunFolder.choose(str(tmp_path), "x").release()
    timer.join()
    held = RunFolder.choose(str(tmp_path), "x")
    monkeypatch.setattr(run_folder, "_PATIENCE_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="Slurm job 41"):
        RunFolder.choose(str(tmp_path), "x")
    held.release()


def test_each_launched_start_has_logs_of_its_own(tmp_path: Path) -> None:
    for number in range(3):
        folder = RunFolder.choose(str(tmp_path), "x", is_launched=True)
        assert folder.logs == tmp_path / "logs" / f"attempt_{number}"
        assert folder.logs.is_dir()
        folder.release()
    folder = RunFolder.choose(str(tmp_path), "x")
    assert folder.logs == tmp_path / "logs"
    folder.release()


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(outcome, "_end_with_launcher", lambda _: None)
    monkeypatch.setenv("GATEWISE_OUTCOME", str(tmp_path / "outcome"))
    return tmp_path / "outcome"


@pytest.mark.parametrize(("code", "left"), [(0, "0\n"), (2, "2\n"), (85, "85\n"), (1, None)])
def test_rank_0_leaves_the_code_that_counts(code: int, left: str | None, answer: Path) -> None:
    assert answer_script(lambda: code, Place(rank=1, world_size=2)) == (1 if code == 1 else 0)
    assert not answer.exists()
    assert answer_script(lambda: code, Place(rank=0, world_size=2)) == (1 if code == 1 else 0)
    assert (answer.read_text() if answer.exists() else None) == left


def test_a_mistake_of_the_user_is_left_as_2(answer: Path) -> None:
    def mistake() -> int:
        raise ConfigError("x")

    with pytest.raises(ConfigError):
        answer_script(mistake, Place(rank=0, world_size=2))
    assert answer.read_text() == "2\n"


def test_without_a_script_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWISE_OUTCOME", raising=False)
    assert answer_script(lambda: 85, Place(rank=0, world_size=2)) == 85


def shell(text: str, output: Path | None = None) -> Script:
    return Script(["bash", "-c", text], {"PATH": os.environ["PATH"]}, output)


def test_scripts_run_as_many_at_once_as_asked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"echo begin >> {log}; sleep 0.3; echo end >> {log}; exit 3"
    assert run_scripts([shell(script)] * 3) == [3, 3, 3]
    assert log.read_text().split() == ["begin", "end"] * 3
    log.unlink()
    assert run_scripts([shell(script, tmp_path / "out")] * 2, at_once=2) == [3, 3]
    assert log.read_text().split()[:2] == ["begin", "begin"]


def test_a_stop_ends_the_running_script_and_starts_no_other(tmp_path: Path) -> None:
    script = f"trap 'exit 85' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done"

    def stop() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), 15)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run_scripts([shell(script)] * 2) == [85, None]
    thread.join()


@pytest.mark.parametrize("launcher", [Launcher.slurm, Launcher.torchrun])
def test_the_scripts_pass_shellcheck(launcher: Launcher, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    file = tmp_path / "job.sh"
    file.write_text(template(launcher))
    subprocess.run(["shellcheck", "--severity=warning", str(file)], check=True)


def test_parse_parts_flags_from_settings() -> None:
    request = parse(["-m", "submit.parallel=2", "--collect", "steps=1,2"])
    assert request.multirun
    assert request.collect
    assert request.submit.parallel == 2
    assert request.overrides == ["steps=1,2"]
