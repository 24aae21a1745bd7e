"""What a stack of layers refuses: layers that give other shapes than they say, or no gradient where one is needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn.base import Array, At, Backward, Layer
from mpiml.nn.basic import Linear, Residual
from mpiml.nn.parameters import Gradients, Layout

AT = At(training=True)


class Given(Layer):
    """Does what two functions say."""

    def __init__(self, y: Callable[[Array], Array], dx: Callable[[Array], Array | None] = lambda dy: dy):
        self.y, self.dx = y, dx

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        return self.y(x), lambda dy, grads: self.dx(dy)


def stack(*layers: Layer) -> tuple[list[Layer], Gradients]:
    nn.name(layers)
    layout = Layout(nn.parameters(layers), "float32")
    layout.bind(layout.zeros())
    return list(layers), Gradients(layout, layout.zeros())


X = np.ones((5, 4), np.float32)
SHAPES: dict[str, tuple[Callable[[Array], Array], str]] = {
    "half of a row": (lambda x: x[:, ::2], r"of shape \(2,\) for a row, but its output_shape says \(4,\)"),
    "what would broadcast": (lambda x: x[:, :1], r"of shape \(1,\) for a row"),
    "half of the rows": (lambda x: x[::2], "of 3 rows for 5"),
    "another axis": (lambda x: x[..., None], r"of shape \(4, 1\) for a row"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", SHAPES)
def test_a_layer_that_gives_another_shape_than_it_says_is_named(what: str, training: bool) -> None:
    y, words = SHAPES[what]
    layers, _ = stack(Linear(4, 4), Given(y))
    with pytest.raises(ConfigError, match=r"layers\.1, Given, gives outputs " + words):
        nn.forward(layers, X, At(training))


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        (None, "NoneType"),
        (X, "ndarray"),
        ((X,), "tuple"),
        ((X, X), r"\(ndarray, ndarray\)"),
        ((None, id), r"\(NoneType,"),
    ],
)
def test_a_layer_that_gives_no_pair_is_named(returned: object, kind: str) -> None:
    class Wrong(Layer):
        def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
            return returned  # type: ignore[return-value]

    layers, _ = stack(Linear(4, 4), Wrong())
    with pytest.raises(ConfigError, match=rf"^layers\.1, Wrong, returns {kind}.*, but a layer returns outputs and a f"):
        nn.forward(layers, X, AT)


def test_without_training_nobody_needs_a_gradient() -> None:
    class Silent(Layer):
        def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
            return x, None  # type: ignore[return-value]

    assert nn.forward([Silent()], X, At(False))[0] is X


def test_so_is_one_inside_another() -> None:
    layers, _ = stack(Residual(Linear(4, 4), Given(lambda x: x[:, :1])))
    with pytest.raises(ConfigError, match=r"layers\.0\.layers\.1, Given, gives outputs of shape \(1,\)"):
        nn.forward(layers, X, AT)


@pytest.mark.parametrize("learned", [True, False])
def test_a_layer_without_gradient_is_named_where_layers_before_it_learn(learned: bool) -> None:
    """In the same words whether these are of this stack or of a stage before."""
    mute = Given(lambda x: x, lambda dy: None)
    layers, grads = stack(mute) if learned else stack(Linear(4, 4), mute)
    y, backward = nn.forward(layers, X, AT, learned)
    with pytest.raises(ConfigError, match=rf"{mute.path}, Given, gives no gradient to the layers before it"):
        backward(y, grads)


def test_where_nobody_learns_no_gradient_is_needed() -> None:
    layers, grads = stack(Given(lambda x: x), Given(lambda x: x, lambda dy: None))
    y, backward = nn.forward(layers, X, AT)
    assert backward(y, grads) is None


@pytest.mark.parametrize(
    ("dx", "words"),
    [
        (lambda dy: dy[:, :1], r"of shape \(1,\) for a row, but its input has \(4,\)"),
        (lambda dy: dy[:3], "of 3 rows for 5"),
        (lambda dy: dy.sum(), r"of shape \(\) for a row"),
    ],
)
def test_a_gradient_of_another_shape_than_the_input_is_refused(dx: Callable[[Array], Array], words: str) -> None:
    layers, grads = stack(Linear(4, 4), Given(lambda x: x, dx))
    y, backward = nn.forward(layers, X, AT)
    with pytest.raises(ConfigError, match=r"layers\.1, Given, gives gradients " + words):
        backward(y, grads)


def test_a_frozen_beginning_is_not_differentiated() -> None:
    """Its backward passes are not called, nor kept; in the middle they are."""
    called: list[int] = []

    def layer(number: int) -> Given:
        return Given(lambda x: 2 * x, lambda dy: called.append(number) or 2 * dy)  # type: ignore[func-returns-value]

    for frozen, expected in ((None, [4, 2]), (3, [4, 2]), (1, [4])):
        layers = [layer(0), Linear(4, 4), layer(2), Linear(4, 4), layer(4)]
        for parameter in nn.parameters([layers[frozen]]) if frozen else []:
            parameter.rate = 0.0
        stack(*layers)
        layout = Layout(nn.parameters(layers), "float32")
        layout.bind(layout.zeros())
        nn.skip_first_dx(layers)
        y, backward = nn.forward(layers, X, AT)
        called.clear()
        backward(y, Gradients(layout, layout.zeros(gradients=True)))
        assert called == expected


def test_public_attributes_tell_layers_apart() -> None:
    class Own(Layer):
        def __init__(self, **values: object):
            vars(self).update(values)

    alike = {"rate": 0.5, "sizes": (1, 2), "table": np.arange(3), "names": ["a"]}
    texts = [nn.described(Own(**alike | {name: value})) for name, value in alike.items()]
    assert len(set(texts)) == 1
    for name, other in (("rate", 0.25), ("sizes", (1, 3)), ("table", np.arange(3) + 1), ("names", ["b"])):
        assert nn.described(Own(**alike | {name: other})) != texts[0]
    for name, other in (("_rank", 3), ("parts", [Own()]), ("path", "layers.7"), ("function", lambda x: x)):
        assert nn.described(Own(**alike, **{name: other})) == texts[0]
