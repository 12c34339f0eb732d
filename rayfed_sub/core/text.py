"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

SCORES = {
    "held_out_loss": "held-out loss",
    "perplexity": "perplexity",
    "token_accuracy": "accuracy of the next token",
    "rouge_l": "ROUGE-L of greedy answers",
    "rouge_l_unicode": "ROUGE-L of greedy answers, words of any script",
    "bleu_4": "BLEU-4 of greedy answers",
    "bleu_4_unicode": "BLEU-4 of greedy answers, words of any script",
    "teacher_forced_rouge_l": "ROUGE-L of likeliest tokens",
    "teacher_forced_rouge_l_unicode": "ROUGE-L of likeliest tokens, words of any script",
    "teacher_forced_bleu_4": "BLEU-4 of likeliest tokens",
    "teacher_forced_bleu_4_unicode": "BLEU-4 of likeliest tokens, words of any script",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "subset_accuracy": "accuracy, all labels of a row",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "mean_absolute_error": "mean absolute error",
}
"""The scores of `evaluation/scores.py`, but for classes' own, in the order in which people ask for them."""
UNREAD = "none: its published tokenizer does not read the script"
"""Text for a missing published score whose counterpart over any script exists (`evaluation/generation.py`)."""
UNDEFINED = dict.fromkeys(
    ("matthews", "pearson", "spearman"), "undefined: all predictions, or all labels, are the same"
) | dict.fromkeys(("macro_f1", "micro_f1"), "undefined: no row has a label, and none is predicted")
"""Why a score is missing that the problem has."""
LOWER = ("held_out_loss", "perplexity", "mean_absolute_error")
"""Scores of which less is better."""
SCORES_OF: Mapping[str, tuple[str, ...]] = {
    "causal-lm": ("held_out_loss", "token_accuracy", "perplexity"),
    "classification": ("held_out_loss", "accuracy", "macro_f1", "matthews"),
    "regression": ("held_out_loss", "pearson", "spearman", "mean_absolute_error"),
    "multi-label": ("held_out_loss", "micro_f1", "macro_f1", "subset_accuracy"),
}
"""The scores after every evaluation by the kind of labels, the one for the terminal second."""
KINDS = {
    "causal-lm": "language modelling",
    "classification": "a classification",
    "regression": "a regression",
    "multi-label": "several labels a row",
}
"""The kinds of labels in words."""
_MOST = 6
"""Runs that a figure's label names."""


def problem_of(metrics: Iterable[str]) -> str:
    """The kind of labels that scores are of, where only they are known; a measure of the caller's own may be named like
    one of them.

    >>> problem_of(["held_out_loss", "mean_absolute_error"]), problem_of(["held_out_loss", "token_accuracy"])
    ('regression', 'causal-lm')
    >>> problem_of(["held_out_loss", "accuracy", "macro_f1"]), problem_of(["held_out_loss", "accuracy"])
    ('classification', 'causal-lm')
    """
    known = set(metrics)
    marks = {
        "regression": {"held_out_loss", "mean_absolute_error"},
        "multi-label": {"held_out_loss", "subset_accuracy"},
        "classification": {"held_out_loss", "accuracy", "macro_f1"},
    }
    return next((problem for problem, mark in marks.items() if mark <= known), "causal-lm")


def unit(problem: str) -> str:
    """The unit of the loss.

    >>> unit("regression"), unit("classification")
    ('squared error', 'nats/label')
    """
    return "squared error" if problem == "regression" else "nats/label"


def number(value: float | None) -> str:
    """To four digits; whole numbers whole; "-" for none.

    >>> [number(value) for value in (2.27208, 0.000123, 1600.0, 12345.6, None)]
    ['2.272', '0.000123', '1,600', '1.235e+04', '-']
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def rounded(value: float | None, digits: int = 4) -> float | None:
    """The number with so many digits, for a figure; None where it cannot be drawn.

    >>> rounded(2.272084), rounded(float("nan"))
    (2.272, None)
    """
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def start_in_words(start: Mapping[str, Any]) -> str:
    """The entry `start_from` of a summary.

    >>> start_in_words({"place": "me/adapter", "what": "an adapter of peft's", "wire_bytes": 2_000_000})
    "me/adapter, an adapter of peft's (2 MB)"
    """
    return f"{start['place']}, {start['what']} ({megabytes(start['wire_bytes'])})"


def megabytes(count: float) -> str:
    """Bytes.

    >>> megabytes(3_473_920), megabytes(1.563e9), megabytes(0)
    ('3.474 MB', '1,563 MB', '0 MB')
    """
    return f"{count / 1e6:,.0f} MB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def duration(seconds: float) -> str:
    """Time that something took.

    >>> duration(8.25), duration(75), duration(3675)
    ('8.2 s', '1 min 15 s', '1 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def count(noun: str, number: int) -> str:
    """
    >>> count("round", 1), count("round", 1200)
    ('1 round', '1,200 rounds')
    """
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def score(metric: str, problem: str = "causal-lm") -> str:
    """A score's name in words; problem: that the loss is of, see `SCORES_OF`.

    >>> score("macro_f1"), score("f1/glioma"), score("my_score"), score("rouge/rouge2"), score("meteor/meteor")
    ('macro F1', 'F1 of glioma', 'my score', 'rouge rouge2', 'meteor')
    """
    kind, _, name = metric.partition("/")
    if metric == "held_out_loss":
        return f"held-out loss ({unit(problem)})"
    if is_named(metric):
        return kind if kind == name else f"{kind} {name}"
    return SCORES.get(metric, f"F1 of {name}" if kind == "f1" else metric.replace("_", " "))


def best_in_words(best: Mapping[str, Any]) -> str:
    """The best round of a run's summary.

    >>> best_in_words({"round": 7, "metric": "accuracy", "value": 0.81234})
    '7, accuracy 0.8123'
    """
    return f"{best['round']}, {score(best['metric'])} {number(best['value'])}"


def shown(scores: Mapping[str, Sequence[object]]) -> list[str]:
    """The names of SCORES that are among these, but no score over words of any script that is the published one again;
    then those of metrics that a configuration names, `<metric>/<score>`.

    scores: the values of each score over an evaluation, or several.

    >>> shown({"rouge_l_unicode": [0.1, 0.5], "rouge_l": [0.1, 0.5], "bleu_4_unicode": [0.2, 0.3], "mine": [1.0]})
    ['rouge_l', 'bleu_4_unicode']
    >>> shown({"f1/glioma": [1.0], "meteor/meteor": [0.2]})
    ['meteor/meteor']
    """
    known = [
        name
        for name in SCORES
        if name in scores and (name == (published := published_name(name)) or scores.get(published) != scores[name])
    ]
    return known + [name for name in scores if is_named(name)]


def is_named(score: str) -> bool:
    """True for a score of a metric that a configuration names (`evaluation.metrics`)."""
    kind, slash, _ = score.partition("/")
    return bool(slash) and kind not in ("f1", "confusion")


def published_name(metric: str) -> str:
    """The published score beside a score over the words of any script; other names as they are.

    >>> published_name("rouge_l_unicode"), published_name("accuracy")
    ('rouge_l', 'accuracy')
    """
    return metric.removesuffix("_unicode")


def listed(phrases: Sequence[str], noun: str = "run") -> str:
    """Join a phrase of each of several, as many as a label holds.

    >>> listed(["a: 1", "b: 2"])
    'a: 1; b: 2.'
    """
    more = f"; and {count(noun, len(phrases) - _MOST)} more" if len(phrases) > _MOST else ""
    return f"{'; '.join(phrases[:_MOST])}{more}."


def evenly(places: Sequence[T], most: int) -> list[T]:
    """At most so many of the places, evenly spaced, the first and the last among them.

    >>> evenly(range(9), 3), evenly(range(2), 3)
    ([0, 4, 8], [0, 1])
    """
    if len(places) <= most:
        return list(places)
    return [places[round(at * (len(places) - 1) / (most - 1))] for at in range(most)]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The parts in which dotted names differ.

    >>> short_names(["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj"])
    {'model.layers.0.mlp.up_proj': '0', 'model.layers.11.mlp.up_proj': '11'}
    >>> short_names(["layers.0.mlp.up", "layers.0.mlp.down"])
    {'layers.0.mlp.up': 'up', 'layers.0.mlp.down': 'down'}
    >>> short_names(["a.b", "c"]), short_names(["model.mlp"])
    ({'a.b': 'a.b', 'c': 'c'}, {'model.mlp': 'model.mlp'})
    """
    split = [name.split(".") for name in names]
    if len(names) < 2 or len({len(parts) for parts in split}) > 1:
        return {name: name for name in names}
    differ = [len(set(column)) > 1 for column in zip(*split, strict=True)]
    return {
        name: ".".join(part for part, differs in zip(parts, differ, strict=True) if differs)
        for name, parts in zip(names, split, strict=True)
    }


def first_distinct(candidates: Iterable[Sequence[str]]) -> list[str]:
    """The first of several lists of names without duplicates; without such a list the first one, numbered.

    >>> first_distinct([["run", "run"], ["fedit", "fedftg"]])
    ['fedit', 'fedftg']
    >>> first_distinct([["run", "run"]])
    ['run 1', 'run 2']
    """
    ways = [list(names) for names in candidates]
    numbered = [f"{name} {at + 1}" for at, name in enumerate(ways[0])]
    return next((names for names in ways if len(set(names)) == len(names)), numbered)
