"""Question and answer as text, before they meet a tokenizer: their canonical order, repeats, and choices among them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import Problem
from rayfed_sub.core.rng import stream
from rayfed_sub.data.chats import Chat
from rayfed_sub.data.columns import Labels, coded_texts, numbers_of, taken
from rayfed_sub.data.rows import Ints

Kind = Literal["causal-lm", "classification", "regression", "multi-label", "own"]
LABELLED = get_args(Problem)
"""Kinds whose rows have labels in place of answers."""
OVER_WHITE, SCALED = "over white", "scaled"
Span = tuple[int, int]
"""Begin and end of a part of a text, in characters."""


log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Spans(Sequence[tuple[Span, ...]]):
    """Parts of each text.  ends int32 (rows, parts, 2): where each begins and ends; those without a character count
    for nothing."""

    ends: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int, /) -> tuple[Span, ...]: ...
    @overload
    def __getitem__(self, index: slice, /) -> Spans: ...
    def __getitem__(self, index: int | slice, /) -> tuple[Span, ...] | Spans:
        if isinstance(index, slice):
            return Spans(self.ends[index])
        return tuple((begin, end) for begin, end in self.ends[index].tolist() if begin < end)

    def take(self, rows: Ints) -> Spans:
        """The parts of the texts at `rows`, in that order."""
        return Spans(self.ends[rows])


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows as text, by columns.  answers: texts to learn, or labels (`labels.py`); keys: the value by which a row
    may be dealt out (such as its module), "" where the task has none; class_names is empty for
    language modelling and regression, else in the order of the class numbers.
    images: of an image classification each row's image as in its file; questions are then digests of their pixels.
    spans: of each question the parts that are the user's text, in order; the rest is a template's own and is never cut.
    Empty: questions are the user's as a whole.
    paired: True for pairs of texts: spans are the first text and the second.
    chats: of a task of chats each row's; its question is then the history of its last answer, its answer that one.
    plain: True for plain text, which has neither: questions are the texts, answers are empty.
    splits: of each row the official split that it is in, train, validation or test; empty where all are in train.
    changes: of each image OVER_WHITE where it has transparent pixels, SCALED where it has 16 bits, else "".
    objects: of rows of the caller's own (kind own) their pickles; questions are then digests of what they hold, answers
    are empty."""

    kind: Kind
    questions: Sequence[str]
    answers: Sequence[str]
    keys: Sequence[str]
    class_names: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()
    spans: Sequence[tuple[Span, ...]] = ()
    chats: Sequence[Chat] = ()
    plain: bool = False
    splits: Sequence[str] = ()
    changes: tuple[str, ...] = ()
    objects: tuple[bytes, ...] = ()
    paired: bool = False

    def __len__(self) -> int:
        return len(self.questions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pairs) and all(map(_equal, _columns(self), _columns(other)))

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: Ints) -> Pairs:
        """The pairs at `indices`, in that order."""
        if len(indices) == len(self) and np.array_equal(indices, np.arange(len(self))):
            return self
        columns = (self.questions, self.answers, self.keys)
        more = (self.images, self.spans, self.chats)
        last = (self.splits, self.changes, self.objects)
        questions, answers, keys = (taken(column, indices) for column in columns)
        images, spans, chats = (taken(column, indices) for column in more)
        splits, changes, objects = (taken(column, indices) for column in last)
        names, plain, paired = self.class_names, self.plain, self.paired
        return Pairs(
            *(self.kind, questions, answers, keys, names, images, spans, chats),
            *(plain, splits, changes, objects, paired),
        )

    @property
    def trained(self) -> NDArray[np.bool_]:
        """Which rows are in no official validation or test split, (rows,)."""
        return Labels.of(self.splits).are("train") if len(self.splits) else np.ones(len(self), bool)


def _columns(pairs: Pairs) -> list[object]:
    return [getattr(pairs, field.name) for field in fields(pairs)]


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        return list(one) == list(other)
    return one == other


def distinct(pairs: Pairs) -> Pairs:
    """Each (question, answer) once, of a classification each question: the first.  Copies could stand in training and
    held-out rows at once, and those with another label contradict each other.  One warning says how many were dropped.
    Plain text keeps its repeats: how often something is said is what a model of it learns, and each client has its own.
    So do rows of the caller's own, of which nobody knows what a repeat means.  Rows of official validation and test
    splits stay as they are.

    >>> distinct(Pairs("causal-lm", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"))).keys
    ('1', '2')
    >>> distinct(Pairs("classification", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"), ("a", "b"))).keys
    ('1',)
    """
    return pairs.take(_firsts(pairs, _digested(pairs), np.arange(len(pairs))))


def ordered(pairs: Pairs) -> Pairs:
    """The pairs in canonical order, by the digests of question and answer, then by key: the order of a source's rows
    and files decides nothing.

    >>> one, other = (Pairs("causal-lm", tuple(rows), tuple(rows), ("", "")) for rows in ("ab", "ba"))
    >>> ordered(one) == ordered(other)
    True
    """
    return pairs.take(_order(pairs, _digested(pairs)))


def canonical(pairs: Pairs) -> Pairs:
    """The pairs in canonical order without repeats: `distinct` of `ordered`, in one go."""
    found = _digested(pairs)
    order = _order(pairs, found)
    return pairs.take(order[_firsts(pairs, found, order)])


Digests = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Of each question and of each answer, uint8 (rows, 16)."""


def _digested(pairs: Pairs) -> Digests:
    asked: Iterable[str] = pairs.questions
    if pairs.paired:  # the same characters may be two other texts, which a line ends in another place
        asked = (f"{spans[0][1]} {question}" for question, spans in zip(pairs.questions, pairs.spans, strict=True))
    return digests(asked), digests(pairs.answers)


def _order(pairs: Pairs, found: Digests) -> Ints:
    """The rows in canonical order."""
    splits = Labels.of(pairs.splits or [""] * len(pairs))
    asked, said = (one.view(">u8").T for one in found)
    # Of several keys numpy sorts by the last one first.
    return np.lexsort((splits.numbers, Labels.of(pairs.keys).numbers, *said[::-1], *asked[::-1]))


def _firsts(pairs: Pairs, found: Digests, order: Ints) -> Ints:
    """Places in `order` of the rows that stay."""
    if pairs.plain or pairs.objects:
        return np.arange(len(order))
    in_train = pairs.trained[order]
    trained = np.flatnonzero(in_train)
    rows = order[trained]
    answers = numbers_of(found[1])[rows]
    said = numbers_of(found[0])[rows]
    if pairs.kind not in LABELLED:
        said = said * len(pairs) + answers
    _, first, group = np.unique(said, return_index=True, return_inverse=True)
    if len(first) < len(trained):
        contradicting = int((answers != answers[first][group]).sum())
        words = "history and answer" if len(pairs.chats) else "prompt and answer"
        what = "pixels" if pairs.images else "text" if pairs.kind in LABELLED else words
        other = f" ({contradicting:,} of them with another label)" if contradicting else ""
        counts = f"{len(trained) - len(first):,} of {len(trained):,} rows"
        log.warning("%s have the %s of a row before them; dropped%s", counts, what, other)
    return np.sort(np.concatenate([trained[first], np.flatnonzero(~in_train)]))


def digests(texts: Iterable[str]) -> NDArray[np.uint8]:
    """A digest of each text, uint8 (texts, 16)."""
    if isinstance(texts, Labels):
        return digests(texts.names)[texts.numbers]
    found = bytearray()
    for coded in coded_texts(texts):
        found += hashlib.blake2b(coded, digest_size=16).digest()
    return np.frombuffer(found, np.uint8).reshape(-1, 16)


def capped(pairs: Pairs, max_rows: int | None, seed: int) -> Pairs:
    """At most `max_rows` pairs of the training rows, drawn without replacement, and all rows of official validation and
    test splits, in their first order."""
    trained = np.flatnonzero(pairs.trained)
    if max_rows is None or len(trained) <= max_rows:
        return pairs
    drawn = stream(seed, "max-rows").permutation(len(trained))[:max_rows]
    return pairs.take(np.sort(np.concatenate([trained[drawn], np.flatnonzero(~pairs.trained)])))


def of_keys(pairs: Pairs, keys: tuple[str, ...]) -> Pairs:
    """The pairs whose key is one of `keys`, and those without a key, which are nobody's."""
    return pairs.take(np.flatnonzero(Labels.of(pairs.keys).are(*keys, "")))
