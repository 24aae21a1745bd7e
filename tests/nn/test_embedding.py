"""Embedding: ids that have no vector, and gradients of ids that come twice."""

from __future__ import annotations

import numpy as np
import pytest

from tests.nn.cases import TOKENS, Bench


@pytest.mark.parametrize("token", [-1, TOKENS])
def test_a_token_that_has_no_vector_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"{token}.*0 to {TOKENS - 1}"):
        Bench("embedding").forward(np.array([[0.0, 1, 2, 3, token]]))


def test_equal_tokens_add_their_gradients() -> None:
    bench = Bench("embedding")
    grads, (weight,) = bench.gradients(), bench.layout.parameters
    y, backward = bench.forward(np.array([[2.0, 5, 2, 2, 0]]))
    np.testing.assert_array_equal(y[0], weight.value[[2, 5, 2, 2, 0]])
    backward(np.arange(5.0)[None, :, None] * np.ones(4), grads)
    np.testing.assert_array_equal(grads[weight], np.array([4, 0, 0 + 2 + 3, 0, 0, 1, 0])[:, None] * np.ones(4))
