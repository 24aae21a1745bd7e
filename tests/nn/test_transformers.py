"""Transformers: the rows that they take."""

from __future__ import annotations

import pytest

from mpiml.nn.transformers import gpt


def test_gpt_takes_rows_of_token_ids() -> None:
    with pytest.raises(ValueError, match=r"token ids.*\(3, 4\)"):
        gpt((3, 4), 10)
