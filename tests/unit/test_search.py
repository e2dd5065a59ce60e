"""Sweeps whose points Optuna chooses: ranges, what runs again, and what is refused."""

import importlib.util
from pathlib import Path

import pytest
from stand_in import calls, stand_in, sweep_result

from gatewise.launch.cli import main
from gatewise.launch.search import Search
from gatewise.parallel.errors import ConfigError

# Stands in for the interpreter that would train. The loss is the distance of the rate from 0.003;
# the router in OMP_FAIL ends with 1.
FAKE = """#!/bin/sh
for word in "$@"; do
  case $word in
    run.dir=*) folder=${{word#run.dir=}} ;;
    optim.lr=*) lr=${{word#optim.lr=}} ;;
    router=*) router=${{word#router=}} ;;
  esac
done
echo "$router $lr" >> {log}
code=0
[ "${{router:-none}}" != "$OMP_FAIL" ] || code=1
cp "$folder/submit/config.yaml" "$folder/config.yaml"
loss=$(awk "BEGIN {{ print ($lr - 0.003) ^ 2 * 1e6 }}")
echo "{{\\"exit\\": $code, \\"steps\\": 20, \\"val_loss\\": $loss}}" > "$folder/result.json"
exit $code
"""
RATES = "optim.lr=tag(log,interval(1e-4,1e-2))"


def command(folder: Path, *overrides: str) -> list[str]:
    """Return a search whose runs only note that they were started, in `folder/calls`."""
    local = (*stand_in(folder, FAKE), "submit.snapshot=false")
    return ["submit", "-m", "experiment=tiny", *overrides, *local, f"run.dir={folder / 'search'}"]


@pytest.fixture
def _optuna() -> None:
    pytest.importorskip("optuna", reason="needs the extra optuna")


@pytest.mark.usefixtures("_optuna")
def test_a_search_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    short = command(tmp_path / "a", RATES, "submit.trials=2")
    assert main(short) == 0
    first = calls(tmp_path / "a")
    assert len(set(first)) == 2
    assert main(short) == 0
    assert calls(tmp_path / "a") == []
    assert main(command(tmp_path / "a", RATES, "submit.trials=3")) == 0
    rest = calls(tmp_path / "a")
    assert len(rest) == 1
    rates = [float(line) for line in first + rest]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    result = sweep_result(tmp_path / "a" / "search")
    assert result["states"] == {"finished": 3}
    best = min(rates, key=lambda rate: abs(rate - 0.003))
    assert result["best"] == {"optim.lr": repr(best)}
    assert main(command(tmp_path / "b", RATES, "submit.trials=3", "submit.parallel=2")) == 0
    assert sorted(calls(tmp_path / "b")) == sorted(first + rest)  # the first ten know nothing yet


@pytest.mark.usefixtures("_optuna")
def test_a_point_that_failed_is_tried_again_and_one_that_comes_twice_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = command(tmp_path, "router=rmoe,qwen3", "optim.lr=0.001", "submit.trials=6")
    monkeypatch.setenv("OMP_FAIL", "qwen3")
    assert main(search) == 1
    tried = calls(tmp_path)
    assert tried.count("rmoe 0.001") == 1
    assert "qwen3 0.001" in tried
    assert sweep_result(tmp_path / "search")["states"] == {"finished": 1, "failed": 1}
    monkeypatch.delenv("OMP_FAIL")
    assert main([*search, "--collect"]) == 1
    assert calls(tmp_path) == []
    assert main(search) == 0
    assert calls(tmp_path) == ["qwen3 0.001"]
    assert sweep_result(tmp_path / "search")["states"] == {"finished": 2}


@pytest.mark.usefixtures("_optuna")
def test_the_ends_of_all_ranges_are_checked_before_the_first_point_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = Search(["steps=1", "seed=range(0,9,2)", "optim.lr=interval(0.1,0.5)"], draw=0)
    assert [values for values, _ in search.ends()] == [
        {"seed": "0", "optim.lr": "0.1"},
        {"seed": "8", "optim.lr": "0.1"},
        {"seed": "0", "optim.lr": "0.5"},
    ]
    assert search.ends()[1][1] == ["steps=1", "seed=8", "optim.lr=0.1"]
    assert main(command(tmp_path, "steps=int(interval(-1,5))", "submit.trials=2")) == 2
    assert "point steps=-1: steps is -1" in capsys.readouterr().err
    wrong = {
        "interval(2,1)": "a higher one",
        "tag(log,interval(0,1))": "above 0",
        "glob(*)": "a list",
    }
    for text, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            Search([f"optim.lr={text}"], draw=0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["submit.trials=0"], "submit.trials is 0; it must be at least 1"),
        (["submit.trials=2", "submit.launcher=slurm"], "set submit.wait=true"),
        (["submit.trials=2"], "pip install -e '.[optuna]'"),
    ],
)
def test_a_search_that_cannot_be_had_is_refused_in_one_line(
    overrides: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["submit", "-m", "experiment=tiny", RATES, *overrides]) == 2
    assert words in capsys.readouterr().err
