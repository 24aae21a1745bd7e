"""Models, losses and metrics of a user's own, of which some work, and others do not in one way each."""

import random

import numpy as np

from mpiml.nn.layers import Linear, Tanh


def model(shape, outputs):
    return [Linear(*shape, 6), Tanh(), Linear(6, outputs)]


def broken(shape, outputs):
    return [Linear(99, outputs)]


def nothing(shape, outputs):
    return None


def empty(shape, outputs):
    return []


def absolute(y, labels):
    error = y - labels.reshape(y.shape)
    return float(np.abs(error).sum()), float(len(y)), np.sign(error).astype(float)


def to_the_power(y, labels, power=1):
    return absolute(y, labels)


def dividing(y, labels):
    return float((y / labels).sum()), float(len(y)), 1 / labels


def counting(y, labels):
    """Takes labels as they are in the data."""
    assert labels.shape[1:] == (1,)
    return 0.0, float(len(y)), y * 0


def weightless(y, labels):
    return 0.0, 0.0, y * 0


def picky(y, labels):
    1 / int(y.sum())
    return absolute(y, labels)


def weighted(y, labels, weights):
    _, _, dy = absolute(y, labels)
    each = weights.reshape(-1, *[1] * (y.ndim - 1))
    return float((np.abs(y - labels.reshape(y.shape)) * each).sum()), float(weights.sum()), dy * each


def drawing(y, labels):
    return absolute(y + np.random.normal(size=y.shape), labels)


class Largest:
    name, columns = "largest", 1

    def __init__(self, outputs):
        self.outputs = outputs

    def sums(self, y, labels):
        return np.array([y.max()])

    def value(self, totals):
        return totals[0]


class Drawing(Largest):
    name = "drawn"

    def sums(self, y, labels):
        return np.array([random.random()])


def alone(y):
    return 0.0


class Thing:
    name, columns = "thing", 2
    sums = value = staticmethod(lambda *_: [0.0, 1.0])


def thing(**given):
    made = Thing()
    vars(made).update(given)
    return lambda outputs: made


five = 5


def one_number(y, labels):
    return 1.0


def negative(y, labels):
    return (1.0, -1.0, y)


def endless(y, labels):
    return (1.0, float("inf"), y)


def no_weight(y, labels):
    return (1.0, None, y)


def no_total(y, labels):
    return (y, 1.0, y)


def of_one_row(y, labels):
    return (1.0, 1.0, y[:1])


known = thing(name="test_loss")
nameless = thing(name="")
uncounted = thing(columns=2.0)
fewer = thing(columns=3)
more = thing(columns=1)
of_labels = thing(sums=alone)
of_nothing = thing(value=lambda: 1.0)
word = thing(value=lambda totals: "word")
vector = thing(value=lambda totals: np.ones(2))


class Places:
    best = Largest

    def __init__(self, outputs):
        pass
