"""Contract test 6: imports point downwards only, layers and data know no MPI, and the start is thin."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mpiml"
GROUND = {
    f"mpiml.{name}" for name in ("errors", "clock", "random", "partition", "vectors", "waiting", "imports", "documents")
}
ROOMS = ("nn", "data", "parallel", "run")
PURE = [f"mpiml.parallel.{name}" for name in ("tree", "slices", "schedules", "simulator", "split")]
TOP = ("mpiml.train", "mpiml.study", "mpiml.examples")
TORCH = ("mpiml.nn.torch_modules", "mpiml.examples.torch_resnet")  # stand for an extra: loaded where PyTorch is
PLANNED = ("mpiml.config", "mpiml.design", "mpiml.plan", "mpiml.export")  # what works where MPI does not
FORWARDERS = {"mpiml.bench", "mpiml.__main__", "mpiml.evaluate", "mpiml.scaling", "mpiml.plan", "mpiml.doctor"}


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


def ours(name: str) -> set[str]:
    """What a module imports of this package; the package itself holds nothing but its version."""
    return {module for module in IMPORTS[name] if module.startswith("mpiml.")}


def inside(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def everything_below(name: str) -> set[str]:
    """All that is imported with a module, directly or not, the rooms' __init__ included."""
    found, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += IMPORTS.get(module, ())
            todo += [module.rpartition(".")[0]] if "." in module else []
    return found


def of(*rooms: str) -> list[str]:
    return [name for name in FILES if inside(name, *rooms)]


def test_no_file_imports_a_command() -> None:
    """Which only hands on, but for what has to work before MPI starts."""
    assert not {name: ours(name) & FORWARDERS for name in FILES if ours(name) & FORWARDERS}


def test_the_house_is_where_it_should_be() -> None:
    assert set(FILES) >= GROUND | {*PURE, "mpiml.train", "mpiml.config"}
    assert all(of(f"mpiml.{room}") for room in ROOMS)


@pytest.mark.parametrize("name", sorted(GROUND))
def test_ground_floor_rests_on_itself(name: str) -> None:
    assert ours(name) <= GROUND


@pytest.mark.parametrize("name", of(*(f"mpiml.{room}" for room in ROOMS)))
def test_rooms_know_only_themselves_and_the_ground_floor(name: str) -> None:
    room = ".".join(name.split(".")[:2])
    assert {module for module in ours(name) - GROUND if not inside(module, room)} == set()


@pytest.mark.parametrize("name", [*of("mpiml.nn", "mpiml.data"), *PURE, *PLANNED])
def test_no_mpi_in_pure_modules(name: str) -> None:
    """Nor through what they import: --help and all that is planned beforehand work where MPI does not."""
    assert {module for module in everything_below(name) if inside(module, "mpi4py")} == set()


@pytest.mark.parametrize("name", [n for n in FILES if not inside(n, "mpiml.study", "mpiml.examples", *FORWARDERS)])
def test_nobody_imports_the_programs(name: str) -> None:
    assert {module for module in ours(name) if inside(module, *TOP)} == set()


def test_forwarders_are_thin() -> None:
    for name in FORWARDERS & set(FILES):
        assert len(FILES[name].read_text().splitlines()) <= 60, name


def at_start(path: Path) -> set[str]:
    """What a file imports when it is itself imported: outside functions, and not for type checkers only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            node.body = []
    return set(imported(tree))


@pytest.mark.parametrize("name", [name for name in FILES if not inside(name, "mpiml.study")])
def test_a_thousand_ranks_load_little(name: str) -> None:
    """NumPy and mpi4py at the start; everything else where it is used."""
    allowed = {*sys.stdlib_module_names, "numpy", "mpi4py", "mpiml", *(["torch"] if name in TORCH else [])}
    found = at_start(FILES[name])
    assert {module.split(".")[0] for module in found} <= allowed
    assert found.isdisjoint(TORCH)
