"""The best round, and evaluations without a gain."""

from __future__ import annotations

import pytest

from rayfed_sub.evaluation.early_stopping import best_round, without_gain

NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "lower", "best"),
    [
        ({}, True, None),
        ({1: NAN}, True, None),
        ({2: 3.0, 1: 3.0, 3: NAN}, True, 1),  # of equal ones the first, in whatever order they come
        ({1: 3.0, 2: 2.0, 4: 2.5}, True, 2),
        ({1: 0.3, 2: 0.2, 4: 0.25}, False, 1),
    ],
)
def test_best_round(scores: dict[int, float], lower: bool, best: int | None) -> None:
    assert best_round(scores, lower=lower) == best


@pytest.mark.parametrize(
    ("values", "lower", "min_gain", "waited"),
    [
        ([], True, 0.0, 0),
        ([3.0], True, 9.0, 0),  # the first number is a gain
        ([3.0, 3.0], True, 0.0, 1),
        ([3.0, 2.0, 2.5, NAN], True, 0.0, 2),
        ([NAN, NAN, 3.0], True, 0.0, 0),
        ([3.0, 2.95, 2.92], True, 0.1, 2),  # 0.08 less than the last gain's 3.0
        ([3.0, 2.95, 2.89], True, 0.1, 0),  # small steps add up: 0.11 less
        ([0.5, 0.6, 0.55], False, 0.05, 1),
    ],
)
def test_evaluations_without_gain(values: list[float], lower: bool, min_gain: float, waited: int) -> None:
    scores = {2 * (i + 1): value for i, value in enumerate(values)}  # every second round is judged
    assert without_gain(scores, lower=lower, min_gain=min_gain) == waited
