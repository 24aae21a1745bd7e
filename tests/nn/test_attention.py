"""Attention: causal, the same in blocks, and finite for large scores."""

from __future__ import annotations

import numpy as np
import pytest

from tests.nn.cases import Bench


def test_a_place_sees_none_that_comes_later() -> None:
    bench = Bench("attention")
    x = bench.rows(2)
    y, _ = bench.forward(x)
    x[:, 3:] += 1
    changed, _ = bench.forward(x)
    np.testing.assert_array_equal(changed[:, :3], y[:, :3])
    assert np.all(changed[:, 3:] != y[:, 3:])


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_attention_in_blocks_is_attention(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    bench = Bench("attention")
    x = bench.rows(2)
    whole = [bench.forward(x)[0], *bench.both(x)]
    monkeypatch.setattr("mpiml.nn.attention.QUERIES", queries)
    for part, expected in zip([bench.forward(x)[0], *bench.both(x)], whole, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-12, atol=1e-13)


def test_large_scores_do_not_overflow() -> None:
    bench = Bench("attention", "float32")
    y, backward = bench.forward(bench.rows(2) * 1e4)
    assert np.isfinite(y).all()
    assert np.isfinite(backward(y, bench.gradients())).all()
