"""File formats: chosen by the name of a data set's file, or by the files in its directory."""

from __future__ import annotations

import dataclasses
import glob
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpiml.data import idx, names
from mpiml.data.npy import check_sums, npy_file, npz_member, npz_names
from mpiml.data.sources import Source
from mpiml.errors import ConfigError, DataError

KEYS = ("x_train", "y_train", "x_test", "y_test")
TABLES = (".csv", ".tsv", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
SHOWN = 1000  # files of a directory that are looked at for a message
CHOICES = (
    "choose digits, a .npz or HDF5 file with x_train, y_train, x_test, y_test, a CSV or Parquet file with --label, "
    "a directory with x_train.npy and so on, with MNIST's files, or with train.csv and test.csv or train.parquet and "
    "test.parquet, text or tokens with --context, or package.module:function"
)


@dataclass(frozen=True)
class Options:
    """Settings that only some formats need, and what is wanted of a data set."""

    label: str | None = None  # the column of a table that holds the labels
    context: int | None = None  # the number of tokens in a row; given only for text and tokens
    held_out: float = 0.1  # the fraction of a text to test on if there are no test files
    tokens: str = "uint16"  # the dtype of a token in a .bin file
    drop_columns: Sequence[str] = ()  # the columns of a table that are left out
    gaps: bool = False  # whether inputs of a table may be missing; they are NaN then
    columns: Sequence[str] = ()  # the inputs that a trained model takes from a table, in this order
    words: Sequence[str] = ()  # the words that its labels were, in the order of the classes
    arrays: Mapping[str, str] = field(default_factory=dict)  # the names of columns in files that have others
    tests_only: bool = False  # only rows to test on are wanted, and these may be without labels
    seed: int = 0  # of what items draw from the generators of the process
    values: bool = False  # whether labels that are numbers are values, even if the first is an integer


@dataclass
class Columns:
    """The columns of a data set by their names, x_train and so on, and what `Dataset` needs besides them.

    Those of test rows may be missing; if only these are wanted, those to train on and y_test may be.
    """

    sources: Mapping[str, Source]
    files: Sequence[Path]
    classes: int | None = None
    check: Callable[[], None] | None = None
    names: Sequence[str] = ()  # of the inputs of a table
    words: Sequence[str] = ()  # that are the labels of a table, in the order of the classes
    cut: bool = False
    notes: Sequence[str] = ()


def open_files(spec: str, options: Options) -> Columns:
    """The columns of the data set at a path. Raises DataError if it is missing, damaged or of unknown format."""
    path = Path(spec)
    by_suffix = {".npz": open_npz, ".h5": open_h5, ".hdf5": open_h5, ".hdf": open_h5}
    opener = by_suffix.get(path.suffix.lower()) or (by_files(path) if path.is_dir() else None)
    if opener is None and options.context is None and any(path.glob("*.npy")):
        opener = open_npy
    if options.tests_only and options.context is None and path.suffix == ".npy":
        opener = open_inputs
    if options.arrays and opener not in (open_npz, open_h5, open_npy):
        raise ConfigError(f"--arrays: {spec} has no names of arrays, as .npz, HDF5 and directories of .npy files have")
    if options.context is not None:
        if opener is not None:
            raise DataError(f"--context {options.context}: {spec} is neither text nor tokens")
        return open_tokens(path, options)
    if opener is None:
        if path.suffix.lower() in TABLES:
            return open_table(path, options)
        raise DataError(f"--data {spec}: {_what_to_do(path, options)}")
    return opener(path, options)


def _what_to_do(path: Path, options: Options) -> str:
    """What works for a path that is of no format that is read, as the end of a message."""
    suffix, function = path.suffix.lower(), "--data mydata:load (see mpiml/data/README.md)"
    if suffix == ".py" and options.label is None:
        return f"of a Python file, name a function that returns the data: --data {path.stem}:FUNCTION"
    if not path.exists():
        return f"there is no such file or directory; {CHOICES}"
    if path.is_dir():
        files = [file for file in itertools.islice(path.rglob("*"), SHOWN) if file.is_file()]
        held = (
            f"it holds {', '.join(str(file.relative_to(path)) for file in files[:3])}, ..." if files else "it is empty"
        )
        if any(file.suffix.lower() in IMAGES for file in files):
            return f"{held}; images are read by a function of yours, such as one that returns ImageFolder: {function}"
        return f"{held}; {CHOICES}"
    if suffix in PACKED:
        return f"unpack it first; {'a .npz or HDF5 file' if suffix == '.zip' else path.stem} is read as it is"
    if options.label is not None:
        return f"the name of a table must end in {', '.join(TABLES)}; rename the file, or save it as one of these"
    if suffix == ".npy":
        return (
            "a single array has no labels: put x_train.npy and y_train.npy into a directory and name that, or, if it "
            "holds tokens, give --context T"
        )
    if suffix in (".txt", ".bin"):
        return "text and tokens need --context T, the number of tokens in a row; a table must end in .csv or .tsv"
    return f"this format is read by a function of yours: {function}; or {CHOICES}"


Opener = Callable[[Path, Options], Columns]


def by_files(directory: Path) -> Opener | None:
    """The function that opens this directory, if the format follows from the names of its files."""
    stems = {file.stem.lower() for file in directory.glob("*.npy")}
    if stems & {*names.COLUMNS, *names.SHORT}:
        return open_npy
    if any(idx.find(directory, key) for key in KEYS):
        return open_idx
    for suffix in TABLES:
        if any((directory / f"{which}{suffix}").exists() for which in ("train", "test")):
            return open_table
    return None


def open_npz(path: Path, options: Options) -> Columns:
    named, notes = _named(npz_names(path), path, options)
    sources = {column: npz_member(path, name) for column, name in named.items()}
    return Columns(sources, [path], check=lambda: check_sums(path, list(named.values())), notes=notes)


def open_h5(path: Path, options: Options) -> Columns:
    from mpiml.data.hdf5 import hdf5_column, hdf5_names, open_hdf5

    file = open_hdf5(path)
    known = [*dict.fromkeys([*hdf5_names(file), *(name for name in options.arrays.values() if name in file)])]
    named, notes = _named(known, path, options, "data set")
    return Columns({column: hdf5_column(file, path, name) for column, name in named.items()}, [path], notes=notes)


def open_npy(path: Path, options: Options) -> Columns:
    named, notes = _named([file.stem for file in path.glob("*.npy")], path, options)
    files = {column: path / f"{name}.npy" for column, name in named.items()}
    return Columns({column: npy_file(file) for column, file in files.items()}, list(files.values()), notes=notes)


def open_inputs(path: Path, options: Options) -> Columns:
    """A single .npy file: rows without labels."""
    return Columns({"x_test": npy_file(path)}, [path])


def _named(
    known: Sequence[str], path: Path, options: Options, kind: str = "array"
) -> tuple[dict[str, str], Sequence[str]]:
    """The names of the columns in a file, and a note on its arrays that are not used."""
    named = names.columns(known, options.arrays, options.tests_only, path, kind)
    return named, () if options.tests_only else names.unused(known, named, path)


def open_idx(path: Path, options: Options) -> Columns:
    wanted = [key for key in KEYS if key.endswith("_test") or not options.tests_only]
    optional = ["y_test"] if options.tests_only else ["x_test", "y_test"]
    files = {key: idx.find(path, key) or path / idx.NAMES[key] for key in wanted}
    if any(files[key].exists() for key in optional) and not options.tests_only:
        optional = []
    files = {key: file for key, file in files.items() if key not in optional or file.exists()}
    return Columns({key: idx.idx_file(file) for key, file in files.items()}, list(files.values()))


def open_table(path: Path, options: Options) -> Columns:
    from mpiml.data.delimited import CSV
    from mpiml.data.parquet import Parquet
    from mpiml.data.tables import as_values, check_same, number_words

    files = _tables(path, options.tests_only)
    kind = Parquet if files[0].suffix.lower() == ".parquet" else CSV
    tables = [kind(files[0], options)]
    for file in files[1:]:
        tables.append(kind(file, dataclasses.replace(options, columns=tables[0].columns)))
    if options.tests_only:
        tables[0].without_labels()
    else:
        check_same(tables, options.label)
    if options.values:
        as_values(tables)
    words, notes = number_words(tables, options.words)
    sources: dict[str, Source] = {}
    for which, table in zip(["test"] if options.tests_only else ["train", "test"], tables, strict=False):
        x, y = table.sources()
        sources |= {f"x_{which}": x} | ({} if table.label is None else {f"y_{which}": y})
    other = sorted(file.name for file in path.glob(f"*{files[0].suffix}") if file not in files)
    if other and len(files) == 1 and not options.tests_only:
        notes.append(f"{path}: not used: {names.listed(other)}; to test on a file, call it test{files[0].suffix}")
    return Columns(sources, files, len(words) or None, names=tables[0].columns, words=words, notes=notes)


def _tables(path: Path, tests_only: bool) -> list[Path]:
    """The file to train on, and the one to test on if there is one; only that to test on if that is what is wanted."""
    if not path.is_dir():
        return [path]
    suffix = next(suffix for suffix in TABLES if any((path / f"{w}{suffix}").exists() for w in ("train", "test")))
    train, test = path / f"train{suffix}", path / f"test{suffix}"
    if not tests_only:
        return [train, test] if test.exists() else [train]
    if not test.exists():
        raise DataError(f"{path} has no test{suffix}; to test on another file, name it: --data {train}")
    return [test]


def open_tokens(path: Path, options: Options) -> Columns:
    from mpiml.data import text

    assert options.context, "text and tokens are opened only if --context is given"
    train, test = _token_files(path)
    suffixes = {file.suffix for file in [*train, *test]}
    pretokenised = suffixes <= {".npy", ".bin"}
    dtype = np.dtype(options.tokens).newbyteorder("<") if pretokenised else text.BYTES
    tokens = [text.Tokens(files, dtype) for files in (train, test) if files]
    columns = text.windows(tokens[0], tokens[1] if test else None, options.context, options.held_out, str(path))
    return Columns(dict(zip(KEYS, columns, strict=False)), [*train, *test], None if pretokenised else 256, cut=not test)


def _token_files(path: Path) -> tuple[Sequence[Path], Sequence[Path]]:
    """The files to train and to test on. The second list is empty if the first is to be split."""
    for train, test in (("train", "test"), ("train", "val")):
        for suffix in ("", ".txt", ".bin", ".npy"):
            if (path / f"{train}{suffix}").exists() and (path / f"{test}{suffix}").exists():
                return _files(path / f"{train}{suffix}"), _files(path / f"{test}{suffix}")
    return _files(path), []


def _files(path: Path) -> list[Path]:
    """The files at a path, sorted: the path itself, all files below a directory, or those that match a pattern."""
    if path.is_dir():
        paths = [file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    elif glob.has_magic(str(path)) and not path.exists():
        paths = [Path(file) for file in glob.glob(str(path), recursive=True)]
    else:
        return [path]
    files = sorted(file for file in paths if file.is_file())
    if not files:
        raise DataError(f"--data {path}: there are no files; give a file, a directory of files, or a pattern with *")
    return files
