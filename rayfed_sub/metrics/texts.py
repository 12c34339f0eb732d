"""Scores of generated texts against the wanted ones, each in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L of `predictions` against `references`, in [0, 1].

    The F-measure of the longest common subsequence of words (lower case, letters and digits of ASCII, no stemming),
    averaged over the pairs; 0 for a pair with no such word on either side, equal texts included.  By rouge-score; Lin
    2004, "ROUGE: A Package for Automatic Evaluation of Summaries".  Raises ValueError for no pairs, or lists of
    different lengths.

    >>> round(rouge_l(["the cat sat"], ["the cat ate"]), 4)  # LCS 2 of 3 and 3 words
    0.6667
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(predictions, references)
    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, predictions, strict=True)
    return fmean(scorer.score(wanted, told)["rougeL"].fmeasure for wanted, told in pairs)


def bleu_4(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 of `predictions`, each with one reference, in [0, 1].

    exp(min(0, 1 - wanted words / told words)) times the geometric mean of the precisions of 1- to 4-grams, counted over
    all pairs together; upper and lower case differ, words as WMT's "13a" cuts them.  With sacrebleu's defaults: an
    n-gram length without a match counts half a match, then a quarter, and so on; no word in common is 0, and so is a
    corpus too short to have a 4-gram, equal texts included.  By sacrebleu, whose scores go to 100; Post 2018, "A Call
    for Clarity in Reporting BLEU Scores".  Raises ValueError for no pairs, or lists of different lengths.

    >>> round(bleu_4(["the cat sat on a mat"], ["the cat sat on the mat"]), 4)  # (5/6 * 3/5 * 2/4 * 1/3) ** (1/4)
    0.5373
    """
    import sacrebleu

    _check(predictions, references)
    return min(1.0, sacrebleu.corpus_bleu(list(predictions), [list(references)]).score / 100)


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
