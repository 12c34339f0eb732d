"""Scores of predicted labels, by scikit-learn and scipy: classes, several labels a row, and numbers.

A score that is not defined for the rows at hand (0 / 0) is left out: it is no number, and 0 would be a bad one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def class_scores(labels: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """`accuracy`, `macro_f1`, `matthews` and `f1/<name>` for each class that occurs; names[i] is the name of class i.

    A class's F1 is 2 tp / (2 tp + fp + fn); a class that occurs in neither `labels` nor `predicted` (0 / 0) has no
    score.  macro_f1 is the unweighted mean over the other classes, as in scikit-learn: a client with two of four
    classes is scored on those two, and on every other class that the model predicts.  Matthews' correlation, in
    [-1, 1], is not defined where all labels or all predictions are one class.  Raises ValueError for no rows, lists of
    different lengths, or a class without a name.

    >>> sorted(class_scores([0, 0, 1], [0, 1, 1], ["no", "yes", "maybe"]))
    ['accuracy', 'f1/no', 'f1/yes', 'macro_f1', 'matthews']
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    _check(labels, predicted, len(names))
    present = sorted({*labels, *predicted})
    each = f1_score(labels, predicted, labels=present, average=None, zero_division=0)
    both = len(set(labels)) > 1 and len(set(predicted)) > 1
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, labels=present, average="macro", zero_division=0)),
        **({"matthews": float(matthews_corrcoef(labels, predicted))} if both else {}),
        **{f"f1/{names[index]}": float(score) for index, score in zip(present, each, strict=True)},
    }


def confusion(labels: Sequence[int], predicted: Sequence[int], classes: int) -> list[list[int]]:
    """Confusion matrix: rows of each true class (outer list) by predicted class (inner list), (classes, classes).

    Raises ValueError as `class_scores`.

    >>> confusion([0, 0, 1], [0, 1, 1], 2)
    [[1, 1], [0, 1]]
    """
    from sklearn.metrics import confusion_matrix

    _check(labels, predicted, classes)
    counts: list[list[int]] = confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    return counts


def label_set_scores(
    labels: Sequence[Sequence[float]], predicted: Sequence[Sequence[float]], names: Sequence[str]
) -> dict[str, float]:
    """`subset_accuracy` (all of a row's labels right), `micro_f1`, `macro_f1` and `f1/<name>`, in [0, 1], of rows of 0
    and 1 for each label.

    As of classes, macro_f1 is the mean over the labels that a row has or is given, and micro_f1 counts all labels of
    all rows together; neither is defined where there is no such label.  Raises ValueError for no rows.

    >>> label_set_scores([[1, 0], [1, 0]], [[1, 0], [0, 0]], ["a", "b"])["macro_f1"] == 2 / 3
    True
    """
    from sklearn.metrics import accuracy_score, f1_score

    if not len(labels) or len(labels) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} labels")
    true_RC, said_RC = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    present = np.flatnonzero((true_RC | said_RC).any(axis=0)).tolist()
    scores = {"subset_accuracy": float(accuracy_score(true_RC, said_RC))}
    if not present:
        return scores
    each = f1_score(true_RC, said_RC, labels=present, average=None, zero_division=0)
    return {
        **scores,
        "micro_f1": float(f1_score(true_RC, said_RC, labels=present, average="micro", zero_division=0)),
        "macro_f1": float(np.mean(each)),
        **{f"f1/{names[index]}": float(score) for index, score in zip(present, each, strict=True)},
    }


def number_scores(labels: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """`mean_absolute_error`, `pearson` and `spearman` of predicted numbers; the correlations, in [-1, 1], are not
    defined where all labels or all predictions are equal, or one is not finite.  Raises ValueError for no rows.

    >>> number_scores([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])["spearman"], number_scores([1.0, 2.0], [3.0, 3.0])
    (1.0, {'mean_absolute_error': 1.5})
    """
    from scipy.stats import pearsonr, spearmanr

    if not len(labels) or len(labels) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} labels")
    true_R, said_R = np.asarray(labels, np.float64), np.asarray(predicted, np.float64)
    scores = {"mean_absolute_error": float(np.abs(true_R - said_R).mean())}
    if not np.isfinite(said_R).all() or np.ptp(true_R) == 0 or np.ptp(said_R) == 0:
        return scores
    found = {"pearson": pearsonr, "spearman": spearmanr}
    correlations = {name: float(measured(true_R, said_R).statistic) for name, measured in found.items()}
    return scores | {name: value for name, value in correlations.items() if math.isfinite(value)}


def _check(labels: Sequence[int], predicted: Sequence[int], classes: int) -> None:
    if not len(labels) or len(labels) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} labels")
    strange = {*labels, *predicted} - set(range(classes))
    if strange:
        raise ValueError(f"classes {sorted(strange)} of {classes}")
