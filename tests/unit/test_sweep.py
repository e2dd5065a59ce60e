"""The points of a sweep: how they are written, what runs again, and the summary."""

import json
import os
import stat
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from stand_in import calls, stand_in, sweep_result

from gatewise.launch.cli import main
from gatewise.launch.points import expand
from gatewise.launch.sweep_report import PointResult, table, write_summary
from gatewise.parallel.errors import ConfigError

SWEEP = ["submit", "-m", "experiment=tiny", "router=rmoe,deepseek_v3", "optim.lr=1e-3,3e-3"]


def test_a_grid_is_expanded_in_the_order_of_the_command_line() -> None:
    points = expand(["steps=3", "router=rmoe,qwen3", "seed=range(1,3)"])
    assert [values for values, _ in points] == [
        {"router": router, "seed": seed} for router in ("rmoe", "qwen3") for seed in ("1", "2")
    ]
    assert points[3][1] == ["steps=3", "router=qwen3", "seed=2"]


def test_what_is_not_swept_is_left_as_it_was_typed() -> None:
    texts = ["data.path=/a b/c*.txt", "name='x,y'", "run.dir=a=b,c"]
    with pytest.raises(ConfigError, match=r"quote texts with commas"):
        expand([*texts, "steps=1,2"])
    (_, first), _ = expand([*texts[:2], "steps=choice(1,2)"])
    assert first == [*texts[:2], "steps=1"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps=3"], "-m sweeps nothing"),
        (["steps=1,1"], "names a point twice"),
        (["optim.lr=interval(1,2)"], "a grid takes lists and ranges"),
        (["steps=1,2", "run.dir=a,b"], "run.dir is swept"),
        (["steps=-1,2"], "point steps=-1: steps is -1"),
        (
            ["model.num_experts=4,6", "parallel.ranks=4", "parallel.expert=4"],
            "num_experts=6: model",
        ),
    ],
)
def test_a_mistake_in_any_point_is_found_before_the_first_starts(
    overrides: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "-m", "experiment=tiny", *overrides]) == 2
    assert words in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name == "submit"]


# A stand-in for the interpreter that would train: notes that it was called and leaves what a run
# leaves. The loss is the rate in thousandths; the rate in OMP_FAIL ends with 1.
FAKE = """#!/bin/sh
for word in "$@"; do
  case $word in
    run.dir=*) folder=${{word#run.dir=}} ;;
    optim.lr=*) lr=${{word#optim.lr=0.00}} ;;
  esac
done
basename "$folder" >> {log}
code=0
[ "$lr" != "$OMP_FAIL" ] || code=1
cp "$folder/submit/config.yaml" "$folder/config.yaml"
echo '{{"step": 1, "train/loss_mean": 2.5}}' > "$folder/metrics.jsonl"
echo "{{\\"exit\\": $code, \\"steps\\": 20, \\"val_loss\\": $lr}}" > "$folder/result.json"
exit $code
"""


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """Return a sweep's command line whose runs only note that they were started."""
    run = f"run.dir={tmp_path / 'my_sweep'}"
    return [*SWEEP, *stand_in(tmp_path, FAKE), run]


def test_a_sweep_runs_each_point_once_and_sums_up(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sweep) == 0
    names = [f"router={r}__optim.lr={lr}" for r in ("rmoe", "deepseek_v3") for lr in (0.001, 0.003)]
    assert calls(tmp_path) == names
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(tmp_path / "my_sweep" / "result.json")
    result = sweep_result(tmp_path / "my_sweep")
    assert result["states"] == {"finished": 4}
    assert result["best"] == {"router": "rmoe", "optim.lr": "0.001"}
    assert result["group"] == "my_sweep"
    assert [row["val_loss"] for row in result["rows"]] == [1.0, 1.0, 3.0, 3.0]
    stored = (tmp_path / "my_sweep" / names[0] / "config.yaml").read_text()
    assert "group: my_sweep" in stored
    assert "name: router=rmoe optim.lr=0.001" in stored
    page = (tmp_path / "my_sweep" / "sweep.md").read_text()
    assert page.count("\n| ") == 6  # with the heading and the rule
    assert "![" in page
    curves = ET.fromstring((tmp_path / "my_sweep" / "sweep.svg").read_text())
    assert len(list(curves.iter("{http://www.w3.org/2000/svg}circle"))) == 4


def test_points_that_have_finished_with_these_settings_are_left_out(
    sweep: list[str], tmp_path: Path
) -> None:
    smaller = [text for text in sweep if not text.startswith("router=")]
    assert main(smaller) == 0
    assert calls(tmp_path) == ["optim.lr=0.001", "optim.lr=0.003"]
    grown = [text.replace("3e-3", "3e-3,5e-3") for text in smaller]
    assert main(grown) == 0
    assert calls(tmp_path) == ["optim.lr=0.005"]
    assert sweep_result(tmp_path / "my_sweep")["points"] == 3
    assert main([*smaller, "steps=30"]) == 0
    assert len(calls(tmp_path)) == 2


def test_a_point_that_fails_stops_no_other_and_runs_again(
    sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = [text for text in sweep if not text.startswith("router=")]
    monkeypatch.setenv("OMP_FAIL", "1")
    assert main(sweep) == 1
    assert len(calls(tmp_path)) == 2
    assert sweep_result(tmp_path / "my_sweep")["states"] == {"finished": 1, "failed": 1}
    monkeypatch.delenv("OMP_FAIL")
    assert main([*sweep, "--collect"]) == 1
    assert calls(tmp_path) == []
    assert main(sweep) == 0
    assert calls(tmp_path) == ["optim.lr=0.001"]


def test_a_slurm_sweep_is_one_array_that_finds_its_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"sbatch": "echo 17", "squeue": "echo 17_1 RUNNING"}.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    arguments = [*SWEEP, "submit.launcher=slurm", f"run.dir={tmp_path / 'my_sweep'}"]
    assert main([*arguments, "submit.parallel=2", "name=a b"]) == 0
    folder = tmp_path / "my_sweep"
    script = (folder / "submit" / "array_0.sh").read_text()
    assert "#SBATCH --array=0-3%2\n" in script
    assert "slurm-%A_%a.log\n" in script
    points = (folder / "submit" / "points_0").read_text().splitlines()
    assert Path(points[2]) == folder / "router=deepseek_v3__optim.lr=0.001"
    lines = (Path(points[2]) / "submit" / "arguments").read_text().splitlines()
    assert lines[:2] == ["experiment=tiny", "name=a b"]
    assert "router=deepseek_v3" in lines
    assert json.loads((Path(points[2]) / "submit" / "job.json").read_text()) == {"job": "17_2"}
    assert sweep_result(tmp_path / "my_sweep")["states"] == {
        "queued": 1,
        "failed": 3,
    }  # as if Slurm had lost them

    capsys.readouterr()
    assert main([*arguments, "name=a b"]) == 0  # the queued one is left alone
    assert len((folder / "submit" / "points_1").read_text().splitlines()) == 3


def test_the_table_shows_every_point_the_best_first(tmp_path: Path) -> None:
    rows = [
        PointResult({"a": "1"}, str(tmp_path), "finished", 20, 20, val_loss=2.5, seconds=1234.0),
        PointResult({"a": "2"}, str(tmp_path), "failed", 0, 20, error="rank 1: it broke"),
        PointResult({"a": "3"}, str(tmp_path), "stopped", 7, 20, val_loss=1.5),
    ]
    found = write_summary(rows, tmp_path, name="s")
    assert [line.split()[1] for line in found["lines"][2:]] == ["3", "1", "2"]
    assert found["best"] == {"a": "3"}
    assert found["picture"] is None  # nothing was logged
    assert len({len(line) for line in table(rows)}) == 1
    page = (tmp_path / "sweep.md").read_text()
    assert "1,234" in page
    assert "- a=2: rank 1: it broke" in page
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 3
