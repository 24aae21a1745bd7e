"""A data function, for `--data mpiml.examples.five_digits:data`: few digits, in five classes.

Such a function takes nothing and returns a data set, the same on every rank.
"""

import numpy as np

from mpiml.api import Dataset, Split, open_dataset

CLASS = np.array([0, 1, 2, 2, 3, 4, 0, 1, 4, 3])  # of each digit: digits that look alike have the same
ROWS = 30  # to train on


def data() -> Dataset:
    """Handwritten digits (8, 8), and which of the pairs 0 and 6, 1 and 7, 2 and 3, 4 and 9, 5 and 8 each is of."""
    digits = open_dataset("digits")
    x, y = arrays(digits.train, ROWS)
    x_test, y_test = arrays(digits.test, len(digits.test))
    return Dataset.from_arrays(x, CLASS[y], x_test, CLASS[y_test])


def arrays(split: Split, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and labels of the first rows of a split."""
    rows = np.arange(count)
    for source in (split.x, split.y):
        source.hold(rows)
    return split.x.rows(rows), split.y.rows(rows)
