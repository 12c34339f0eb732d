"""The best round of a run, and whether the run still gains, from its scores.

scores: finished rounds -> the score of the model after them; NaN is no gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def best_round(scores: Mapping[int, float], *, lower: bool) -> int | None:
    """Finished rounds with the best score, of equal ones the first; None where no score is a number.

    >>> best_round({1: 2.5, 2: 2.1, 3: 2.1, 4: 2.3}, lower=True), best_round({1: float("nan")}, lower=True)
    (2, None)
    """
    sign = -1 if lower else 1
    known = [rounds for rounds in sorted(scores) if not math.isnan(scores[rounds])]
    return max(known, key=lambda rounds: sign * scores[rounds], default=None)


def without_gain(scores: Mapping[int, float], *, lower: bool, min_gain: float) -> int:
    """Evaluations since the last one that gained: by more than `min_gain` over the score of the gain before it, as the
    first number does.

    >>> without_gain({1: 2.5, 2: 2.45, 3: 2.42, 4: 2.3, 5: 2.29}, lower=True, min_gain=0.1)
    1
    """
    sign = -1 if lower else 1
    reached, waited = -math.inf, 0
    for rounds in sorted(scores):
        gained = sign * scores[rounds] > reached + min_gain
        reached, waited = (sign * scores[rounds], 0) if gained else (reached, waited + 1)
    return waited
