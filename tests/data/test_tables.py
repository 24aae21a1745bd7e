"""Tables, CSV and Parquet: as others write them, read once for inputs and labels; and bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpiml.data import tables
from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import Options
from tests.data import samples
from tests.data.damage import cut, of_text, refusal, rewrite
from tests.data.samples import ARRAYS, FORMATS, OPTIONS, TABLES, parquet


@pytest.mark.parametrize("name", TABLES)
def test_both_halves_of_a_table_are_read_at_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    kind = tables.CSV if name == "csv" else tables.Parquet
    read = kind.read
    monkeypatch.setattr(kind, "read", lambda self, rows: reads.append(len(rows)) or read(self, rows))
    data = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS)
    for rows in (np.arange(5), np.arange(3, 9)):
        data.train.x.hold(rows)
        data.train.y.hold(rows)
        assert not data.train.x.table._left  # nothing is kept twice
    assert reads == [5, 6]
    data.train.x.hold(np.arange(5))
    data.train.y.hold(np.arange(3, 9))
    np.testing.assert_array_equal(data.train.y.rows(np.arange(3, 9)), ARRAYS["y_train"][3:9])


def test_row_groups_of_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    columns_of = tables.Parquet._columns
    monkeypatch.setattr(tables.Parquet, "_columns", lambda self, g, at: read.append(g) or columns_of(self, g, at))
    open_dataset(str(parquet(tmp_path)), OPTIONS).train.x.hold(np.array([9, 10, 17]))
    assert read == [2, 4]


def table(tmp_path: Path, text: str, label: str = "y") -> Dataset:
    for which in ("train", "test"):
        (tmp_path / f"{which}.csv").write_bytes(text.encode())
    return open_dataset(str(tmp_path), Options(label=label))


@pytest.mark.parametrize(
    "text",
    [
        "a,y\n1.5,2\n-3e2,0\n",
        "a,y\n1.5,2\n-3e2,0",
        "a,y\r\n1.5,2\r\n-3e2,0\r\n",
        "\ufeffa,y\n1.5,2\n-3e2,0\n",
        '"a","y"\n"1.5",2\n-3e2,"0"\n',
        " a , y \n 1.5 , 2 \n -3e2, 0\n",
    ],
    ids=["plain", "no last newline", "Windows", "byte order mark", "quotes", "spaces"],
)
def test_csv_as_others_write_it(tmp_path: Path, text: str) -> None:
    data = table(tmp_path, text)
    data.train.x.hold(np.arange(2))
    data.train.y.hold(np.arange(2))
    np.testing.assert_array_equal(data.train.x.rows(np.arange(2)), [[1.5], [-300]])
    assert data.classification
    np.testing.assert_array_equal(data.train.y.rows(np.arange(2)), [2, 0])


def test_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert len(table(tmp_path, "\ufeffy,a\n1,2\n").train) == 1


def test_first_label_says_what_is_learned(tmp_path: Path) -> None:
    assert not table(tmp_path, "a,y\n1,2.0\n2,3\n").classification
    assert table(tmp_path, "a,y\n1,-2\n2,3\n").classification


def test_a_csv_file_of_many_lines(tmp_path: Path) -> None:
    rows = 3 * 4096 + 5
    data = table(tmp_path, "a,y\n" + "".join(f"{i},{i % 7}\n" for i in range(rows)))
    assert len(data.train) == rows
    held = np.r_[5:7, 4000:9000, rows - 1]
    data.train.x.hold(held)
    np.testing.assert_array_equal(data.train.x.rows(held)[:, 0], held)


def line(number: int, text: str) -> Callable[[Path], None]:
    """Put another line in place of one of train.csv."""

    def change(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        path.write_bytes(
            b"".join(
                [
                    *(x.encode() for x in lines[: number - 1]),
                    text.encode("latin-1") + b"\n",
                    *(x.encode() for x in lines[number:]),
                ]
            )
        )

    return change


GOOD = "0,0,1,2,3,4,5,6,7,8,9,10,11"
CSV: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (of_text(""), "train.csv is empty"),
    "empty first line": (of_text("\n1,2\n"), "has no column kind"),
    "names alone": (of_text("a,kind\n"), "x_train has no rows"),
    "no label column": (line(1, "a,b,c"), "has no column kind; there are a, b, c"),
    "two label columns": (line(1, "a,kind,kind"), "has 2 columns kind"),
    "labels alone": (of_text("kind\n1\n"), "has labels and nothing else"),
    "value missing": (line(5, GOOD[2:]), "line 5: has 12 values, but there are 13 columns"),
    "value too many": (line(6, GOOD + ",7"), "line 6: has 14 values, but there are 13 columns"),
    "empty value": (line(7, GOOD.replace("5", "")), "line 7: could not convert string '' to float64"),
    "word": (line(24, GOOD.replace("5", "five")), "line 24: could not convert string 'five' to float64"),
    "empty line": (line(3, ""), "line 3: has 0 values"),
    "empty lines": (of_text("a,kind\n1,2.0\n\n\n"), "line 3: has 0 values"),
    "nothing but empty lines": (of_text("a,kind\n\n\n"), "line 2: has 0 values"),
    "comment": (line(3, "# no data"), "line 3: has 1 values"),
    "quote not closed": (line(4, GOOD.replace("5", '"5')), "line 4"),
    "not UTF-8": (line(4, "\xe9" + GOOD), "line 4: not in UTF-8"),
    "binary": (line(4, "\0\1\2"), "line 4"),
    "name not UTF-8": (line(1, "\xe9,kind"), "line 1: not in UTF-8"),
    "fraction as label": (line(9, GOOD.replace("1,2,3", "1.5,2,3")), "line 9: the label 1.5 is not an integer"),
    "nan as label": (line(9, GOOD.replace("1,2,3", "nan,2,3")), "line 9: the label nan is not an integer"),
    "word as label": (line(9, GOOD.replace("1,2,3", "cat,2,3")), "line 9: could not convert string 'cat'"),
    "nan": (line(9, GOOD.replace("9", "nan")), "1 rows hold values that are not finite, the first is row 7"),
    "infinite": (line(2, GOOD.replace("9", "1e999")), "1 rows hold values that are not finite, the first is row 0"),
    "negative label": (
        line(9, GOOD.replace("1,2,3", "-2,2,3")),
        "labels: label -2 is below 0",
    ),
    "cut": (cut(-8), "line 24: has"),
    "other columns": (of_text("kind,x\n1,2\n"), "has columns kind, x,"),
    "missing": (Path.unlink, "train.csv: No such file"),
}


@pytest.mark.filterwarnings("error")  # no words but ours
@pytest.mark.parametrize("what", CSV)
def test_a_bad_csv_file_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    damage, words = CSV[what]
    damage(samples.csv(tmp_path) / "train.csv")
    if what in ("names alone", "empty lines", "nothing but empty lines"):
        of_text("a,kind\n1,2\n" if what == "names alone" else "a,kind\n\n")(tmp_path / "test.csv")
    message = refusal(tmp_path)
    assert words in message
    assert "train.csv" in message or "x_train" in message


@pytest.mark.parametrize("write", [samples.csv, samples.parquet])
def test_label_column_must_be_said(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert "with --label; there are " in refusal(write(tmp_path), Options())


def rows(**columns: object) -> Callable[[Path], None]:
    """Put another table in place of a Parquet file."""

    def write(path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet as pq

        pq.write_table(pa.table(columns), path, row_group_size=3, compression="none", write_page_checksum=True)

    return write


def damaged_group(path: Path) -> None:
    rows(a=np.arange(10) * 1.5, kind=[1] * 10)(path)
    rewrite(path, lambda raw: raw[:300] + bytes(60) + raw[360:])


PARQUET: dict[str, tuple[Callable[[Path], None], str]] = {
    "no Parquet": (of_text("a,kind\n1,2\n"), "cannot read"),
    "empty": (of_text(""), "cannot read"),
    "truncated": (cut(-20), "cannot read"),
    "missing": (Path.unlink, "train.parquet: No such file"),
    "no rows": (rows(a=np.zeros(0), kind=np.zeros(0, int)), "x_train has no rows"),
    "no value": (rows(a=[1.0, 2.0, 3.0, 4.0, None], kind=[1] * 5), "a has 1 rows without a value, first row 4"),
    "no label": (rows(a=[1.0] * 5, kind=[1, 2, None, None, 0]), "kind has 1 rows without a value, first row 2"),
    "words": (rows(a=["cat", "dog"], kind=[0, 1]), "column a is string; real numbers are needed"),
    "lists": (rows(a=[[1, 2], [3]], kind=[0, 1]), "column a is list<"),
    "dates": (rows(a=np.zeros(2, "M8[s]"), kind=[0, 1]), "column a is timestamp"),
    "no column of labels": (rows(a=[1], b=[2]), "has no column kind; there are a, b"),
    "labels alone": (rows(kind=[1]), "has labels and nothing else"),
    "nan": (rows(a=[1.0] * 5 + [np.nan], kind=[1] * 6), "1 rows hold values that are not finite, the first is row 5"),
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
        rows(a=[1.0], kind=[1])(tmp_path / "test.parquet")
    message = refusal(tmp_path)
    assert words in message
    assert "train.parquet" in message or "x_train" in message
