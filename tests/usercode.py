"""Models, losses and metrics of a user's own, of which some work, and others do not in one way each."""

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


class Largest:
    name, columns = "largest", 1

    def __init__(self, outputs):
        self.outputs = outputs

    def sums(self, y, labels):
        return np.array([y.max()])

    def value(self, totals):
        return totals[0]


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
