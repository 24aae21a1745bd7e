"""A fixed sample of the campaign: some trials of each part, the same ones each time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.campaign import Figures, run, space
from tests.chaos.parts import PARTS
from tests.chaos.runs import Lab

pytestmark = pytest.mark.contract

SEED = 1
LIMIT = 60.0  # seconds of a part, after which no trial begins


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("part", PARTS)
def test_sample_survives(part: str, lab: Lab, tmp_path: Path) -> None:
    figures, trials = Figures(), PARTS[part].sample
    run(part, itertools.islice(space(part, PARTS[part].cases, lab, SEED), trials), figures, tmp_path, LIMIT)
    assert sum(row.tried for row in figures.rows.values()) >= trials
    assert not figures.own, "\n".join(map(str, figures.own))
