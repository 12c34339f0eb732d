"""Question and answer as text: what every task becomes before it meets a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import Literal

import numpy as np

from rayfed_sub.data.rows import Ints
from rayfed_sub.streams import stream

Kind = Literal["causal-lm", "classification"]


@dataclass(frozen=True)
class Pairs:
    """Rows as text.  answers: what is to be said, or the name of the class; keys: the value by which a row
    may be dealt out (such as its module), "" where the task has none; class_names is empty for
    language modelling, else in the order of the class numbers."""

    kind: Kind
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, indices: Ints) -> Pairs:
        """The pairs at `indices`, in that order."""
        questions, answers, keys = (
            tuple(column[int(index)] for index in indices) for column in (self.questions, self.answers, self.keys)
        )
        return Pairs(self.kind, questions, answers, keys, self.class_names)


def distinct(pairs: Pairs) -> Pairs:
    """Each (question, answer) once, the first: copies could stand in training and held-out rows at once.

    >>> distinct(Pairs("causal-lm", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"))).keys
    ('1', '2')
    """
    first: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(zip(pairs.questions, pairs.answers, strict=True)):
        first.setdefault(pair, index)
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
