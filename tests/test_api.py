"""The public face: every name that a user's program needs, each imported when it is first used."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpiml import api, errors
from mpiml.nn import layers

NAMES = [name for name in dir(api) if name != "load_into" or importlib.util.find_spec("torch")]


def fresh(program: str) -> str:
    """What a program prints in a Python that has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(line: str) -> set[str]:
    """The slow and the side-effecting of the modules that a line of Python loads."""
    watched = ("numpy", "mpi4py", "mpi4py.MPI", "torch", "mpiml.train", "mpiml.nn", "mpiml.flags")
    return set(fresh(f"{line}\nimport sys\nprint(*(set(sys.modules) & set({watched})))").split())


def test_nothing_is_imported_before_it_is_used() -> None:
    assert loaded_after("import mpiml.api") == set()
    assert loaded_after("import mpiml.api; dir(mpiml.api); mpiml.api.__all__") == set()
    assert loaded_after("from mpiml.api import RunError") == set()
    assert loaded_after("from mpiml.api import GELU, Dataset, trained") == {"numpy", "mpiml.nn", "mpiml.flags"}
    assert loaded_after("import mpiml.api; mpiml.api.train") >= {"numpy", "mpi4py.MPI", "mpiml.train"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_its_module(name: str) -> None:
    assert getattr(api, name) is getattr(importlib.import_module(api.MODULES[name]), name)


def test_each_name_can_be_imported_from_here() -> None:
    program = "".join(f"from mpiml.api import {name}\n" for name in NAMES)
    assert fresh(program + "print(train)").startswith("<function train at")


def test_train_is_the_function_where_the_module_is_loaded_as_well() -> None:
    program = "import mpiml.api, mpiml.train, mpiml.evaluate\nprint(mpiml.api.train, mpiml.api.evaluate)"
    assert re.fullmatch("<function train at .*> <function evaluate at .*>", fresh(program))


def test_a_star_imports_all_that_needs_no_extra() -> None:
    program = "from mpiml.api import *\nimport sys\nprint('torch' in sys.modules, *sorted(set(dir()) - {'sys'}))"
    torch, *names = (name for name in fresh(program).split() if not name.startswith("__"))
    assert torch == "False"
    assert names == sorted(set(dir(api)) - {"load_into"})


def test_type_checkers_and_python_see_the_same_names() -> None:
    """Each import for type checkers is a line that the table of names is made of."""
    tree = ast.parse(Path(api.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    stated = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        stated |= {alias.asname or alias.name: node.module for alias in node.names}
    assert stated == api.MODULES


def test_an_unknown_name_is_refused_with_a_guess() -> None:
    with pytest.raises(AttributeError, match=r"'mpiml.api' has no attribute 'Linaer' \(did you mean Linear\?\)$"):
        api.Linaer  # noqa: B018
    with pytest.raises(ImportError, match=r"cannot import name 'xyz' from 'mpiml.api'"):
        exec("from mpiml.api import xyz")


def test_no_layer_or_error_is_missing() -> None:
    kinds = [value for value in vars(layers).values() if isinstance(value, type) and issubclass(value, layers.Layer)]
    kinds += [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(kinds) > 25
    assert {kind.__name__ for kind in kinds} <= set(dir(api))
