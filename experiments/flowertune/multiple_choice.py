"""FlowerTune's score of multiple-choice answers, and what of it is form: a metric for `evaluation.metrics`.

FlowerTune generates as many tokens as the letter has, and compares what came with the letter: all but letters and
digits becomes a space, and the first character must be a letter from a to e (or, of yes-or-no questions, all of it yes
or no); an answer in any other form is wrong.  So a model that knows the letter but begins with "The" scores below the
25 % of one that guesses in form.  Besides `accuracy` the metric therefore gives `in_form`, the share of answers that
can be right at all, and `accuracy_in_form`, that of the right ones among them (0 where there are none).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import datasets
import evaluate

_LETTERS = frozenset("abcde")
_WORDS = frozenset({"yes", "no"})


def answered(text: str, *, letter: bool) -> str | None:
    """The answer that FlowerTune reads in a text; None where it is in no form of its.

    >>> answered("B. Aspirin", letter=True), answered(" (c)", letter=True), answered("The answer is B", letter=True)
    ('b', 'c', None)
    >>> answered("Yes.", letter=False), answered("yesno", letter=False), answered("maybe", letter=False)
    ('yes', 'yes', None)
    """
    shown = text.lower()
    if "\n##" in shown:  # what follows a heading of the template
        shown = shown.split("\n##")[1].split("\n")[0].strip()
    shown = re.sub(" +", " ", re.sub("[^a-z0-9]", " ", shown)).strip()
    if letter:
        first = shown[:1]
        return first if first in _LETTERS else None
    for doubled, meant in (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no")):
        if doubled in shown:
            shown = shown.replace(doubled, meant)
            break
    return shown if shown in _WORDS else None


def scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Shares from 0 to 1 of all answers, of the last of those in form."""
    wanted = [reference.strip().lower() for reference in references]
    given = [answered(text, letter=len(reference) == 1) for text, reference in zip(predictions, wanted, strict=True)]
    # An answer in no form counts as its own text, as "maybe" is right where that is wanted.
    right = [
        (text.lower() if answer is None else answer) == reference
        for text, answer, reference in zip(predictions, given, wanted, strict=True)
    ]
    formed = [hit for hit, answer in zip(right, given, strict=True) if answer is not None]
    return {
        "accuracy": sum(right) / len(right),
        "in_form": len(formed) / len(right),
        "accuracy_in_form": sum(formed) / len(formed) if formed else 0.0,
    }


class MultipleChoice(evaluate.Metric):  # type: ignore[misc]
    """`scores` in the form that `evaluate.load` takes from this file."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description=str(__doc__), citation="", features=datasets.Features(columns))

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return scores(predictions, references)
