"""Heat maps, histograms and lines: well-formed, self-contained, and darker or higher for more."""

import re
import xml.etree.ElementTree as ET

import pytest

from gatewise.launch.pictures import Panel, Series, heat_maps, histograms, lines, scatter

SVG = "{http://www.w3.org/2000/svg}"


def brightness(colour: str) -> int:
    return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def cells(text: str) -> list[ET.Element]:
    return [
        rect
        for rect in ET.fromstring(text).iter(f"{SVG}rect")
        if rect.find(f"{SVG}title") is not None
    ]


@pytest.mark.parametrize("columns", [3, 64])
def test_a_larger_value_is_a_darker_cell(columns: int) -> None:
    rows = [[row + column / columns for column in range(columns)] for row in range(2)]
    text = heat_maps("a <&> b", [Panel("x & y", rows)], row_label="r", column_label="c")
    found = cells(text)
    assert len(found) == 2 * columns
    values = [float(cell.find(f"{SVG}title").text) for cell in found]  # type: ignore[union-attr, arg-type]
    assert values == pytest.approx([value for row in rows for value in row], rel=1e-3)
    shades = [brightness(cell.get("fill", "")) for cell in found]
    assert shades == sorted(shades, reverse=True)
    assert shades[0] > 600
    assert shades[-1] < 300


def test_values_beyond_the_scale_take_its_ends() -> None:
    text = heat_maps(
        "t", [Panel("p", [[-5.0, 0.0, 1.0, 9.0]])], row_label="", column_label="", low=0.0, high=1.0
    )
    shades = [cell.get("fill") for cell in cells(text)]
    assert shades[0] == shades[1] != shades[2] == shades[3]


def test_equal_values_and_many_panels_are_drawn() -> None:
    panels = [Panel(str(index), [[1.0] * 4] * 4) for index in range(9)]
    text = heat_maps("t", panels, row_label="r", column_label="c", row_names=[3, 5, 7, 9])
    assert len(cells(text)) == 9 * 16
    box = re.search(r'viewBox="0 0 (\d+) (\d+)"', text)
    assert box is not None
    for cell in cells(text):  # nothing lies outside
        assert float(cell.get("x", "")) + float(cell.get("width", "")) <= int(box[1])
        assert float(cell.get("y", "")) + float(cell.get("height", "")) <= int(box[2])


def test_histograms_scale_to_their_own_highest_bar() -> None:
    text = histograms("t", [("a", [1, 2, 4]), ("b", [10, 0, 5])], end=2.08, x_label="nats")
    bars = [r for r in ET.fromstring(text).iter(f"{SVG}rect") if r.get("rx") is None]
    heights = [float(bar.get("height", "")) for bar in bars]
    assert heights[1] == pytest.approx(2 * heights[0])
    assert heights[2] == heights[3] == 4 * heights[0]
    assert heights[4] == 0
    ET.fromstring(histograms("t", [("empty", [0, 0])], end=1.0, x_label=""))


def test_lines_go_up_with_their_values_and_load_nothing() -> None:
    text = lines("t", [10, 20, 40], [("a", [0.2, 0.5, 1.0])] * 8, x_label="step", y_label="share")
    (first, *_), root = re.findall(r'points="([^"]+)"', text), ET.fromstring(text)
    points = [tuple(map(float, pair.split(","))) for pair in first.split()]
    assert points[0][1] > points[1][1] > points[2][1]
    assert (points[2][0] - points[1][0]) == pytest.approx(
        2 * (points[1][0] - points[0][0]), abs=0.2
    )
    assert len(list(root.iter(f"{SVG}polyline"))) == 8
    assert "href" not in text
    ET.fromstring(lines("t", [5], [("one", [0.5])], x_label="", y_label=""))


def test_a_long_title_or_label_widens_a_picture_of_few_columns() -> None:
    title, label = "a title of many words that says what is shown", "a label of its own length"
    panels = [Panel(label, [[0.0, 1.0]]), Panel(label, [[1.0, 0.0]])]
    text = heat_maps(title, panels, row_label="", column_label="")
    box = re.search(r'viewBox="0 0 (\d+) (\d+)"', text)
    assert box is not None
    assert int(box[1]) >= 9 * len(title)
    first, second = (
        float(node.get("x", ""))
        for node in ET.fromstring(text).iter(f"{SVG}text")
        if node.text == label
    )
    assert second - first >= 7 * len(label)
    assert second + 7 * len(label) <= int(box[1])


def test_points_rise_with_the_logarithm_of_their_value() -> None:
    series = [Series("a & b", [(1.0, 0.01, 0.001), (2.0, 0.1, 0.05), (3.0, 1.0, 0.0)])]
    root = ET.fromstring(scatter("t", series, x_label="x", y_label="y"))
    heights = [float(circle.get("cy", "")) for circle in root.iter(f"{SVG}circle")]
    assert heights[0] > heights[1] > heights[2]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert any(node.text == "a & b" for node in root.iter(f"{SVG}text"))


def test_a_linear_scale_has_round_marks_within_the_values() -> None:
    series = [Series("a", [(1.0, 4.71, 0.0), (2.0, 5.0, 0.0), (3.0, 5.29, 0.0)])]
    root = ET.fromstring(scatter("t", series, x_label="x", y_label="y", is_log=False))
    heights = [float(circle.get("cy", "")) for circle in root.iter(f"{SVG}circle")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    marks = [node.text for node in root.iter(f"{SVG}text") if node.get("x") == "76"]
    assert marks == ["4.8", "5", "5.2"]
