"""Tables of either format: read once for inputs and labels, matched by the names of their columns, words as labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.delimited import CSV
from mpiml.data.formats import Options, open_files
from mpiml.data.parquet import Parquet
from mpiml.errors import DataError
from tests.data import samples
from tests.data.damage import refusal
from tests.data.samples import ARRAYS, FORMATS, OPTIONS, TABLES, rows, table, values_of


@pytest.mark.parametrize("name", TABLES)
def test_both_halves_of_a_table_are_read_at_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    kind = CSV if name == "csv" else Parquet
    read = kind.read
    monkeypatch.setattr(kind, "read", lambda self, rows: reads.append(len(rows)) or read(self, rows))
    data = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS)
    for held in (np.arange(5), np.arange(3, 9)):
        data.train.x.hold(held)
        data.train.y.hold(held)
        assert not data.train.x.table._left  # nothing is kept twice
    assert reads == [5, 6]
    data.train.x.hold(np.arange(5))
    data.train.y.hold(np.arange(3, 9))
    np.testing.assert_array_equal(data.train.y.rows(np.arange(3, 9)), ARRAYS["y_train"][3:9])


def test_words_are_those_of_both_files(tmp_path: Path) -> None:
    data = table(tmp_path, "y,a\ndog,1\n", "a,y\n2,cat\n3,dog\n")
    assert data.words == ("cat", "dog")
    assert values_of(data) == ([[1]], [1])
    data.test.y.hold(np.arange(2))
    assert data.test.y.rows(np.arange(2)).tolist() == [0, 1]
    assert table(tmp_path, "a,y\n1,True\n2,False\n").words == ("False", "True")


@pytest.mark.parametrize("name", TABLES)
def test_a_trained_model_knows_words_and_columns(tmp_path: Path, name: str) -> None:
    trained = Options(label="kind", columns=("c1", "c0"), words=("z", "b", "a"))
    columns = {"kind": ["a", "b", "z"], "more": ["x", "y", "z"], "c0": [1, 2, 3], "c1": [4, 5, 6]}
    if name == "csv":
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        text = "\n".join(lines) + "\n"
        for which in ("train", "test"):
            (tmp_path / f"{which}.csv").write_text(text)
        (tmp_path / "test.csv").write_text(text.replace("a,x", "cow,x"))
    else:
        for which in ("train", "test"):
            rows(**columns | ({"kind": ["cow", "b", "z"]} if which == "test" else {}))(tmp_path / f"{which}.parquet")
    data = open_dataset(str(tmp_path), trained)
    assert values_of(data) == ([[4, 1], [5, 2], [6, 3]], [2, 1, 0])
    with pytest.raises(DataError, match=r"test.*(line 2|row 0): the label 'cow' is none of .* known: z, b, a$"):
        data.test.y.hold(np.arange(3))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("words", [(), ("a", "b")])
def test_a_column_of_labels_without_any_is_left_out_where_rows_are_predicted(
    tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    def opened(*labels: str | None) -> Dataset:
        if name == "csv":
            text = "".join(f"{row},{label or ''}\n" for row, label in enumerate(labels))
            (tmp_path / "new.csv").write_text(f"a,y\n{text}")
        else:
            rows(a=np.arange(len(labels)), y=labels)(tmp_path / "new.parquet")
        return open_dataset(
            str(tmp_path / f"new.{name}"), Options(label="y", columns=("a",), words=words, tests_only=True)
        )

    assert not opened(None, None).test.labelled
    assert opened(*words or ("0", "1")).test.labelled
    with pytest.raises(DataError, match=r"there is no label in column y|the label 'b' is not"):
        opened(None, "b").test.y.hold(np.arange(2))


def test_a_gap_in_rows_to_predict(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,y\n1,0\n,1\n")
    data = open_dataset(str(tmp_path), Options(label="y", columns=("a",), tests_only=True))
    with pytest.raises(DataError, match="line 3: there is no value in column a: the run was trained without --fill; "):
        data.test.x.hold(np.arange(2))


def test_labels_in_the_file_to_test_on_alone_are_named(tmp_path: Path) -> None:
    data = table(tmp_path, "a,y\n1,<=50K\n2,>50K\n", "a,y\n3,<=50K.\n4,>50K\n")
    assert [note.partition(": ")[2] for note in data.notes] == [
        f"warning: {tmp_path}/train.csv has no such labels: <=50K."
    ]
    assert not table(tmp_path, "a,y\n1,cat\n2,dog\n", "a,y\n3,cat\n").notes


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("train", "test"), [([1, 2.5], [3, 4]), ([1, 2], [3, 4.5]), ([1.5, 2], [3, 4])])
def test_labels_of_a_regression_may_be_integers_in_part(tmp_path: Path, name: str, train: list, test: list) -> None:
    for which, labels in (("train", train), ("test", test)):
        if name == "csv":
            (tmp_path / f"{which}.csv").write_text("a,y\n" + "".join(f"0,{label}\n" for label in labels))
        else:
            rows(a=[0, 0], y=labels)(tmp_path / f"{which}.parquet")
    data = open_dataset(str(tmp_path), Options(label="y", values=True))
    assert (values_of(data)[1], data.classification) == (train, False)
    data.test.y.hold(np.arange(2))
    assert data.test.y.rows(np.arange(2)).tolist() == test


def test_labels_that_are_all_integers_stay_integers(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,y\n1,2\n3,4\n")
    assert open_dataset(str(tmp_path), Options(label="y", values=True)).train.y.dtype.kind == "i"


def test_files_of_a_directory_that_are_not_used_are_named(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.csv").write_text("a,y\n1,0\n2,1\n")
    data = open_dataset(str(tmp_path), Options(label="y"))
    assert data.notes == [f"{tmp_path}: not used: valid.csv; to test on a file, call it test.csv"]
    with pytest.raises(DataError, match=r"has no test.csv; to test on another file, name it: --data .*train.csv"):
        open_dataset(str(tmp_path), Options(label="y", tests_only=True))


def test_columns_are_left_out(tmp_path: Path) -> None:
    text = ',Id,Name,y,a\n0,x7,"Smith, ""Al""",1,5\n1,x8,,0,6\n'
    data = table(
        tmp_path,
        text,
        text.replace(",Name", "").replace(',"Smith, ""Al"""', "").replace("x8,,", "x8,"),
        drop_columns=("Id", "Name", "column 1"),
    )
    assert values_of(data) == ([[5], [6]], [1, 0])
    assert data.names == ("a",)


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("a,y\n1,cat\n", "test.csv has no column b; there are a, y"),
        ("a,b\n1,2\n", "test.csv has no column y; there are a, b; without this file, --held-out"),
        ("c,b,y,a\n1,2,cat,3\n", "test.csv has columns that "),
        ("a,b,y\n1,2,3\n", "labels are words in "),
        ("a,b,y\n1,2,\n", "test.csv, line 2: there is no label in column y"),
        ("a,a,b,y\n1,1,2,cat\n", "test.csv has 2 columns a"),
    ],
)
def test_a_test_file_that_is_another_table(tmp_path: Path, test: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        table(tmp_path, "a,b,y\n1,2,cat\n3,4,dog\n", test)


def test_a_single_file_has_training_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "Iris.CSV"
    path.write_text("a,y\n1,cat\n2,dog\n")
    sources = open_files(str(path), Options(label="y")).sources
    assert {name: len(source) for name, source in sources.items()} == {"x_train": 2, "y_train": 2}
    path.rename(tmp_path / "train.csv")
    assert open_files(str(tmp_path), Options(label="y")).files == [tmp_path / "train.csv"]


@pytest.mark.parametrize("write", [samples.csv, samples.parquet])
def test_label_column_must_be_said(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert "with --label; there are " in refusal(write(tmp_path), Options())
