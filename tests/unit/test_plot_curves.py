"""The picture of training curves: what is read from the records and where it is drawn."""

import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return load_script("plot_curves")


def write_run(folder: Path, records: list[dict[str, object]], *, tail: str = "") -> Path:
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def training(step: int, loss: float | None, *, rate: float = 100.0) -> dict[str, object]:
    tokens = 1000 * step
    return {
        "step": step,
        "train/tokens": tokens,
        "train/loss_mean": loss,
        "train/tokens_per_second": rate,
    }


def test_minutes_are_summed_from_the_rate_of_each_record(plot: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [training(6, 3.0), training(12, 2.0, rate=50)])
    first, second = plot.read_curve("a", run).training
    assert (first.tokens, first.minutes, first.value) == (6000, pytest.approx(1.0), 3.0)
    assert (second.tokens, second.minutes, second.value) == (12000, pytest.approx(3.0), 2.0)


def test_an_evaluation_between_two_records_lies_between_them(
    plot: ModuleType, tmp_path: Path
) -> None:
    evaluations = [{"step": step, "val/bits_per_byte": 1.5} for step in (3, 9, 12, 15)]
    records = [training(6, 3.0), training(12, 2.0, rate=50), *evaluations]
    points = plot.read_curve("a", write_run(tmp_path / "run", records)).validation
    assert [point.tokens for point in points] == [3000, 9000, 12000, 12000]
    assert [point.minutes for point in points] == pytest.approx([0.5, 2.0, 3.0, 3.0])


def test_lost_values_and_a_torn_last_line_are_left_out(plot: ModuleType, tmp_path: Path) -> None:
    records = [training(1, 3.0), training(2, None), training(3, 2.0)]
    curve = plot.read_curve("a", write_run(tmp_path / "run", records, tail='{"step": 4, "tr'))
    assert [point.value for point in curve.training] == [3.0, 2.0]
    assert curve.training[1].tokens == 3000
    assert curve.validation == ()


def test_ticks_are_round_and_inside(plot: ModuleType) -> None:
    assert plot.ticks(0.0, 12.6) == [0.0, 5.0, 10.0]
    assert plot.ticks(0.0, 12.6, most=8) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert plot.ticks(1.13, 1.38) == pytest.approx([1.15, 1.2, 1.25, 1.3, 1.35])
    assert plot.ticks(0.0, 12_300_000.0) == [0.0, 5_000_000.0, 10_000_000.0]


def test_the_picture_is_one_file_with_a_lower_loss_further_down(
    plot: ModuleType, tmp_path: Path
) -> None:
    for name, loss in (("good", 2.0), ("bad", 3.0)):
        records = [training(step, loss + 1 / step) for step in range(1, 9)]
        records += [{"step": step, "val/bits_per_byte": loss / 2} for step in (4, 8)]
        write_run(tmp_path / name, records)
    output = tmp_path / "curves.svg"
    labels = [f"a <&> b={tmp_path / 'good'}", f"bad={tmp_path / 'bad'}"]
    assert plot.main([*labels, "--output", str(output)]) == 0
    text = output.read_text()
    root = ET.fromstring(text)
    assert "a <&> b" in [span.text for span in root.iter(f"{SVG}tspan")]
    # nothing is loaded from elsewhere: the only references are to clip paths of this file
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "href" not in text
    lines = [
        [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
        for line in root.iter(f"{SVG}polyline")
    ]
    assert [len(line) for line in lines] == [8] * 4 + [2] * 4  # loss, then validation; two each
    for good, bad in zip(lines[::2], lines[1::2], strict=True):
        assert all(low[1] > high[1] for low, high in zip(good, bad, strict=True))
        assert all(x < next_x for (x, _), (next_x, _) in itertools.pairwise(good))
    # a marker at each evaluation against tokens and against minutes, and two in the legend
    assert text.count('stroke="#ffffff"') == 2 * 2 * 2 + 2


def test_a_long_curve_may_start_above_the_frame(plot: ModuleType) -> None:
    points = [plot.Point(1000.0 * n, n / 60, 2.0 + 50.0 / n**2) for n in range(1, 101)]
    _, high = plot._range([points])
    assert 2.0 < high < 6.0
    assert plot._range([points[:20]])[1] > 52.0  # a short one is shown whole


def test_runs_without_evaluations_give_a_picture_too(plot: ModuleType) -> None:
    curve = plot.Curve("one", (plot.Point(10.0, 0.1, 2.5),), ())
    ET.fromstring(plot.draw([curve]))


@pytest.mark.parametrize(
    ("argument", "message"),
    [("runs/a", "is not LABEL=RUN_FOLDER"), ("a={}/none", "a: "), ("a={}/empty", "has no record")],
)
def test_a_mistake_is_one_line(
    argument: str,
    message: str,
    plot: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "empty", [{"step": 1, "val/bits_per_byte": 2.0}])
    with pytest.raises(SystemExit) as stop:
        plot.main([argument.format(tmp_path), "--output", str(tmp_path / "x.svg")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.svg").exists()
