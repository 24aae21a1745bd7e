"""The names of arrays: any case, a map of others, and one line that says what the file holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import Options
from mpiml.data.names import parsed
from mpiml.data.objects import dataset_of
from mpiml.errors import ConfigError, DataError

X = np.arange(24, dtype=np.float32).reshape(8, 3)
Y = np.arange(8) % 2
W = np.linspace(0, 1, 8)


def npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path / "d.npz", **arrays)
    return path / "d.npz"


def compressed(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(path / "d.npz", **arrays)
    return path / "d.npz"


def hdf5(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    import h5py

    with h5py.File(path / "d.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path / "d.h5"


def npy(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


every_format = pytest.mark.parametrize("write", [npz, compressed, hdf5, npy])


def opened(path: Path, arrays: str = "", tests_only: bool = False) -> Dataset:
    return open_dataset(str(path), Options(arrays=parsed(arrays), tests_only=tests_only))


def rows(source: object) -> np.ndarray:
    source.hold(np.arange(8))  # type: ignore[attr-defined]
    values: np.ndarray = source.rows(np.arange(8))  # type: ignore[attr-defined]
    return values


@every_format
@pytest.mark.parametrize(
    ("names", "arrays"),
    [
        ("X_train Y_TRAIN W_Train", ""),
        ("X y w", ""),
        ("images labels weights", "x_train=images, y_train=labels,w_train=weights"),
        ("images y_train w_train", "x_train=images"),
    ],
)
def test_arrays_of_any_name(tmp_path: Path, write, names: str, arrays: str) -> None:
    data = opened(write(tmp_path, dict(zip(names.split(), (X, Y, W), strict=True))), arrays)
    assert (len(data.train), len(data.test)) == (8, 0)
    for source, values in ((data.train.x, X), (data.train.y, Y), (data.train.w, W)):
        np.testing.assert_array_equal(rows(source), values)


@every_format
@pytest.mark.parametrize("names", ["x_test y_test w_test", "X_TEST Y_test W_test", "x Y w"])
def test_rows_to_test_on_are_enough_where_they_alone_are_wanted(tmp_path: Path, write, names: str) -> None:
    data = opened(write(tmp_path, dict(zip(names.split(), (X, Y, W), strict=True))), tests_only=True)
    assert (len(data.train), len(data.test), data.test.labelled) == (0, 8, True)
    for source, values in ((data.test.x, X), (data.test.y, Y), (data.test.w, W)):
        np.testing.assert_array_equal(rows(source), values)


@every_format
def test_inputs_alone_have_zeros_as_labels(tmp_path: Path, write) -> None:
    data = opened(write(tmp_path, {"x": X, "other": Y}), tests_only=True)
    assert not data.test.labelled
    np.testing.assert_array_equal(rows(data.test.x), X)
    np.testing.assert_array_equal(rows(data.test.y), np.zeros(8))


def test_a_single_file_of_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "new.npy", X)
    np.testing.assert_array_equal(rows(opened(tmp_path / "new.npy", tests_only=True).test.x), X)
    with pytest.raises(DataError, match=r"new.npy: a single array has no labels: "):
        opened(tmp_path / "new.npy")


def test_paths_inside_groups_and_test_rows_of_another_name(tmp_path: Path) -> None:
    file = hdf5(tmp_path, {"a/images": X, "a/labels": Y, "valid/x": X[:2], "valid/y": Y[:2]})
    data = opened(file, "x_train=a/images,y_train=a/labels,x_test=valid/x,y_test=valid/y")
    assert (len(data.train), len(data.test), list(data.notes)) == (8, 2, [])
    np.testing.assert_array_equal(data.train.x.rows(np.arange(8)), X)


def test_what_groups_hold_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set x_train or y_train; it holds a, a/images, a/labels; --arr"):
        opened(hdf5(tmp_path, {"a/images": X, "a/labels": Y}))


@pytest.mark.parametrize(
    ("names", "arrays", "words"),
    [
        (
            "images labels",
            "",
            "x_train or y_train; it holds images, labels; --arrays x_train=NAME,y_train=NAME says which they are",
        ),
        ("x_train label", "", "has no array y_train; it holds label, x_train; --arrays y_train=NAME says"),
        ("images labels", "x_train=pictures", "has no array pictures, which --arrays names; it holds images, labels"),
        ("X_train x_TRAIN y_train", "", "holds X_train and x_TRAIN; say which it is with --arrays x_train="),
        ("x_train y_train x_test", "", "has no array y_test"),
        ("x_train y_train w_test", "", "has no array x_test"),
    ],
)
def test_what_is_missing_is_one_line_with_what_there_is(tmp_path: Path, names: str, arrays: str, words: str) -> None:
    with pytest.raises(DataError) as error:
        opened(npz(tmp_path, dict.fromkeys(names.split(), X)), arrays)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_test_rows_alone_are_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no array x_test or x; it holds x_train; --arrays x_test=NAME says"):
        opened(npz(tmp_path, {"x_train": X}), tests_only=True)


def test_arrays_that_may_be_test_rows_are_named(tmp_path: Path) -> None:
    data = opened(npz(tmp_path, {"x_train": X, "y_train": Y, "x_valid": X, "y_valid": Y}))
    assert [note.partition(": ")[2] for note in data.notes] == [
        "not used: x_valid, y_valid; --arrays x_test=NAME,y_test=NAME names test rows"
    ]


def test_arrays_that_may_be_weights_are_named(tmp_path: Path) -> None:
    arrays = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y, "sample_weight": W}
    note = "not used: sample_weight; --arrays w_train=NAME names weights of rows"
    assert [note] == [each.partition(": ")[2] for each in opened(npz(tmp_path, arrays)).notes]
    assert [f"--data f: {note}"] == dataset_of(arrays, "--data f: must return", Options()).notes
    assert not opened(npz(tmp_path, arrays), "w_train=sample_weight").notes


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a38, a39 and 10 more; "):
        opened(npz(tmp_path, {f"a{number}": X for number in range(10, 50)}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x_trian=a", "x_trian=a must be NAME=ARRAY, where NAME is one of x_train, y_train, w_train, x_test, "),
        ("x_train", "x_train must be NAME=ARRAY"),
        ("x_train=", "x_train= must be NAME=ARRAY"),
        ("x_train=a,", "an empty item must be NAME=ARRAY"),
        ("x_train=a,x_train=b", "x_train=b is given twice"),
    ],
)
def test_maps_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(text)
    assert str(error.value).startswith(f"--arrays {text}: {words}")


def test_files_without_names_take_no_map(tmp_path: Path) -> None:
    for suffix in ("csv", "txt"):
        (tmp_path / f"train.{suffix}").write_text("a,b\n1,2\n")
    for path in (tmp_path, tmp_path / "train.txt"):
        with pytest.raises(ConfigError, match=r"--arrays: .* has no names of arrays"):
            open_dataset(str(path), Options(context=4, arrays={"x_train": "a"}))
