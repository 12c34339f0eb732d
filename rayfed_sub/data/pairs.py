"""Question and answer as text: what every task becomes before it meets a tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import compress
from typing import Literal

import numpy as np

from rayfed_sub.core.rng import stream
from rayfed_sub.data.rows import Ints

Kind = Literal["causal-lm", "classification"]
Span = tuple[int, int]
"""Begin and end of a part of a text, in characters."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Rows as text.  answers: what is to be said, or the name of the class; keys: the value by which a row
    may be dealt out (such as its module), "" where the task has none; class_names is empty for
    language modelling, else in the order of the class numbers.
    images: of an image classification each row's image as in its file; questions are then digests of their pixels.
    spans: of each question the parts that are the user's text, in order; the rest is a template's own and is never cut.
    Empty: questions are the user's as a whole."""

    kind: Kind
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()
    spans: tuple[tuple[Span, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, indices: Ints) -> Pairs:
        """The pairs at `indices`, in that order."""
        questions, answers, keys = (
            tuple(column[int(index)] for index in indices) for column in (self.questions, self.answers, self.keys)
        )
        images = tuple(self.images[int(index)] for index in indices) if self.images else ()
        spans = tuple(self.spans[int(index)] for index in indices) if self.spans else ()
        return Pairs(self.kind, questions, answers, keys, self.class_names, images, spans)


def distinct(pairs: Pairs) -> Pairs:
    """Each (question, answer) once, of a classification each question: the first.  Copies could stand in training and
    held-out rows at once, and those with another label contradict each other.  One warning says how many were dropped.

    >>> distinct(Pairs("causal-lm", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"))).keys
    ('1', '2')
    >>> distinct(Pairs("classification", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"), ("a", "b"))).keys
    ('1',)
    """
    first: dict[tuple[str, ...], int] = {}
    contradicting = 0
    for index, pair in enumerate(zip(pairs.questions, pairs.answers, strict=True)):
        kept = first.setdefault(pair if pairs.kind == "causal-lm" else pair[:1], index)
        contradicting += pairs.answers[kept] != pair[1]
    if len(first) < len(pairs):
        what = "pixels" if pairs.images else "text" if pairs.kind == "classification" else "prompt and answer"
        other = f" ({contradicting:,} of them with another label)" if contradicting else ""
        counts = f"{len(pairs) - len(first):,} of {len(pairs):,} rows"
        log.warning("%s have the %s of a row before them; dropped%s", counts, what, other)
    return pairs.take(np.fromiter(first.values(), np.int64, len(first)))


def capped(pairs: Pairs, max_rows: int | None, seed: int) -> Pairs:
    """At most `max_rows` pairs drawn without replacement, in their first order."""
    if max_rows is None or len(pairs) <= max_rows:
        return pairs
    drawn = stream(seed, "max-rows").permutation(len(pairs))[:max_rows]
    return pairs.take(np.sort(drawn))


def of_keys(pairs: Pairs, keys: tuple[str, ...]) -> Pairs:
    """The pairs whose key is one of `keys`."""
    wanted = frozenset(keys)
    kept = compress(range(len(pairs)), (key in wanted for key in pairs.keys))
    return pairs.take(np.fromiter(kept, np.int64))
