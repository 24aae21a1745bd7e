"""Contract test 6: imports go down the floors of the house that mpiml/README.md draws; layers, data and all that is
planned beforehand know no MPI; and the start is thin."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mpiml"
PAGE = PACKAGE / "README.md"
# What works where MPI does not: on a login node, or in a program that starts MPI jobs.
NO_MPI = [
    *("mpiml.nn", "mpiml.data", "mpiml.flags", "mpiml.config", "mpiml.command"),
    *(f"mpiml.parallel.{name}" for name in ("tree", "slices", "halving", "schedules", "simulator")),
    *("mpiml.run.checkpoint", "mpiml.run.launcher"),
    *(
        f"mpiml.training.{name}"
        for name in ("task", "resolve", "model", "constants", "stages", "job", "device_memory", "saved", "export")
    ),
    *("mpiml.plan", "mpiml.compare", "mpiml.report", "mpiml.scaling", "mpiml.predict", "mpiml.export"),
]
JOBS = ("mpiml.scaling.timing", "mpiml.predict.calibration")  # which those start
TORCH = [  # need an extra, PyTorch: loaded only where it is
    *(f"mpiml.devices.{name}" for name in ("arithmetic", "cuda", "device", "fake", "modes")),
    *(
        f"mpiml.nn.torch_{name}"
        for name in (
            "buffers",
            "checks",
            "equivalents",
            "inputs",
            "losses",
            "modules",
            "names",
            "parts",
            "stack",
            "state",
            "tensors",
            "trial",
        )
    ),
    "mpiml.plan.torch_memory",
    *("mpiml.examples.torch_resnet", "mpiml.examples.own_loop_torch", "mpiml.examples.ddp_loop", "mpiml.export.onnx"),
    *(
        "mpiml.torch",
        *(f"mpiml.torch.{name}" for name in ("alike", "average", "buffers", "checkpoints", "data_parallel")),
    ),
    *(f"mpiml.torch.{name}" for name in ("exact", "flat", "joining", "keywords", "meetings", "outputs", "packed")),
    *("mpiml.torch.passes", "mpiml.torch.unchanged"),
]
JAX = "mpiml.examples.own_loop_jax"  # needs that extra
MEASURING = ("mpiml.plan", "mpiml.scaling", "mpiml.predict", "mpiml.bench")  # may load more than a rank that trains


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a file, or a part of it, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in FILES else str(node.module)


IMPORTS = {name: set(imported(ast.parse(path.read_text()))) for name, path in FILES.items()}


def room(name: str) -> str:
    """The room, or the loose module, that a module is in."""
    return name.split(".")[1] if "." in name else ""


ROOMS = sorted({room(name) for name in FILES} - {"", "__main__"})


def rests_on(one: str) -> set[str]:
    """The rooms and loose modules that a room imports; the package itself holds nothing but its version."""
    modules = set().union(*(IMPORTS[name] for name in FILES if room(name) == one))
    return {room(module) for module in modules if module.startswith("mpiml.")} - {one}


def drawn() -> dict[str, tuple[int, set[str]]]:
    """The house as the page draws it: of each room or loose module the floor, and what it rests on."""
    house: dict[str, tuple[int, set[str]]] = {}
    floor = 0
    for line in PAGE.read_text().splitlines():
        if match := re.fullmatch(r" {0,2}(\d)? +(\w+)/? +-> (.*)", line):
            floor = int(match[1] or floor)
            house[match[2]] = floor, set(match[3].replace("-", "").split())
    return house


HOUSE = drawn()


def inside(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def of(*rooms: str) -> list[str]:
    return [name for name in FILES if inside(name, *rooms)]


def everything_below(name: str) -> set[str]:
    """All that is imported with a module, directly or not, the rooms' __init__ included."""
    everything, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module not in everything:
            everything.add(module)
            todo += IMPORTS.get(module, ())
            todo += [module.rpartition(".")[0]] if "." in module else []
    return everything


def test_every_room_is_drawn() -> None:
    assert sorted(HOUSE) == ROOMS
    assert max(floor for floor, _ in HOUSE.values()) <= 7


@pytest.mark.parametrize("one", ROOMS)
def test_the_drawing_shows_what_a_room_imports(one: str) -> None:
    assert HOUSE[one][1] == rests_on(one)


def test_only_examples_use_the_public_face() -> None:
    """The package itself imports the modules that it needs."""
    assert [one for one in ROOMS if "api" in rests_on(one)] == ["examples"]


@pytest.mark.parametrize("one", ROOMS)
def test_imports_go_down(one: str) -> None:
    assert {below for below in rests_on(one) if HOUSE[below][0] >= HOUSE[one][0]} == set()


def test_the_house_stays_easy_to_oversee() -> None:
    """Few loose modules, and no room that holds a fifth of the code."""
    assert len([one for one in ROOMS if (PACKAGE / f"{one}.py").is_file()]) <= 14
    lines = {
        one: sum(len(FILES[name].read_text().splitlines()) for name in FILES if room(name) == one) for one in ROOMS
    }
    assert {one for one, count in lines.items() if count > 0.2 * sum(lines.values())} == set()


@pytest.mark.parametrize("name", [name for name in of(*NO_MPI) if name not in JOBS])
def test_no_mpi(name: str) -> None:
    """Nor through what they import: a job that inherits an initialised MPI would not start."""
    assert {module for module in everything_below(name) if inside(module, "mpi4py")} == set()


def at_start(path: Path) -> set[str]:
    """What a file imports when it is itself imported: outside functions, and not for type checkers only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            node.body = []
    return set(imported(tree))


def loaded_with(name: str) -> set[str]:
    """The modules of the package that are loaded with one."""
    loaded, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module in FILES and module not in loaded:
            loaded.add(module)
            todo += at_start(FILES[module])
    return loaded


def test_a_thousand_ranks_load_no_part_that_few_runs_use() -> None:
    """PyTorch's adapter, what --init needs, formats of files, and models other than the one that is trained."""
    rare = ["mpiml.nn.torch_modules", "mpiml.nn.export", "mpiml.nn.attention", "mpiml.nn.convolution"]
    rare += ["mpiml.training.init", "mpiml.training.init_plan", "mpiml.run.tensors", "mpiml.data.parquet"]
    rare += ["mpiml.run.tensorboard"]
    assert all(name in FILES for name in rare)
    assert loaded_with("mpiml.train") & set(rare) == set()


@pytest.mark.parametrize("name", [name for name in FILES if not inside(name, *MEASURING)])
def test_a_thousand_ranks_load_little(name: str) -> None:
    """NumPy and mpi4py at the start; everything else where it is used."""
    allowed = {
        *sys.stdlib_module_names,
        "numpy",
        "mpi4py",
        "mpiml",
        *(["torch"] if name in TORCH else []),
        *(["jax"] * (name == JAX)),
    }
    loaded = at_start(FILES[name])
    assert {module.split(".")[0] for module in loaded} <= allowed
    assert name in TORCH or loaded.isdisjoint(TORCH)
