"""Reports in a real browser: no errors, no network, and marks in every plot."""

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
from stored_runs import make_compression, make_run, make_trace

from gatewise.launch.report import run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=30000",
    "--window-size=1300,900",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing leaves this machine, whatever is asked
)
OWN = re.compile(r"https?://[\w.-]+\.(google|googleapis)\.com/")  # what the browser itself asks


class Page(HTMLParser):
    """Counts the marks of each plot in the browser's document, and keeps what scripts left."""

    LINES: ClassVar = {"js-line", "point", "js-fill"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.marks: dict[str, int] = {}
        self.titles: dict[str, str] = {}
        self.root: dict[str, str | None] = {}
        self._plot = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        names = (found.get("class") or "").split()
        if tag == "html":
            self.root = found
        if tag == "figure":
            self._plot = ""
        if "plot" in names:
            self._plot = found["id"] or ""
            self.titles[self._plot] = found["aria-label"] or ""
            self.marks[self._plot] = 0
        is_line = tag == "path" and bool(found.get("d")) and bool(self.LINES & set(names))
        is_bar = tag == "g" and "point" in names
        is_map = tag == "image" and any("href" in name for name in found)
        if self._plot and (is_line or is_bar or is_map):
            self.marks[self._plot] += 1

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)


def browse(file: Path, tmp_path: Path) -> tuple[Page, list[str], list[str]]:
    """Open a file; return the document, the console's lines and the addresses that were asked."""
    assert BROWSER is not None
    log = tmp_path / "net.json"
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = re.findall(r'"url":"(https?://[^"]+)', log.read_text(encoding="utf-8"))
    return Page(done.stdout), console, [url for url in asked if not OWN.match(url)]


def needs_browser() -> None:
    if BROWSER is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    pytest.importorskip("plotly", reason="needs the extra report")


def test_every_plot_of_a_run_is_drawn_without_errors_or_network(tmp_path: Path) -> None:
    needs_browser()
    folder = make_run(tmp_path / "run")
    make_trace(folder)
    make_compression(folder / "2_bits", bits=2.0, delta=0.05)
    make_compression(folder / "2.5_bits")
    assert run([str(folder), f"run.dir={tmp_path / 'out'}"]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    # a reader moves the slider of the load to the first record
    moved = tmp_path / "moved.html"
    move = """<script>
      const slider = document.querySelector("input[type=range]");
      slider.value = "0";
      slider.dispatchEvent(new Event("input"));
      const place = slider.closest("figure").querySelector(".plot");
      document.documentElement.dataset.at = slider.nextElementSibling.textContent;
      document.documentElement.dataset.first = place.data[0].z[0][0];
    </script>"""
    moved.write_text(text.replace("</body>", f"{move}</body>"), encoding="utf-8")
    page, console, asked = browse(moved, tmp_path)
    assert console == []
    assert asked == []
    assert len(page.marks) == 17
    blank = [page.titles[name] for name, count in page.marks.items() if not count]
    assert blank == []
    assert page.root["data-at"] == "step 2"
    assert float(page.root["data-first"] or 0) == pytest.approx(1 + math.cos(2 / 9) / 2)


def test_every_plot_of_a_comparison_is_drawn(tmp_path: Path) -> None:
    needs_browser()
    folders = [make_run(tmp_path / name, steps=steps) for name, steps in (("a", 40), ("b", 20))]
    make_compression(folders[0] / "2_bits", bits=2.0)
    assert run([*map(str, folders), f"run.dir={tmp_path / 'out'}"]) == 0
    page, console, asked = browse(tmp_path / "out" / "report.html", tmp_path)
    assert (console, asked) == ([], [])
    blank = [page.titles[name] for name, count in page.marks.items() if not count]
    assert blank == []
    assert len(page.marks) == 14


def test_what_the_browser_would_have_to_load_is_noticed(tmp_path: Path) -> None:
    """The checks above can fail: an error, an address and an empty plot are seen."""
    needs_browser()
    file = tmp_path / "bad.html"
    plot = (
        '<div class="plot" id="plot0" aria-label="empty"><path class="js-line" d=""></path></div>'
    )
    address = "http://example.invalid/x.png"
    file.write_text(f'{plot}<img src="{address}"><script>missing()</script>', encoding="utf-8")
    page, console, asked = browse(file, tmp_path)
    assert page.marks == {"plot0": 0}
    assert any("missing is not defined" in line for line in console)
    assert set(asked) == {address}
