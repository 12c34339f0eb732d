"""The built-in scores as `evaluate.Metric` classes, for code that uses evaluate; nothing is fetched from the hub.

The engine calls the functions directly: importing evaluate takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed_sub.data.batching import IGNORED
from rayfed_sub.evaluation.classification import class_scores, confusion
from rayfed_sub.evaluation.generation import TEXT_SCORES
from rayfed_sub.evaluation.language import perplexity, token_accuracy


def metric(name: str, cache_dir: str) -> Any:
    """A metric of `METRICS` as an `evaluate.Metric` with `add`, `add_batch` and `compute`.

    Everything stays in memory, but `evaluate` makes an empty folder in cache_dir.  `compute` returns:

    - rouge_l, bleu_4: {name: score, or None} of texts, as published; rouge_l_unicode, bleu_4_unicode: over the words of
      any script.
    - token_accuracy: {name: share, or None} of token numbers; a reference of -100 is no label.
    - perplexity: {name: value}; predictions are losses, nats of one label each, and there are no references.
    - macro_f1: `class_scores`, and `confusion`, of class numbers; needs `compute(names=[...])`, the classes' names.

    Raises ValueError for another name; `compute` raises the errors of the functions.
    """
    import datasets
    import evaluate

    if name not in METRICS:
        raise ValueError(f"metric {name!r}; there are {', '.join(METRICS)}")
    form = METRICS[name]
    info = evaluate.MetricInfo(
        description=form.description,
        citation="",
        features=datasets.Features({column: datasets.Value(kind) for column, kind in form.columns.items()}),
    )

    def compute(self: Any, **given: Any) -> dict[str, Any]:
        return form.compute(**given)

    # evaluate takes a metric's name from its class.
    kind = type(name, (evaluate.Metric,), {"_info": lambda self: info, "_compute": compute})
    return kind(keep_in_memory=True, cache_dir=cache_dir)


@dataclass(frozen=True)
class Form:
    """Description of an `evaluate.Metric`: its columns with their types, and the function that computes it."""

    description: str
    columns: Mapping[str, str]
    compute: Callable[..., dict[str, Any]]


def _text_score(name: str) -> Callable[..., dict[str, Any]]:
    def compute(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
        return {name: TEXT_SCORES[name](predictions, references)}

    return compute


def _token_accuracy(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float | None]:
    asked = [
        (predicted, wanted) for predicted, wanted in zip(predictions, references, strict=True) if wanted != IGNORED
    ]
    return {"token_accuracy": token_accuracy(sum(predicted == wanted for predicted, wanted in asked), len(asked))}


def _perplexity(predictions: Sequence[float]) -> dict[str, float]:
    if not predictions:
        raise ValueError("no losses")
    return {"perplexity": perplexity(math.fsum(predictions) / len(predictions))}


def _macro_f1(predictions: Sequence[int], references: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    scores = class_scores(references, predictions, names)
    return {**scores, "confusion": confusion(references, predictions, len(names))}


_TEXTS = {"predictions": "string", "references": "string"}
_NUMBERS = {"predictions": "int64", "references": "int64"}
_TEXT_DESCRIPTIONS = {
    "rouge_l": "Mean F-measure of the longest common subsequence of words of ASCII letters and digits.",
    "rouge_l_unicode": "Mean F-measure of the longest common subsequence of words of any script.",
    "bleu_4": "Corpus BLEU with one reference, 0 to 1, of words as WMT's 13a cuts them.",
    "bleu_4_unicode": "Corpus BLEU with one reference, 0 to 1, of words of any script.",
}

METRICS: Mapping[str, Form] = {
    **{name: Form(description, _TEXTS, _text_score(name)) for name, description in _TEXT_DESCRIPTIONS.items()},
    "token_accuracy": Form("Share of the labels that were foretold.", _NUMBERS, _token_accuracy),
    "perplexity": Form("exp of the mean loss in nats per label.", {"predictions": "float64"}, _perplexity),
    "macro_f1": Form("F1 of each class and their mean, accuracy, confusion matrix.", _NUMBERS, _macro_f1),
}
