"""MNIST's files: any spelling, type and compression; and bad ones."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import open_dataset
from mpiml.data.formats import KEYS
from mpiml.data.idx import idx_file
from tests.data import samples
from tests.data.damage import Change, refusal, rewrite
from tests.data.samples import ARRAYS, TRAIN, idx


@pytest.mark.parametrize("shape", ["{0}", "{0}.gz"])
def test_other_spellings_of_idx_names(tmp_path: Path, shape: str) -> None:
    for name, key in zip(
        ("train-images.idx3", "train-labels.idx1", "t10k-images.idx3", "t10k-labels.idx1"), KEYS, strict=True
    ):
        content = idx(ARRAYS[key])
        (tmp_path / shape.format(f"{name}-ubyte")).write_bytes(
            gzip.compress(content) if shape.endswith("gz") else content
        )
    assert len(open_dataset(str(tmp_path)).train) == TRAIN


@pytest.mark.parametrize(("kind", "dtype"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_idx_of_any_type(tmp_path: Path, kind: int, dtype: str) -> None:
    array = np.array([[1, 2], [100, 3], [5, 6]])
    (tmp_path / "a").write_bytes(idx(array, kind, dtype))
    np.testing.assert_array_equal(idx_file(tmp_path / "a").rows(np.array([2, 1])), array[[2, 1]])


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
IDX: dict[str, tuple[str, Change, str]] = {
    "magic": (IMAGES, lambda raw: b"\1" + raw[1:], " is not an IDX file: it begins with 01 00 08 03"),
    "type": (IMAGES, lambda raw: raw[:2] + b"\x0a" + raw[3:], " is not an IDX file: it begins with 00 00 0a 03"),
    "no axes": (LABELS, lambda raw: raw[:3] + b"\0", "is not an IDX file"),
    "empty": (IMAGES, lambda raw: b"", "is not an IDX file: it begins with nothing"),
    "header cut": (IMAGES, lambda raw: raw[:9], "ends within its header, at byte 9"),
    "truncated": (IMAGES, lambda raw: raw[:-1], "declares 276 bytes, but the file holds 275"),
    "oversized": (LABELS, lambda raw: raw + b"\0", "declares 23 bytes, but the file holds 24"),
    "more declared": (IMAGES, lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "but the file holds 276"),
    "images != labels": (LABELS, lambda raw: idx(ARRAYS["y_test"]), "x_train has 23 rows, but y_train has 7"),
    "images as labels": (LABELS, lambda raw: idx(ARRAYS["x_train"]), "rows of y_train are (4, 3), of y_test ()"),
    "no images": (IMAGES, lambda raw: idx(ARRAYS["x_train"][:0]), "x_train has 0 rows, but y_train has 23"),
    "nan": (IMAGES, lambda raw: idx(np.full((23, 4, 3), np.nan), 13, ">f4"), "23 rows hold values that are not finite"),
}
GZIP: dict[str, tuple[str, Change, str]] = {
    "not gzipped": (IMAGES, gzip.decompress, "damaged: Not a gzipped file"),
    "empty": (IMAGES, lambda raw: b"", "is not an IDX file: it begins with nothing"),
    "truncated": (IMAGES, lambda raw: raw[:-30], "-ubyte.gz is cut short: Compressed file ended before the end"),
    "end of it lost": (IMAGES, lambda raw: raw[:-28] + raw[-4:], "-ubyte.gz is cut short: "),
    "more declared": (
        IMAGES,
        lambda raw: gzip.compress(gzip.decompress(raw)[:-1]),
        "declares 276 bytes, but the file holds 275",
    ),
    "less declared": (LABELS, lambda raw: gzip.compress(gzip.decompress(raw) + b"\0"), "but the file holds 24"),
    "checksum": (IMAGES, lambda raw: raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:], "damaged: CRC check failed"),
    "damaged": (IMAGES, lambda raw: raw[:40] + bytes(30) + raw[70:], "damaged"),
}


@pytest.mark.parametrize(
    ("what", "gzipped"), [*((what, False) for what in IDX), *((what, True) for what in {**IDX, **GZIP})]
)
def test_a_bad_idx_file_is_refused_in_a_line(tmp_path: Path, what: str, gzipped: bool) -> None:
    file, change, words = IDX[what] if not gzipped or what not in GZIP else GZIP[what]
    if not gzipped:
        rewrite(samples.plain_idx(tmp_path) / file, change)
    elif what in GZIP:
        rewrite(samples.gzipped_idx(tmp_path) / f"{file}.gz", change)
    else:
        zipped = samples.gzipped_idx(tmp_path) / f"{file}.gz"
        rewrite(zipped, lambda raw: gzip.compress(change(gzip.decompress(raw))))
    message = refusal(tmp_path)
    assert words in message
    assert file in message or "x_train has" in message or "rows of" in message


def test_idx_file_that_is_missing(tmp_path: Path) -> None:
    (samples.gzipped_idx(tmp_path) / f"{LABELS}.gz").unlink()
    assert f"{LABELS}: No such file" in refusal(tmp_path)
