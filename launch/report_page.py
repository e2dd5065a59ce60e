"""One HTML file with plots and tables that loads nothing: no network, no other file.

The plots' data stand in the page as JSON and plotly.js once, at its end. A content security policy
in the page makes the browser itself refuse to load anything.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from gatewise.launch.report_figures import Figure

__all__ = ["Missing", "Section", "Table", "render"]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text below a head; `is_folded` hides it until it is opened."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False


@dataclass(frozen=True, slots=True)
class Missing:
    """What is not shown, and why."""

    what: str
    why: str


@dataclass(slots=True)
class Section:
    """A heading and what stands below it."""

    title: str
    items: list[Figure | Table | Missing] = field(default_factory=list)


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    sections: Sequence[Section],
    *,
    plotly_js: str,
) -> str:
    """Return the text of the page.

    Args:
        title: of the page.
        facts: name and value of the main results.
        notes: what was damaged or missing in what was read.
        sections: in order; empty ones are left out.
        plotly_js: the library's source.
    """
    figures: list[Figure] = []
    body = [f"<h1>{escape(title)}</h1>"]
    body.append('<dl class="facts">')
    body += [f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts]
    body.append("</dl>")
    if notes:
        lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body.append(f'<section class="notes"><h2>Read with care</h2><ul>{lines}</ul></section>')
    shown = [section for section in sections if section.items]
    links = "".join(
        f'<a href="#s{number}">{escape(section.title)}</a>' for number, section in enumerate(shown)
    )
    body.append(f'<nav aria-label="sections">{links}</nav>')
    for number, section in enumerate(shown):
        body.append(f'<section id="s{number}"><h2>{escape(section.title)}</h2><div class="grid">')
        for item in section.items:
            if isinstance(item, Figure):
                body.append(_figure(item, len(figures)))
                figures.append(item)
            elif isinstance(item, Table):
                body.append(_table(item))
            else:
                what, why = escape(item.what), escape(item.why)
                body.append(f'<p class="missing"><b>{what}</b> is not shown: {why}</p>')
        body.append("</div></section>")
    data = "".join(
        f'<script type="application/json" id="data{number}">{_json(figure)}</script>'
        for number, figure in enumerate(figures)
    )
    scripts = f"<script>{plotly_js}</script>\n<script>{_DRAW}</script>" if figures else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n<noscript><p>The plots need JavaScript, the sentences and tables do not.</p>"
        f"</noscript>\n</main>\n{data}\n{scripts}\n</body></html>\n"
    )


def _figure(figure: Figure, number: int) -> str:
    words = escape(figure.caption)
    span = ' class="whole"' if figure.is_wide else ""
    parts = [
        f'<figure{span}><div class="plot" id="plot{number}" role="img" '
        f'aria-label="{escape(figure.title)}" aria-describedby="words{number}" '
        f'style="min-height:{int(figure.layout["height"])}px"></div>'
    ]
    if len(figure.frames) > 1:
        last = len(figure.frames) - 1
        parts.append(
            f'<p class="slider"><label for="slider{number}">Record</label>'
            f'<input type="range" id="slider{number}" min="0" max="{last}" value="{last}">'
            f'<output id="at{number}">{escape(figure.frames[-1][0])}</output></p>'
        )
    parts.append(f'<figcaption id="words{number}">{words}</figcaption></figure>')
    return "".join(parts)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(cell)}</th>' if place == 0 else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    )
    text = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    text = f'<div class="wide">{text}</div>'
    title = escape(table.title)
    if table.is_folded:
        return f'<details class="whole"><summary>{title}</summary>{text}</details>'
    return f'<div class="whole"><h3>{title}</h3>{text}</div>'


def _json(figure: Figure) -> str:
    """Return a figure's data so that nothing in it can end the script element."""
    found: Mapping[str, Any] = {
        "data": figure.data,
        "layout": figure.layout,
        "frames": [{"name": name, "z": z} for name, z in figure.frames],
    }
    text = json.dumps(found, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
_STYLE = """
:root { color-scheme: light; --ink: #1f2328; --quiet: #57606a; --line: #d8d8d2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f4f0; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 34px 0 12px; border-bottom: 1px solid var(--line); }
h3 { font-size: 16px; margin: 20px 0 8px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 18px; }
.facts div { background: #fcfcfa; border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; }
dt { color: var(--quiet); font-size: 13px; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.notes { background: #fff6e0; border: 1px solid #d9a441; border-radius: 8px; padding: 2px 18px; }
.notes h2 { border: 0; margin: 10px 0 0; font-size: 16px; }
.missing { color: var(--quiet); background: #fcfcfa; border: 1px dashed #b9b9b2;
  border-radius: 8px; padding: 10px 14px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin-top: 14px; }
a { color: #0a4a85; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.grid > * { min-width: 0; margin: 0; }
.whole, .missing { grid-column: 1 / -1; }
@media (max-width: 900px) { .grid { grid-template-columns: minmax(0, 1fr); } }
figure { background: #fcfcfa; border: 1px solid var(--line);
  border-radius: 8px; padding: 10px 12px 12px; }
figcaption { color: var(--quiet); padding: 6px 8px 0; }
.slider { display: flex; gap: 12px; align-items: center; margin: 4px 8px 10px; }
.slider input { flex: 1; accent-color: #0a4a85; }
.slider output { min-width: 7em; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: #fcfcfa; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 4px 10px; text-align: left;
  overflow-wrap: anywhere; }
thead th { background: #ececE6; }
tbody th { font-weight: 500; }
summary { cursor: pointer; font-weight: 600; padding: 6px 0; }
@media print { .slider, nav { display: none; } body { background: #fff; } }
"""
_DRAW = """
"use strict";
for (const place of document.querySelectorAll(".plot")) {
  const number = place.id.slice(4);
  const figure = JSON.parse(document.getElementById("data" + number).textContent);
  const options = {responsive: true, displaylogo: false, displayModeBar: false};
  Plotly.newPlot(place, figure.data, figure.layout, options);
  const slider = document.getElementById("slider" + number);
  if (slider) {
    slider.addEventListener("input", () => {
      const frame = figure.frames[Number(slider.value)];
      document.getElementById("at" + number).textContent = frame.name;
      Plotly.restyle(place, {z: [frame.z]}, [0]);
    });
  }
}
document.documentElement.dataset.plots = document.querySelectorAll(".plot").length;
"""
