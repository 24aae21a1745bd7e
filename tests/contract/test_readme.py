"""Every command, picture, link, name and piece of Python on a page of documentation does what the page says."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpiml.bench.__main__ import main as bench
from mpiml.parallel.schedules import SCHEDULES
from mpiml.plan.drawing import draw
from tests.conftest import mpirun

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "jobs/README.md", *sorted((ROOT / "mpiml").rglob("*.md"))]
FILE = re.compile(r"# (\w+\.py)\n")  # begins a piece of Python that other blocks import, or run
# A block with this word needs that package, which takes minutes to install.
EXTRAS = {"mynet": "torch", "mpiml.torch": "torch", "_loop": "torch"}
PATH = re.compile(r"[\w./-]+\.(py|sh|sbatch|def)|(\.?[\w-]+/)+([\w.-]+\.\w+)?")
OTHERS = {"checkpoints/", "ranks/", "runs/", "tensorboard/", "mine.py"}  # on pages: of a run, and of the reader

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path) -> list[tuple[str, str]]:
    """The code on a page: language and text of each block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """What is on a page besides blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def inline(page: Path) -> list[str]:
    """The code in its sentences and tables."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def files() -> dict[str, str]:
    """The files that pages tell the reader to make: two pages that have one of the same name have the same."""
    made: dict[str, str] = {}
    for page in PAGES:
        for language, text in blocks(page):
            if language == "python" and (named := FILE.match(text)):
                assert made.setdefault(named[1], text) == text, f"{named[1]} is another one in {page}"
    return made


def shell(text: str, cwd: Path) -> None:
    """Run the lines of a block with this Python, and the mpirun beside it, first on the PATH."""
    path = f"{Path(sys.executable).parent}:{Path(mpirun(1)[0]).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", text],
        check=False,
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def run(page: Path, cwd: Path) -> None:
    """Run the blocks of a page, in their order, but for those that run make or need a package that is not there."""
    for name, text in files().items():
        (cwd / name).write_text(text)
    for language, text in blocks(page):
        if any(word in text and not importlib.util.find_spec(package) for word, package in EXTRAS.items()):
            continue
        if language == "python" and not FILE.match(text):
            (cwd / "page.py").write_text(text)
            shell("python page.py", cwd)
        elif language == "sh" and not re.search(r"^make ", text, re.MULTILINE):
            shell(text, cwd)


@each_page
def test_code_runs(page: Path, tmp_path: Path) -> None:
    assert {language for language, _ in blocks(page)} <= {"sh", "python", "text"}
    run(page, tmp_path)
    if page == ROOT / "README.md":
        check_layouts(tmp_path / "runs")
    if page == ROOT / "mpiml/run/README.md":
        check_fields(page, tmp_path / "runs/mine")


def check_layouts(runs: Path) -> None:
    """The two runs with equal micro-batches had equal weights, and one of them went on."""
    two, four = (load_file(runs / name / "checkpoints/step-000000100.safetensors") for name in ("two", "four"))
    assert two.keys() == four.keys()
    assert all(np.array_equal(two[name], four[name]) for name in two)
    assert json.loads((runs / "two/result.json").read_text())["step"] == 200


def check_fields(page: Path, directory: Path) -> None:
    """The page names all files and all fields that a run writes."""
    named = set(re.findall(r"[\w.]+", " ".join(inline(page))))
    assert {path.name for path in directory.iterdir() if not path.name.startswith(".")} <= named
    table = re.findall(r"^\|([^|]+)\|", page.read_text().split("\n## ")[1], re.MULTILINE)
    assert set(json.loads((directory / "result.json").read_text())) <= set(re.findall(r"`(\w+)`", "".join(table)))
    example = next(text for language, text in blocks(page) if language == "text")
    for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
        assert line.keys() - {"evaluation"} <= set(re.findall(r'"(\w+)":', example))
        assert line.get("evaluation", {}).keys() <= named
        assert line.get("seconds", {}).keys() <= named


@each_page
def test_make_targets_exist(page: Path) -> None:
    commands = "\n".join([*(text for _, text in blocks(page)), *inline(page)])
    for target in set(re.findall(r"^make ([a-z][\w-]*)", commands, re.MULTILINE)):
        done = subprocess.run(["make", "-n", target], check=False, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for path, heading in links(page):
        assert path.is_relative_to(ROOT), path
        assert path.exists(), path
        assert not heading or heading in headings(path), f"{path}#{heading}"


def links(page: Path) -> set[tuple[Path, str]]:
    """The files that a page links, and the heading in each, if any."""
    targets = (target.partition("#") for target in re.findall(r"\]\(([^)]+)\)", prose(page)))
    return {((page.parent / path).resolve() if path else page, heading) for path, _, heading in targets}


def headings(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    texts = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in texts}


def test_every_page_is_linked_from_the_first() -> None:
    assert set(PAGES) - {ROOT / "README.md"} <= {path for path, _ in links(ROOT / "README.md")}


@each_page
def test_paths_exist(page: Path) -> None:
    """Files and directories of the source tree, from its top or from the page's directory."""
    for path in named_paths(page):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


def named_paths(page: Path) -> Iterator[str]:
    yield from (text for text in inline(page) if PATH.fullmatch(text) and text not in OTHERS | {*files()})
    for text in [*inline(page), *(text for _, text in blocks(page))]:
        yield from re.findall(r"(?<![\w/])(?:jobs|mpiml|tests)/[\w./-]+", text)


@each_page
def test_modules_exist(page: Path) -> None:
    for name in set(re.findall(r"\b(?:mpiml|tests)(?!\.(?:def|sif)\b)(?:\.[a-z]\w*)+\b", page.read_text())):
        needed = [package for word, package in EXTRAS.items() if name.startswith(word)]
        if all(importlib.util.find_spec(package) for package in needed):
            assert resolves(name), name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parent, _, last = name.rpartition(".")
    try:
        return importlib.util.find_spec(name) is not None or hasattr(importlib.import_module(parent), last)
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(parent), last)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_the_pictures_are_the_plans(name: str) -> None:
    assert draw(SCHEDULES[name], 4, 6) + "\n" in [text for _, text in blocks(ROOT / "mpiml/plan/README.md")]


def test_exit_codes_are_the_programs() -> None:
    from mpiml import errors

    page = (ROOT / "mpiml/run/README.md").read_text()
    written = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RunError)]
    assert written == {0, errors.SAVED} | {kind.exit_code for kind in kinds}


def test_the_benchmarks_table_is_that_of_its_run_and_of_todays_marks(capsys: pytest.CaptureFixture[str]) -> None:
    room = ROOT / "mpiml/bench"
    assert bench(["--table", str(room / "bench.json")]) == 0
    printed = capsys.readouterr().out
    assert f"\n{printed}\n" in (room / "README.md").read_text()
    assert "not measured" not in printed
