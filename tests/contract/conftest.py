"""What contract tests share: the runs of the table of features and layouts."""

from __future__ import annotations

import pytest

from tests.contract.table import Table


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Runs that are made once; on so many ranks, all at once that are to be tested in this session."""
    wanted: dict[tuple[str, str], None] = {}
    for item in request.session.items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if {"layout", "feature"} <= set(parameters):
            wanted[parameters["layout"], parameters["feature"]] = None
    return Table(tmp_path_factory.mktemp("table"), wanted)
