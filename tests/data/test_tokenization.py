"""Rows of tokens that are made part by part."""

from __future__ import annotations

import weakref

import numpy as np

from rayfed_sub.data.rows import Rows
from rayfed_sub.data.tokenization import _Parts


def test_tokens_of_a_part_are_held_once() -> None:
    """A view of none of them would keep all: of 4,000,000 rows 1.5 GB."""
    parts, whole = _Parts(), []
    for number in range(3):
        part = Rows.of([[number, 7, 8], [number]], [1, 0])
        whole += part.tokens.tolist()
        held = weakref.ref(part.tokens)
        parts.add(part)
        del part
        assert held() is None
    rows = parts.done()
    assert rows.tokens.tolist() == whole
    assert np.array_equal(rows.lengths, [3, 1] * 3)
