"""CSV files as others write them, and bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.errors import DataError
from tests.data import samples
from tests.data.damage import cut, of_text, refusal
from tests.data.samples import table, values_of


@pytest.mark.parametrize(
    "text",
    [
        "a,y\n1.5,2\n-3e2,0\n",
        "a,y\n1.5,2\n-3e2,0",
        "a,y\r\n1.5,2\r\n-3e2,0\r\n",
        "a,y\r\n1.5,2\r\n-3e2,0\r\n\r\n\n",
        "\ufeffa,y\n1.5,2\n-3e2,0\n",
        '"a","y"\n"1.5",2\n-3e2,"0"\n',
        " a , y \n 1.5 , 2 \n -3e2, 0\n",
    ],
    ids=["plain", "no last newline", "Windows", "empty lines at the end", "byte order mark", "quotes", "spaces"],
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


WORDS = {
    "semicolons": "a;b;y\n1;2.5;cat\n3;-4e1;ant\n",
    "tabs": "a\tb\ty\n1\t2.5\tcat\n3\t-4e1\tant\n",
    "bars": "a|b|y\n1|2.5|cat\n3|-4e1|ant\n",
    "decimal commas": "a;b;y\n1,0;2,5;cat\n3;-4e1;ant\n",
    "quotes": '"a";"b";"y"\r\n"1";"2.5";"cat"\r\n3 ; -4e1; "ant"\r\n',
    "commas in quotes": 'a,"b, c",y\n1,"2.5",cat\n3,-4e1,ant\n',
}


@pytest.mark.parametrize("name", WORDS)
def test_words_as_labels_are_classes(tmp_path: Path, name: str) -> None:
    data = table(tmp_path, WORDS[name])
    assert (data.words, data.classes, data.classification) == (("ant", "cat"), 2, True)
    assert data.names == ("a", "b, c" if name == "commas in quotes" else "b")
    assert values_of(data) == ([[1, 2.5], [3, -40]], [1, 0])


def test_a_comma_in_a_column_that_is_left_out_makes_no_decimal_commas(tmp_path: Path) -> None:
    data = table(tmp_path, "list;a;y\n1,5;2.5;0\n;3;1\n", drop_columns=("list",))
    assert values_of(data) == ([[2.5], [3]], [0, 1])


def test_a_field_in_quotes_may_hold_line_ends(tmp_path: Path) -> None:
    text = 't,a,y\n"one\ntwo",2,0\n"say ""no"", and",3,1\n"\n\n",4,2\nx,5,3\n'
    data = table(tmp_path, text, drop_columns=("t",))
    assert values_of(data) == ([[2], [3], [4], [5]], [0, 1, 2, 3])
    data.train.x.hold(np.array([1, 3]))
    assert data.train.x.rows(np.array([3, 1])).tolist() == [[5], [3]]
    bad = table(tmp_path, text.replace("5,3", "5"), drop_columns=("t",))
    with pytest.raises(DataError, match=r"line 8: has 2 values"):
        values_of(bad)


def test_gaps_are_nan_where_they_will_be_filled(tmp_path: Path) -> None:
    gaps = "".join(
        f"{i},{gap},{i % 2}\n" for i, gap in enumerate(("", " ", "NA", "nan", "NaN", "null", "?", "n/a", "7"))
    )
    x, y = values_of(table(tmp_path, f"a,b,y\n{gaps}", gaps=True))
    assert np.isnan([row[1] for row in x]).tolist() == [True] * 8 + [False]
    assert [row[0] for row in x] == list(range(9))
    assert y == [0, 1] * 4 + [0]


PEOPLE = 'Id,Name,"First, last",Age,y\n1,Al,x,30,1\n2,Bo,y,,0\n'
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "words": (
        PEOPLE,
        {},
        "train.csv: column Name holds 'Al', column First, last holds 'x'; inputs must be numbers: "
        "--drop-columns 'Name,\"First, last\"' leaves them out",
    ),
    "unknown column": (
        PEOPLE,
        {"drop_columns": ("Nam",)},
        "--drop-columns Nam: there is no such column; there are Id, N",
    ),
    "label dropped": (PEOPLE, {"drop_columns": ("y",)}, "--drop-columns y: that is the column of labels"),
    "all dropped": ("a,y\n1,2\n", {"drop_columns": ("a",)}, "has labels and nothing else"),
    "gap": ("a;y\n1;2\n?;1\n", {}, "line 3: there is no value in column a (?): --fill mean puts"),
    "gap as label": ("a;y\n1;2\n3;\n", {"gaps": True}, "line 3: there is no label in column y: leave such rows out"),
    "gap among words": ("a;y\n1;b\n3;NA\n", {"gaps": True}, "line 3: there is no label in column y (NA)"),
    "no label first": ("a;y\n1;\n3;2\n", {}, "line 2: there is no label in column y: leave such rows out"),
    "numbers as names": ("1,2.5,cat\n3,1.5,dog\n", {}, "no column y; there are 1, 2.5, cat (the first line must name"),
    "a comment first": ("# by hand\na,y\n1,2\n", {}, "there are # by hand (the first line must name the columns)"),
    "many columns of words": (
        ",".join(f"a{i}" for i in range(12)) + ",y\n" + "x," * 12 + "1\n",
        {},
        "column a9 holds 'x', and so do 2 others; inputs must be numbers: --drop-columns a0,",
    ),
    "a last line of words": (
        "a,y\n" + "1,0\n" * 20 + "sum,0\n",
        {},
        "line 22: column a holds 'sum', which is not a number; --drop-columns a leaves it out, or correct the line",
    ),
    "number, then word": ("a;y\n1;2\n3;cat\n", {}, "line 3: the label 'cat' is not a number, but the first is; if"),
    "mark not closed": ('a,y\n1,2\n"3,4\n5,6\n', {}, "line 3: a quotation mark is not closed"),
    "mark that joins lines": (
        'a,b,y\n1,2,0\n"3,4,1\n5",6\n',
        {},
        "3: has 2 values, but there are 3 columns (with quoted",
    ),
    "commas and points": (
        "a;y\n" + "1,5;0\n" * 20 + "2.5;0\n",
        {},
        "'2.5', which is not a number (numbers in this file",
    ),
    "underscore": ("a;y\n" + "1;0\n" * 20 + "1_000;0\n", {}, "column a holds '1_000', which is not a number"),
    "old line ends": ("a,y\r1,2\r", {}, "its lines end in a carriage return alone"),
    "spaces between": ("a y\n1 2\n", {}, "(columns are separated by one of: comma, semicolon, tab, |)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_table_cannot_be_is_one_line(tmp_path: Path, what: str) -> None:
    text, options, words = REFUSED[what]
    with pytest.raises(DataError) as error:
        values_of(table(tmp_path, text, **options))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


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
BAD_CSV: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (of_text(""), "train.csv is empty"),
    "empty first line": (of_text("\n1,2\n"), "has no column kind"),
    "names alone": (of_text("a,kind\n"), "x_train has no rows"),
    "no label column": (line(1, "a,b,c"), "has no column kind; there are a, b, c"),
    "two label columns": (line(1, "a,kind,kind"), "has 2 columns kind"),
    "labels alone": (of_text("kind\n1\n"), "has labels and nothing else"),
    "value missing": (line(5, GOOD[2:]), "line 5: has 12 values, but there are 13 columns"),
    "value too many": (line(6, GOOD + ",7"), "line 6: has 14 values, but there are 13 columns"),
    "empty value": (line(7, GOOD.replace("5", "")), "line 7: there is no value in column c3: --fill mean"),
    "word": (
        line(24, GOOD.replace("5", "five")),
        "line 24: column c3 holds 'five', which is not a number; --drop-columns c3",
    ),
    "empty line": (line(3, ""), "line 3: has 0 values"),
    "empty lines": (of_text("a,kind\n\n\n1,2.0\n"), "line 2: has 0 values"),
    "nothing but empty lines": (of_text("a,kind\n\n\n"), "x_train has no rows"),
    "comment": (line(3, "# no data"), "line 3: has 1 values"),
    "quote not closed": (line(4, GOOD.replace("5", '"5')), "line 4"),
    "not UTF-8": (line(4, "\xe9" + GOOD), "line 4: not in UTF-8"),
    "binary": (line(4, "\0\1\2"), "line 4"),
    "UTF-16": (
        lambda path: path.write_bytes("a,kind\n".encode("utf-16")),
        "convert it, as with iconv -f utf16 -t utf8",
    ),
    "name not UTF-8": (line(1, "\xe9,kind"), "line 1: not in UTF-8"),
    "fraction as label": (line(9, GOOD.replace("1,2,3", "1.5,2,3")), "line 9: the label 1.5 is not an integer"),
    "nan as label": (line(9, GOOD.replace("1,2,3", "nan,2,3")), "line 9: there is no label in column kind (nan)"),
    "word as label": (
        line(9, GOOD.replace("1,2,3", "cat,2,3")),
        "line 9: the label 'cat' is not a number, but the first is",
    ),
    "nan": (line(9, GOOD.replace("9", "nan")), "line 9: there is no value in column c7 (nan)"),
    "infinite": (line(2, GOOD.replace("9", "1e999")), "but not infinity), the first is row 0"),
    "negative label": (
        line(9, GOOD.replace("1,2,3", "-2,2,3")),
        "labels: label -2 is below 0",
    ),
    "cut": (cut(-8), "line 24: has"),
    "other columns": (of_text("kind,x\n1,2\n"), "test.csv has no column x; there are a, b, kind"),
    "missing": (Path.unlink, "train.csv: No such file"),
}


@pytest.mark.filterwarnings("error")  # no words but ours
@pytest.mark.parametrize("what", BAD_CSV)
def test_a_bad_csv_file_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    damage, words = BAD_CSV[what]
    damage(samples.csv(tmp_path) / "train.csv")
    if what in ("names alone", "empty lines", "nothing but empty lines"):
        of_text("a,kind\n1,2.0\n")(tmp_path / "test.csv")
    message = refusal(tmp_path)
    assert words in message
    assert ".csv" in message or "x_train" in message
