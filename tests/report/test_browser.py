"""The page in a real browser: figures and tables are there, a click sorts, nothing is wider than a telephone, and the
console stays empty. Without Chromium (Debian's package) these tests are skipped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mpiml.report.__main__ import main
from tests.conftest import Job, launch
from tests.report.conftest import CONFIG, LINES, Make, evaluation_line

pytest.importorskip("matplotlib")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Writes into the title what a script in the page sees, in a window of 500 pixels, the least that Chromium has.
LOOK = """
<script>
const names = () => [...document.querySelectorAll("tbody")[0].rows].map((row) => row.cells[0].textContent);
const orders = [0, 1, 2].map((clicks) => {
  if (clicks) document.querySelectorAll("th button")[3].click();  // the training loss
  return names();
});
const heights = [...document.querySelectorAll("figure svg")].map((one) => one.getBoundingClientRect().height);
const wider = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const ink = getComputedStyle(document.querySelector("figure svg text")).fill;
document.title = JSON.stringify({ orders, least: Math.min(...heights), wider, ink });
</script>
"""


class Dom(HTMLParser):
    """The texts of the elements of some kinds, in their order."""

    def __init__(self, text: str):
        super().__init__()
        self.texts: dict[str, list[str]] = {"figcaption": [], "td": [], "title": []}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.texts:
            self._open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag][-1] += data


def browse(page: Path, *flags: str) -> tuple[dict[str, list[str]], list[str]]:
    """The texts of a page, by element, after its scripts have run, and the lines of the console."""
    home = page.parent / "browser"
    command = [str(CHROMIUM), "--headless", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += ["--no-sandbox"] if os.getuid() == 0 else []
    command += [f"--user-data-dir={home}", "--window-size=500,900", *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return Dom(done.stdout).texts, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(made: Make) -> None:
    config = CONFIG.replace("0.001", "0.1")
    runs = [made("far", LINES), made("near", [*LINES[:5], evaluation_line(5)], config), made("none", [])]
    page = runs[0].parent / "page.html"
    assert main([*map(str, runs), "--out", str(page)]) == 0
    page.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    texts, console = browse(page)
    assert console == []
    learning = [f"{what} by {axis}" for what in ("Loss", "Accuracy") for axis in ("step", "epoch", "time")]
    assert [title.split("thin")[0] for title in texts["figcaption"]][:6] == learning
    assert {"0.001", "0.1", "MPICH 5.0.2"} <= set(texts["td"])
    seen = json.loads(texts["title"][0])
    assert seen["orders"] == [["far", "near", "none"], ["far", "near", "none"], ["none", "near", "far"]]
    assert seen["least"] > 80  # pixels: each figure is there to be seen
    assert seen["wider"] <= 0  # wide tables scroll in boxes of their own
    assert seen["ink"] == "rgb(27, 34, 43)"
    page.write_text(page.read_text().replace("</body>", "<script>missing()</script></body>"))
    texts, console = browse(page, "--blink-settings=preferredColorScheme=0")
    assert json.loads(texts["title"][0])["ink"] == "rgb(230, 233, 237)"  # in the dark
    assert ["missing is not defined" in line for line in console] == [True]  # an error would be seen


@pytest.mark.contract
def test_the_page_of_a_run_with_a_restart(train: Callable[..., Job]) -> None:
    """Begun on 2 ranks, gone on with on 3: environment.json says at which step, and the page shows it."""
    every = "--microbatches 6 --log-every 1 --eval-every 3 --save-every 3 --hidden 8 --quiet"
    assert train(2, f"--steps 6 {every}").code == 0
    job = train(3, f"--steps 9 --resume {every}")
    assert job.code == 0, job.err
    done = launch(0, "-m", "mpiml.report", str(job.run))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{job.run}/report.html\n", "")
    page = (job.run / "report.html").read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("<h2>Jobs</h2>")[1].split("</table>")[0])
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows[1:]]
    assert [row[:4] for row in cells] == [["1", "0", "2", "1"], ["2", "6", "3", "1"]]
    assert page.split('id="loss-step"')[1].split("</figure>")[0].count("restart") >= 1
