"""Scores of a model from its predictions on held-out rows: over all rows, and over the rows of each client."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from rayfed_sub.core.schemas import Score
from rayfed_sub.evaluation.classification import class_scores, confusion, label_set_scores, number_scores
from rayfed_sub.evaluation.generation import TEXT_SCORES, words
from rayfed_sub.evaluation.language import perplexity, token_accuracy
from rayfed_sub.evaluation.named_metrics import Compute, named_scores
from rayfed_sub.training.inference import Generation, Prediction
from rayfed_sub.training.own_loss import BatchScores

R = TypeVar("R")
Rows = Sequence[tuple[int, R]]
"""Pairs of a held-out row's client (whose data it resembles) and the row's prediction or answer."""


def token_scores(rows: Rows[Prediction]) -> Iterator[Score]:
    """Loss, perplexity and accuracy of a language model; no scores for clients without labels."""
    for client, group in _groups(rows).items():
        labels = sum(len(row.labels) for row in group)
        hits = sum(best == label for row in group for best, label in zip(row.predicted, row.labels, strict=True))
        accuracy = token_accuracy(hits, labels)
        if accuracy is None:
            continue
        loss = math.fsum(row.loss for row in group) / labels
        yield Score(client, "held_out_loss", loss, labels)
        yield Score(client, "perplexity", perplexity(loss), labels)
        yield Score(client, "token_accuracy", accuracy, labels)


def label_scores(
    rows: Rows[Prediction], names: Sequence[str], metrics: Mapping[str, Compute] | None = None
) -> Iterator[Score]:
    """Loss, accuracy, F1 and Matthews' correlation of a classifier, the confusion matrix of all rows, and the
    configuration's metrics; names: of the classes."""
    for client, group in _groups(rows).items():
        labels, predicted = [int(row.labels[0]) for row in group], [int(row.predicted[0]) for row in group]
        yield Score(client, "held_out_loss", math.fsum(row.loss for row in group) / len(group), len(group))
        for metric, value in class_scores(labels, predicted, names).items():
            yield Score(client, metric, value, len(group))
        for metric, value in named_scores(metrics or {}, predicted, labels, client).items():
            yield Score(client, metric, value, len(group))
        if client is None:
            for name, counts in zip(names, confusion(labels, predicted, len(names)), strict=True):
                for other, count in zip(names, counts, strict=True):
                    if count:
                        yield Score(None, f"confusion/{name}/{other}", float(count), len(group))


def number_and_set_scores(
    rows: Rows[Prediction], names: Sequence[str], metrics: Mapping[str, Compute] | None = None
) -> Iterator[Score]:
    """Loss, scores and the configuration's metrics of a regression, or of several labels a row, which have names."""
    for client, group in _groups(rows).items():
        yield Score(client, "held_out_loss", math.fsum(row.loss for row in group) / len(group), len(group))
        if names:
            labels, predicted = ([list(map(int, one)) for one in column] for column in _columns(group))
            found = label_set_scores(labels, predicted, names)
            found |= named_scores(metrics or {}, predicted, labels, client)
        else:
            numbers, said = ([one[0] for one in column] for column in _columns(group))
            found = number_scores(numbers, said)
            found |= named_scores(metrics or {}, said, numbers, client)
        for metric, value in found.items():
            yield Score(client, metric, value, len(group))


def _columns(group: Sequence[Prediction]) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Labels and predictions."""
    return [row.labels for row in group], [row.predicted for row in group]


def text_scores(rows: Rows[Generation], metrics: Mapping[str, Compute] | None = None) -> Iterator[Score]:
    """ROUGE-L and BLEU-4 of answers, over the rows whose reference has words; none where no row has.  The metrics of
    the configuration get all greedy answers."""
    for client, group in _groups(rows).items():
        greedy, references = [row.answer for row in group], [row.reference for row in group]
        for metric, number in named_scores(metrics or {}, greedy, references, client).items():
            yield Score(client, metric, number, len(group))
        for prefix, texts in (
            ("", list(zip(greedy, references, strict=True))),
            ("teacher_forced_", [(row.teacher_forced, row.labels) for row in group]),
        ):
            asked = [(text, reference) for text, reference in texts if words(reference)]
            for name, measured in TEXT_SCORES.items() if asked else ():
                value = measured([text for text, _ in asked], [reference for _, reference in asked])
                if value is not None:
                    yield Score(client, f"{prefix}{name}", value, len(asked))


def batch_scores(batches: Rows[BatchScores]) -> Iterator[Score]:
    """Means over held-out rows of what the caller's own functions say of their batches.

    >>> rows = [(0, BatchScores(3, {"held_out_loss": 1.0})), (1, BatchScores(1, {"held_out_loss": 5.0}))]
    >>> [(score.client, score.value, score.count) for score in batch_scores(rows)]
    [(None, 2.0, 4), (0, 1.0, 3), (1, 5.0, 1)]
    """
    for client, group in _groups(batches).items():
        for metric in dict.fromkeys(name for batch in group for name in batch.means):
            judged = [batch for batch in group if metric in batch.means]
            rows = sum(batch.rows for batch in judged)
            yield Score(client, metric, math.fsum(batch.rows * batch.means[metric] for batch in judged) / rows, rows)


def overall(scores: Sequence[Score]) -> dict[str, float]:
    """The scores over all rows by name, without the confusion matrix.

    >>> overall([Score(None, "accuracy", 0.5, 2), Score(3, "accuracy", 1.0, 1), Score(None, "confusion/a/b", 1.0, 2)])
    {'accuracy': 0.5}
    """
    return {s.metric: s.value for s in scores if s.client is None and not s.metric.startswith("confusion/")}


def _groups(rows: Rows[R]) -> dict[int | None, list[R]]:
    """All rows (key None), then the rows of each client."""
    groups: dict[int | None, list[R]] = {None: [row for _, row in rows]}
    for client, row in sorted(rows, key=lambda pair: pair[0]):
        groups.setdefault(client, []).append(row)
    return groups
