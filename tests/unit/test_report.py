"""The report of runs: what it draws, what it says is missing or damaged, and what it refuses."""

import contextlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from stored_runs import make_compression, make_run, make_trace

from gatewise.launch import report
from gatewise.launch.cli import main
from gatewise.launch.report import compare_runs, describe_run
from gatewise.launch.report_figures import Figure
from gatewise.launch.report_page import Missing, Section, Table, render
from gatewise.launch.report_runs import read_run
from gatewise.parallel.errors import ConfigError


def figures(sections: list[Section]) -> dict[str, Figure]:
    return {
        item.title: item
        for section in sections
        for item in section.items
        if isinstance(item, Figure)
    }


def missing(sections: list[Section]) -> set[str]:
    items = [item for section in sections for item in section.items]
    return {item.what for item in items if isinstance(item, Missing)}


def test_a_whole_run_is_drawn_whole(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    make_trace(folder)
    make_compression(folder / "2.5_bits")
    run = read_run(folder)
    sections = describe_run(run)
    assert run.notes == []
    assert missing(sections) == set()
    drawn = figures(sections)
    assert set(drawn) == {
        "Loss over steps",
        "Loss over tokens",
        "Learning rate",
        "Throughput of all ranks",
        "Validation, comparable between tokenizers",
        "Gradient norms",
        "Load of each expert",
        "Imbalance of each layer over the steps",
        "Dead experts",
        "Entropy of a token's scores by layer",
        "Best score of a token by layer",
        "Churn of the router",
        "Time of a step",
        "Timeline of step 20",
        "Loss added by compression over bits",
        "Bits of each matrix, 2.5_bits",
    }
    for figure in drawn.values():
        assert figure.layout["xaxis"]["title"]["text"], figure.title
        assert figure.layout["yaxis"]["title"]["text"], figure.title
        assert figure.caption.endswith("."), figure.title


def test_the_numbers_drawn_are_those_of_the_records(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    make_trace(folder)
    make_compression(folder / "a", bits=2.0, delta=0.03)
    make_compression(folder / "b", bits=2.5, delta=0.01)
    make_compression(folder / "c", bits=3.0, delta=0.02)
    run = read_run(folder)
    drawn = figures(describe_run(run))
    loss = drawn["Loss over tokens"].data[0]
    assert loss["x"] == [1000 * step for step in range(2, 41, 2)]
    load = drawn["Load of each expert"]
    assert [name for name, _ in load.frames] == [f"step {step}" for step in range(2, 41, 2)]
    assert load.data[0]["z"] == load.frames[-1][1] == run.loads()[-1][1]
    rest, exposed = drawn["Time of a step"].data
    assert (rest["y"][0], exposed["y"][0]) == (170, 30)  # 1000 tokens at 5000 a second
    assert drawn["Dead experts"].data[0]["y"][:4] == [1, 1, 1, 0]
    spans = {trace["name"]: trace for trace in drawn["Timeline of step 20"].data}
    assert spans["send"]["base"] == [0.5, 0.5]  # ms; what was predicted is left out
    assert spans["send"]["y"] == ["rank 0 inter", "rank 1 inter"]
    front = drawn["Loss added by compression over bits"].data[1]
    assert front["x"] == [2.0, 2.5]  # 3 bits lose more than 2.5
    marks = drawn["Loss over steps"].layout["shapes"]
    assert [mark["x0"] for mark in marks] == [20]


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, lr=lr)) for name, lr in (("a", 1e-3), ("b", 3e-3))]
    sections = compare_runs(runs)
    results, settings = (item for item in sections[0].items if isinstance(item, Table))
    assert [row[0] for row in results.rows] == ["a", "b"]
    assert settings.rows == [["name", "a", "b"], ["optim.lr", "0.001", "0.003"]]
    drawn = figures(sections)
    assert [trace["name"] for trace in drawn["Validation loss over tokens"].data] == ["a", "b"]
    assert [trace["y"] for trace in drawn["Time of a step"].data] == [[170, 170], [30, 30]]
    assert "Compression" in missing(sections)


def test_what_was_not_recorded_is_said_to_be_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    few = [{k: v for k, v in line.items() if k in ("step", "train/loss_mean")} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in few))
    sections = describe_run(read_run(folder))
    assert set(figures(sections)) == {"Loss over steps"}
    assert {"Load of each expert over time", "Churn of the router", "Timeline"} <= missing(sections)


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("metrics.jsonl", None, "the last of 24 lines, torn by a kill, cannot be read"),
        ("result.json", b"", "result.json is damaged"),
        ("result.json", b"[1]", "result.json is damaged: it holds no object"),
        ("config.yaml", b"\x00\xff\xfe", "config.yaml cannot be read: it is not text"),
        ("config.yaml", b"a: [b", "config.yaml is damaged"),
        ("attempts.jsonl", b"{\n", "attempts.jsonl is damaged: 1 lines cannot be read"),
        ("environment.json", b"\x80", "environment.json cannot be read: it is not text"),
        ("trace/step_20_rank_1.json", b"{", "trace/step_20_rank_1.json is damaged"),
    ],
)
def test_damage_is_named_and_the_rest_is_shown(
    name: str, content: bytes | None, note: str, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run")
    make_trace(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-40] if content is None else content)
    run = read_run(folder)
    assert any(note in line for line in run.notes), run.notes
    assert "Loss over steps" in figures(describe_run(run))


def test_garbage_between_records_is_counted_and_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    odd = [
        b"\x00\x93\xff",
        b'{"step": "x"}',
        b"[]",
        b'{"step": 4, "val/loss": "low"}',
        b"[" * 99999,
    ]
    path.write_bytes(b"\n".join([*lines[:3], *odd, *lines[3:]]) + b"\n")
    run = read_run(folder)
    assert any("4 of 29 lines cannot be read (the first is 4)" in note for note in run.notes)
    assert any("no numbers in val/loss" in note for note in run.notes)
    assert [record["step"] for record in run.records] == list(range(2, 41, 2))
    assert figures(describe_run(run))["Loss over steps"].data[0]["x"] == list(range(2, 41, 2))


def test_whatever_bytes_are_changed_a_report_or_a_refusal_comes_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=12)
    make_trace(folder)
    make_compression(folder / "2_bits")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    generator = random.Random(0)
    pieces = [b"NaN", b"null", b"-1", b"[]", b"{}", b'"x"', b"\xff", b"1e999", b"9" * 400, b"\n"]
    for _ in range(30):
        path = generator.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(generator.randrange(1, 6)):
            at = generator.randrange(len(damaged))
            damaged[at : at + generator.randrange(12)] = generator.choice(pieces)
        path.write_bytes(damaged[: generator.randrange(1, 2 * len(damaged))])
        with contextlib.suppress(ConfigError):  # nothing is left to show
            run = read_run(folder)
            render("x", [], run.notes, describe_run(run) + compare_runs([run]), plotly_js="")
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "metrics.jsonl is missing"),
        ({"metrics.jsonl": b""}, "metrics.jsonl is empty: the run wrote no record"),
        ({"metrics.jsonl": bytes(range(256))}, "metrics.jsonl is damaged: "),
    ],
)
def test_a_folder_with_nothing_to_show_is_refused(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"nothing can be shown: {re.escape(message)}"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no RUN is given"),
        (["nowhere"], "RUN is 'nowhere', which is not a folder"),
        ([".", "./"], "RUN is given twice"),
        (["nowhere", "outptu=x"], "unknown setting 'outptu'; did you mean 'output'?"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    pytest.importorskip("plotly", reason="needs the extra report")
    with pytest.raises(ConfigError, match=re.escape(message)):
        report.run(words)


def test_without_plotly_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[report\]'"):
        report.run([str(make_run(tmp_path / "run"))])


def test_the_command_writes_one_file_and_ends_with_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly", reason="needs the extra report")
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder), f"run.dir={tmp_path / 'out'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "out" / "result.json")
    result: dict[str, Any] = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["report"] == str(folder / "report.html")
    assert result["missing"] == ["Timeline", "Compression"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1
    assert result["plots"] == page.count('class="plot"')


def test_names_and_values_cannot_become_part_of_the_page() -> None:
    bad = '</script><script>alert("x")</script>'
    figure = Figure(bad, [{"name": bad}], {"height": 1}, bad)
    table = Table(bad, [bad], [[bad]])
    section = Section(bad, [figure, table, Missing(bad, bad)])
    page = render(bad, [(bad, bad)], [bad], [section], plotly_js="")
    assert "<script>alert" not in page
    assert json.loads(re.findall(r'id="data0">(.*?)</script>', page)[0])["data"][0]["name"] == bad
    assert "default-src 'none'" in page
