"""Records of a CSV file are the same wherever reading begins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data import records
from mpiml.data.records import Records


@pytest.mark.parametrize("quoted", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_records_are_those_that_are_read_from_the_start(
    tmp_path: Path, monkeypatch: Any, chunk: int, quoted: bool
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    monkeypatch.setattr(records, "NEAR", 2)
    fields = ['"one\ntwo"', "1", '"say ""no"""', '"\n\n,"'] if quoted else ["1", "2", "", "34567"]
    picked = np.random.default_rng(0).choice(fields, (60, 3))
    lines = [",".join(row) + "\n" for row in picked.tolist()]
    path = tmp_path / "d.csv"
    path.write_text("a,b,c\n" + "".join(lines) + "\n")
    made = Records(path, ",")
    assert (made.count, made.multiline) == (61, quoted)
    firsts = np.cumsum([2, *(line.count("\n") for line in lines)]).tolist()
    expected = list(zip(firsts, (line.encode() for line in lines), strict=False))
    for rows in (np.arange(60), np.array([59]), np.array([0, 1, 30, 31, 32, 58]), np.arange(3, 60, 11), np.arange(0)):
        assert list(made.of(rows)) == [expected[row] for row in rows]


def test_what_lies_before_is_not_read(tmp_path: Path) -> None:
    path, content = tmp_path / "d.csv", b"a,b\n" + b"1,2\n" * 1_000_000
    path.write_bytes(content)
    made = Records(path, ",")
    path.write_bytes(bytes(2 * records.CHUNK) + content[2 * records.CHUNK :])
    assert list(made.of(np.array([999_999]))) == [(1_000_001, b"1,2\n")]
