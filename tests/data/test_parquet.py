"""Parquet files: words as labels, gaps, and bad files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import open_dataset
from mpiml.data.formats import Options
from mpiml.data.parquet import Parquet
from tests.data import samples
from tests.data.damage import cut, of_text, refusal, rewrite
from tests.data.samples import OPTIONS, parquet, rows


def test_row_groups_of_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    columns_of = Parquet._columns
    monkeypatch.setattr(Parquet, "_columns", lambda self, g, *more: read.append(g) or columns_of(self, g, *more))
    open_dataset(str(parquet(tmp_path)), OPTIONS).train.x.hold(np.array([9, 10, 17]))
    assert read == [2, 4]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "bool"])
def test_words_in_parquet(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa

    words = [True, False, True, True] if kind == "bool" else ["dog", "cat", "dog", "dog"]
    types = {"bool": pa.bool_(), "string": pa.string(), "large_string": pa.large_string()}
    labels = pa.array(words).dictionary_encode() if kind == "dictionary" else pa.array(words, types[kind])
    for which in ("train", "test"):
        rows(a=[1, None, 3, 4], t=["x"] * 4, b=[True, None, False, True], kind=labels)(tmp_path / f"{which}.parquet")
    data = open_dataset(str(tmp_path), Options(label="kind", drop_columns=("t",), gaps=True))
    assert data.words == (("false", "true") if kind == "bool" else ("cat", "dog"))
    assert data.names == ("a", "b")
    data.train.y.hold(np.arange(4))
    assert data.train.y.rows(np.arange(4)).tolist() == [1, 0, 1, 1]
    data.train.x.hold(np.arange(4))
    np.testing.assert_array_equal(data.train.x.rows(np.arange(4)), [[1, 1], [np.nan, np.nan], [3, 0], [4, 1]])


def damaged_group(path: Path) -> None:
    rows(a=np.arange(10) * 1.5, kind=[1] * 10)(path)
    rewrite(path, lambda raw: raw[:300] + bytes(60) + raw[360:])


PARQUET: dict[str, tuple[Callable[[Path], None], str]] = {
    "no Parquet": (of_text("a,kind\n1,2\n"), "cannot read"),
    "empty": (of_text(""), "cannot read"),
    "truncated": (cut(-20), "cannot read"),
    "missing": (Path.unlink, "train.parquet: No such file"),
    "no rows": (rows(a=np.zeros(0), kind=np.zeros(0, int)), "x_train has no rows"),
    "no value": (rows(a=[1.0, 2.0, 3.0, 4.0, None], kind=[1] * 5), "row 4: there is no value in column a: --fill mean"),
    "no label": (rows(a=[1.0] * 5, kind=[1, 2, None, None, 0]), "row 2: there is no label in column kind"),
    "labels empty": (rows(a=[1.0] * 2, kind=["", "NA"]), "train.parquet: there is no label in any row"),
    "label null": (rows(a=[1.0] * 5, kind=["b", "b", "b", "b", None]), "row 4: there is no label in column kind"),
    "lists as labels": (rows(a=[1, 2], kind=[[1], [2]]), "labels in column kind are list<"),
    "words": (
        rows(a=["cat", "dog"], kind=[0, 1]),
        "column a is string; inputs must be numbers: --drop-columns a leaves it out",
    ),
    "lists": (rows(a=[[1, 2], [3]], kind=[0, 1]), "column a is list<"),
    "dates": (rows(a=np.zeros(2, "M8[s]"), kind=[0, 1]), "column a is timestamp"),
    "no column of labels": (rows(a=[1], b=[2]), "has no column kind; there are a, b"),
    "labels alone": (rows(kind=[1]), "has labels and nothing else"),
    "nan": (rows(a=[1.0] * 5 + [np.nan], kind=[1] * 6), "row 5: there is no value in column a"),
    "negative label": (
        rows(a=[1.0] * 5, kind=[1, 1, 1, 1, -3]),
        "labels: label -3 is below 0",
    ),
    "damaged": (damaged_group, "damaged in row group"),
}


@pytest.mark.parametrize("what", PARQUET)
def test_a_bad_parquet_file_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    damage, words = PARQUET[what]
    damage(samples.parquet(tmp_path) / "train.parquet")
    if what not in ("no Parquet", "empty", "truncated", "missing"):
        rows(a=[1.0], kind=["b"] if what == "label null" else [""] if what == "labels empty" else [1])(
            tmp_path / "test.parquet"
        )
    message = refusal(tmp_path)
    assert words in message
    assert "train.parquet" in message or "x_train" in message
