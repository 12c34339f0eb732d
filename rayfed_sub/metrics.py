"""Scores of generated text, as local `evaluate.Metric` classes: `evaluate.load` fetches code from the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np


def rouge_l_metric(cache_dir: str) -> Any:
    """ROUGE-L as an `evaluate.Metric`: `compute(predictions=[...], references=[...])["rouge_l"]` in [0, 1].

    The F-measure of the longest common subsequence of words (lower case, letters and digits, no stemming),
    averaged over the pairs.  Everything stays in memory, but `evaluate` makes an empty folder in cache_dir.
    """
    # Importing evaluate takes several seconds, hence the class inside.
    import datasets
    import evaluate
    from rouge_score.rouge_scorer import RougeScorer

    class RougeL(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="F-measure of the longest common subsequence of words.",
                citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
                features=datasets.Features({"predictions": text, "references": text}),
            )

        def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
            scorer = RougeScorer(["rougeL"])
            pairs = zip(references, predictions, strict=True)
            scores = [scorer.score(said, heard)["rougeL"].fmeasure for said, heard in pairs]
            return {"rouge_l": float(np.mean(scores))}

    return RougeL(keep_in_memory=True, cache_dir=cache_dir)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure of `predictions` against `references`, in [0, 1].

    Raises ValueError for no pairs, or lists of different lengths.

    >>> round(rouge_l(["the cat sat"], ["the cat ate"]), 4)  # LCS 2 of 3 and 3 words
    0.6667
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    with tempfile.TemporaryDirectory() as folder:
        metric = rouge_l_metric(folder)
        return float(metric.compute(predictions=list(predictions), references=list(references))["rouge_l"])
