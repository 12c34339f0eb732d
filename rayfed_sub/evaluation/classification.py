"""Scores of predicted classes, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence


def class_scores(labels: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """`accuracy`, `macro_f1` and `f1/<name>` for each class that occurs, in [0, 1]; names[i] is the name of class i.

    A class's F1 is 2 tp / (2 tp + fp + fn); a class that occurs in neither `labels` nor `predicted` (0 / 0) has no
    score.  macro_f1 is the unweighted mean over the other classes, as in scikit-learn: a client with two of four
    classes is scored on those two, and on every other class that the model predicts.  Raises ValueError for no rows,
    lists of different lengths, or a class without a name.

    >>> sorted(class_scores([0, 0, 1], [0, 1, 1], ["no", "yes", "maybe"]))
    ['accuracy', 'f1/no', 'f1/yes', 'macro_f1']
    """
    from sklearn.metrics import accuracy_score, f1_score

    _check(labels, predicted, len(names))
    present = sorted({*labels, *predicted})
    each = f1_score(labels, predicted, labels=present, average=None, zero_division=0)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, labels=present, average="macro", zero_division=0)),
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


def _check(labels: Sequence[int], predicted: Sequence[int], classes: int) -> None:
    if not len(labels) or len(labels) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} labels")
    strange = {*labels, *predicted} - set(range(classes))
    if strange:
        raise ValueError(f"classes {sorted(strange)} of {classes}")
