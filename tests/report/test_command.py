"""The command: what it writes and prints, for runs of all kinds, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

from mpiml.pages.drawing import Drawing
from mpiml.report.__main__ import main
from mpiml.report.curves import axes_of
from mpiml.report.learning import learned
from mpiml.report.runs import read_runs
from tests.report.conftest import CONFIG, ENVIRONMENT, LINES, RESULT, Make, step_line

pytest.importorskip("matplotlib")
SVG = '<svg viewBox="0 0 1 1"></svg>'
TAGS = re.compile(r"<[^>]*>")
SLOW = {"rank": 3, "host": "n7", "activity": "data", "times_median": 2.5}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose figures are empty: to draw them takes a second or two."""
    monkeypatch.setattr(Drawing, "svg", lambda drawing: SVG)


def titles(page: Path) -> list[str]:
    return re.findall(r"<figcaption>([^<]*)", page.read_text())


def words(page: Path) -> str:
    """The text of a page, without its figures."""
    return " ".join(
        TAGS.sub(" ", re.sub(r"<(svg|style|script).*?</\1>", "", page.read_text(), flags=re.DOTALL)).split()
    )


def test_the_page_of_a_run(made: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(checkpoints=[12], environment={**ENVIRONMENT, "jobs": [{"after": 0}, {"after": 12, "ranks": 3}]})
    assert main([str(run)]) == 0
    assert capsys.readouterr() == (f"{run}/report.html\n", "")
    page = run / "report.html"
    learning = [f"{what} by {axis}" for what in ("Loss", "Accuracy") for axis in ("step", "epoch", "time")]
    rest = ["Learning rate", "Norm of the gradient", "Samples per second", "Where the time goes by step"]
    assert titles(page) == [*learning, *rest, "Spread over ranks"]
    text = words(page)
    assert "step 24 of 24 training loss 0.0833" in text
    assert "test loss 0.5 accuracy 0.75" in text
    assert "weights abcdef012345 " in text
    assert "processor A BLAS B NumPy 2.4.6" in text
    assert "2 12 3" in text  # the second job
    assert ">restart<" in page.read_text()
    assert ">checkpoint<" in page.read_text()
    assert "lr 0.001 \u2013" in text  # which is not the default


def test_the_same_run_makes_the_same_bytes_which_need_no_other_file(made: Make, tmp_path: Path) -> None:
    run = made(lines=LINES[:2], environment=None)
    for name in ("one.html", "two.html"):
        assert main([str(run), "--out", str(tmp_path / name)]) == 0
    page = (tmp_path / "one.html").read_text()
    assert page == (tmp_path / "two.html").read_text()
    links = set(re.findall(r"""\b(?:href|src|url)(?:="|\()([^")]*)""", page)) - {"data:,"}
    assert {link[0] for link in links} == {"#"}
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(names)) == len(names)
    assert {f"#{name}" for name in names} >= links


@pytest.mark.usefixtures("undrawn")
def test_two_runs_of_one_name(made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    one = made("a/run")
    lines = [step_line(step, noise_scale=30.0, workers={"distance": 0.1}) for step in range(1, 30)]
    lines[4]["seconds"]["slowest"] = SLOW
    two = made("b/run", lines, CONFIG.replace("0.001", "0.01"), {**ENVIRONMENT, "mpi": "Open MPI"})
    assert main([str(one), str(two)]) == 0
    page = tmp_path / "report.html"
    assert {"Noise scale (rows)", "Distance of the workers", "Where the time goes"} < set(titles(page))
    assert {"Where the time goes by step, a/run", "Spread over ranks, b/run"} < set(titles(page))
    text = words(page)
    assert "lr \u2195" not in text
    assert "setting a/run b/run lr 0.001 0.01 " in text
    assert "MPI MPICH 5.0.2 Open MPI" in text
    assert "b/run 3 n7 data 1 5 to 5 2.5" in text


@pytest.mark.usefixtures("undrawn")
def test_runs_with_other_scores_have_both_names(made: Make, tmp_path: Path) -> None:
    other = [{"step": step, "loss": 1.0, "r2": 0.5} for step in range(1, 4)]
    assert main([str(made("one")), str(made("two", other)), "--out", str(tmp_path / "page.html")]) == 0
    assert "Accuracy or r2 by step" in titles(tmp_path / "page.html")


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_goes_on_is_drawn_as_far_as_it_is(made: Make) -> None:
    run = made(lines=LINES[:1], result={"status": "running", "step": 1})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert main([str(run)]) == 0
    assert "still running" in words(run / "report.html")
    assert "Loss by step" in titles(run / "report.html")


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_line(made: Make, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"status": "failed", "reason": "<b>no</b> data", "step": 0}
    run = made("<i>", lines=[], config=None, environment=None, result=result)
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "the run failed: &lt;b&gt;no&lt;/b&gt; data" in page
    assert "no lines yet" in page
    assert "<h1>&lt;i&gt;</h1>" in page
    assert titles(run / "report.html") == []
    assert capsys.readouterr().err.splitlines() == [
        "mpiml.report: <i>: the run failed: <b>no</b> data",
        "mpiml.report: <i>: no lines yet: metrics.jsonl is empty or not there, so there is no curve to draw",
    ]


@pytest.mark.usefixtures("undrawn")
def test_damaged_lines_and_settings_of_another_version_are_named(
    made: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(config=CONFIG + "warp = 9\n", environment={**ENVIRONMENT, "mpiml": "9.9"})
    file = run / "metrics.jsonl"
    file.write_text('{"step": []}\n' * 7 + file.read_text())
    assert main([str(run)]) == 0
    damaged, version = capsys.readouterr().err.splitlines()
    assert f"{file}, line 5, is damaged" in damaged
    assert damaged.endswith("; and 2 more lines")
    assert version.endswith("warp: no settings of this version; the run is of mpiml 9.9, and is drawn as far as known")
    assert "warp 9 \u2013" in words(run / "report.html")


def test_odd_names_are_drawn(made: Make) -> None:
    """Which matplotlib would take for mathematics, a curve to hide, or letters that it lacks."""
    names = ("$x^{$", "_hidden", "\u6f22\u5b57", "n" * 60, os.fsdecode(b"bad\xff"))
    runs = read_runs([made(name, LINES[:1]) for name in names])
    files = learned(runs, axes_of(runs))[0].files()
    for name in ("$x^{$", "./_hidden", "\u6f22\u5b57", "\u2026" + 27 * "n", "bad\ufffd"):
        assert f">{name}</text>" in files["loss-step.svg"].decode()
    assert files["loss-step.png"].startswith(b"\x89PNG")


def test_images_are_light_and_pages_as_the_screen_is(made: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(lines=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}], config=None, environment=None)
    assert main([str(run), "--images"]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n{run}/report-figures/\n"
    page, images = (run / "report.html").read_text(), run / "report-figures"
    assert sorted(file.name for file in images.iterdir()) == ["loss-step.png", "loss-step.svg"]
    svg, (drawn,) = (images / "loss-step.svg").read_text(), re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert "#0072b2" in svg
    assert "Loss by step" in svg
    assert "var(--blue)" in drawn
    assert not re.search(r"#[0-9a-f]{6}", drawn)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 78, "the following arguments are required: RUN"),
        (["nowhere"], 78, "nowhere: there is no such directory"),
        (["."], 78, ".: holds no run; runs in it: run"),
        (["run", "--out", "page.pdf"], 78, "--out page.pdf: must end with .html"),
        (["run", "--out", "no/where.html"], 74, "cannot write no/where.html: No such file or directory"),
        (["run", "--out", "taken.html"], 74, "cannot write taken.html: Is a directory"),
        (["run", "--images", "--out", "file.html"], 74, "cannot create file-figures: File exists"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_done_is_one_line(
    made: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    made("run")
    (tmp_path / "taken.html").mkdir()
    (tmp_path / "file-figures").touch()
    assert main(arguments) == code
    assert capsys.readouterr().err == f"mpiml.report: {message}\n"


def test_without_matplotlib_the_line_says_what_to_install(
    made: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([str(made())]) == 78
    assert capsys.readouterr().err == "mpiml.report: figures need matplotlib: pip install 'mpiml[plots]'\n"


def test_a_damaged_result_is_one_line(made: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(result=RESULT | {"step": "last"})
    assert main([str(run)]) == 74
    assert f"{run}/result.json is damaged: step is 'last'" in capsys.readouterr().err
    (run / "result.json").write_text(json.dumps(RESULT))
    (run / "environment.json").write_text(json.dumps({"jobs": [{"ranks": 2}]}))
    assert main([str(run)]) == 74
    assert "environment.json, jobs, is damaged: it has no after" in capsys.readouterr().err
