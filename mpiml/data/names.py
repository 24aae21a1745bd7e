"""The names of a file's arrays: which of them is which column of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpiml.errors import ConfigError, DataError, first_few

COLUMNS = ("x_train", "y_train", "w_train", "x_test", "y_test", "w_test")
SHORT = ("x", "y", "w")  # for rows of one kind alone
SHOWN = 30  # names in a message


def parsed(text: str | None) -> dict[str, str]:
    """The names that --arrays gives to columns: "x_train=images,y_train=labels". Raises ConfigError."""
    names: dict[str, str] = {}
    for item in text.split(",") if text else ():
        column, equals, name = (part.strip() for part in item.partition("="))
        if column not in COLUMNS + SHORT[:2] or column in names or not (equals and name):
            must = f"must be NAME=ARRAY, where NAME is one of {', '.join(COLUMNS)}"
            what = "is given twice" if column in names else must
            raise ConfigError(f"--arrays {text}: {item.strip() or 'an empty item'} {what}")
        names[column] = name
    return names


def columns(
    names: Sequence[str], arrays: Mapping[str, str], tests_only: bool, where: object, kind: str = "array"
) -> dict[str, str]:
    """Which of the arrays `names` in a file is which column: as `arrays` says, or by its name, in upper or lower case.

    x and y alone are the rows to train on, or those to test on if `tests_only`; then labels may be missing, too.
    Raises DataError, which calls the file `where` and its arrays `kind`, if a column is missing or ambiguous.
    """
    which = "test" if tests_only else "train"
    holds = f"it holds {listed(names)}"
    chosen = {f"{key}_{which}" if key in SHORT else key: name for key, name in arrays.items()}
    if lost := next((name for name in chosen.values() if name not in names), None):
        raise DataError(f"{where} has no {kind} {lost}, which --arrays names; {holds}")
    wanted = [column for column in COLUMNS if column.endswith(which) or not tests_only]
    for column in wanted:
        if column not in chosen and (name := _same(names, column, where)):
            chosen[column] = name
    if not any(column.endswith(which) for column in chosen):
        chosen |= {f"{short}_{which}": name for short in SHORT if (name := _same(names, short, where))}
    chosen = {column: name for column, name in chosen.items() if column in wanted}
    tests = any(column.endswith("_test") for column in chosen)
    needed = ["x_test"] if tests_only else ["x_train", "y_train", *(["x_test", "y_test"] if tests else [])]
    if missing := [column for column in needed if column not in chosen]:
        also = " or x" if tests_only else ""
        they = "they are" if len(missing) > 1 else "it is"
        flag = f"--arrays {','.join(f'{column}=NAME' for column in missing)}"
        hint = f"; {flag} says which {they}" if names else ""
        raise DataError(f"{where} has no {kind} {' or '.join(missing)}{also}; {holds}{hint}")
    return chosen


def unused(names: Sequence[str], chosen: Mapping[str, str], where: object) -> list[str]:
    """A note on the arrays that are no column: they may be test rows, or weights."""
    left = [name for name in names if not any(f"{used}/".startswith(f"{name}/") for used in chosen.values())]
    if not left:
        return []
    may = "w_train=NAME names weights of rows" if "x_test" in chosen else "x_test=NAME,y_test=NAME names test rows"
    return [f"{where}: not used: {listed(left)}; --arrays {may}"]


def _same(names: Sequence[str], column: str, where: object) -> str | None:
    """The name that is a column's but for upper and lower case; the very same one before others."""
    same = [name for name in names if name.lower() == column]
    if column in same or not same:
        return column if same else None
    if len(same) > 1:
        raise DataError(f"{where} holds {' and '.join(same)}; say which it is with --arrays {column}={same[0]}")
    return same[0]


def listed(names: Sequence[str]) -> str:
    """Names in order, for a message."""
    return first_few(sorted(names), SHOWN) or "nothing"
