"""Pairs as rows of tokens, cut to length, or of pixels.

A row that is longer than `task.max_length` is cut in the user's text alone.  The prompt is rendered anew from the
shortened text, so the tokens of the chat template and of `task.prompt` stay whole for every tokenizer and template.
A chat that is longer ends with an earlier answer, as if the rest had not been said.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.data.batching import AnyRows
from rayfed_sub.data.chat_rows import chat_rows
from rayfed_sub.data.columns import ArrayWriter
from rayfed_sub.data.cutting import Dropped, Fitted, TokenRow, first_tokens, fitted_texts
from rayfed_sub.data.images import Images
from rayfed_sub.data.labels import targets
from rayfed_sub.data.objects import AsTheyAre, Objects
from rayfed_sub.data.pairs import LABELLED, Pairs
from rayfed_sub.data.processors import ImageProcessor, PairTokens, Processor, Tokenizer
from rayfed_sub.data.rows import Ints, Rows

log = logging.getLogger(__name__)
progress = logging.getLogger("rayfed_sub.progress")
"""How far a long reading is, for displays; nobody else hears it."""

_AT_ONCE = 256  # rows in a tokenizer's hands: their lists of integers take ten times the arrays' memory

_SAID = 1.0  # seconds between two words on progress

EncodePairs = Callable[[Sequence[tuple[str, str]]], list[PairTokens]]


@dataclass(frozen=True)
class Cuts:
    """Numbers of rows that were longer than `task.max_length`.

    cut: kept, with a shorter text or answer, or fewer turns; prompts, answers, turns: of these, with a shorter user's
    text, with a shorter answer, with fewer turns; dropped: left out, as no character of the user's text would have had
    room.  least: the smallest max_length with which a dropped row would be kept, 0 where none was dropped.
    """

    cut: int = 0
    prompts: int = 0
    answers: int = 0
    turns: int = 0
    dropped: int = 0
    least: int = 0


def tokenised(pairs: Pairs, processor: Processor, max_length: int) -> tuple[AnyRows, Ints, Cuts]:
    """The rows as the model reads them, the index of the pair behind each, int64 (rows,), and numbers of cuts.

    Language modelling: prompt then answer, at most `max_length` tokens.  In longer rows the answer keeps all of
    itself, or at least half of `max_length`, and then loses its end and with it the end token: a cut answer must not
    teach the model to stop there.  The prompt is cut in the user's text (`shortened`).  Rows with a label: the
    text is cut in the same way, special tokens stay; a pair as its tokenizer does it (`Tokenizer.pairs`).  Rows without
    room for a character of the user's text, and rows without a token to learn from, are dropped.  Each is counted in a
    warning.  Images become pixels.

    Chats: rendered as a whole; a longer one ends with the latest answer that fits.  Where none does, its first answer
    and the user's text before it are cut as an answer and its prompt are.  Raises UserError (task.messages) for a chat
    that the model's chat template refuses.

    Plain text: chunks, several rows with the same index (`chunked`).
    Rows of the caller's own stay as they are.
    """
    if isinstance(processor, AsTheyAre):
        digests = [bytes.fromhex(question) for question in pairs.questions]
        return Objects.of(pairs.objects, digests, processor.batch), np.arange(len(pairs)), Cuts()
    if isinstance(processor, ImageProcessor):
        pixels = [processor.pixels(content) for content in pairs.images]
        return Images.of(pixels, _classes(pairs), processor.mean, processor.std), np.arange(len(pairs)), Cuts()
    rows, kept, cuts, silent = _Parts(), [np.empty(0, np.int64)], list[Cuts](), 0
    encode = processor.pairs(max_length) if pairs.paired else None
    for part in _side_by_side(partial(_made, processor=processor, max_length=max_length, paired=encode), pairs):
        rows.add(part.rows)
        kept.append(part.kept)
        cuts.append(part.cuts)
        silent += part.silent
    if silent:
        log.warning("%s rows have no tokens to learn from; dropped", f"{silent:,} of {len(pairs):,}")
    counts = _counted(cuts)
    if summary := in_words(counts.cut, counts.prompts, counts.answers, counts.dropped, counts.turns):
        log.warning("rows longer than task.max_length=%d, of %s: %s", max_length, f"{len(pairs):,}", summary)
    return rows.done(), np.concatenate(kept), counts


class _Parts:
    """Rows that come in parts: their tokens in a file, where they are many."""

    def __init__(self) -> None:
        self._tokens, self._learned = ArrayWriter(np.int32), ArrayWriter(np.bool_)
        self._types = ArrayWriter(np.int8)
        self._rest = [Rows.of([], [])]

    def add(self, part: Rows) -> None:
        self._tokens.add(part.tokens)
        self._learned.add(part.learned)
        self._types.add(part.types)
        # An empty slice would hold the part's tokens.
        none = {name: np.empty(0, getattr(part, name).dtype) for name in ("tokens", "learned", "types")}
        self._rest.append(replace(part, **none))

    def done(self) -> Rows:
        lengths, prompts = (
            np.concatenate([getattr(part, name) for part in self._rest]) for name in ("lengths", "prompts")
        )
        # Those of no row have another shape than numbers and lists of labels.
        classes = np.concatenate([part.classes for part in self._rest if len(part.classes)] or [np.empty(0, np.int64)])
        begins = np.cumsum(lengths, dtype=np.int64) - lengths
        return Rows(self._tokens.done(), begins, lengths, prompts, classes, self._learned.done(), self._types.done())


@dataclass(frozen=True, eq=False)
class _Made:
    """Rows of some pairs, the pairs' indices, int64 (rows,), numbers of cuts, and of pairs without tokens."""

    rows: Rows
    kept: Ints
    cuts: Cuts
    silent: int


def _made(pairs: Pairs, begin: int, *, processor: Tokenizer, max_length: int, paired: EncodePairs | None) -> _Made:
    """The rows of these pairs, the first of which has the index `begin`."""
    if pairs.plain:
        return _chunks(pairs, begin, processor, max_length)
    made = _rows(pairs, processor, max_length) if paired is None else _paired(pairs, paired)
    kept = np.flatnonzero([isinstance(row, TokenRow) for row in made])
    rows = [row for row in made if isinstance(row, TokenRow)]
    least = [row.least for row in made if isinstance(row, Dropped)]
    cuts = Cuts(
        cut=sum(row.text_cut or row.answer_cut or row.turns_cut for row in rows),
        prompts=sum(row.text_cut for row in rows),
        answers=sum(row.answer_cut for row in rows),
        turns=sum(row.turns_cut for row in rows),
        dropped=len(least),
        least=min(least, default=0),
    )
    learned = [row.learned for row in rows] if len(pairs.chats) else []
    classes = _classes(pairs)[kept] if pairs.kind in LABELLED else np.empty(0, np.int64)
    types = [row.types for row in rows]
    tokens = Rows.of([row.tokens for row in rows], [row.prompt for row in rows], classes, learned, types)
    return _Made(tokens, kept + begin, cuts, made.count(None))


def _side_by_side(make: Callable[[Pairs, int], _Made], pairs: Pairs) -> Iterator[_Made]:
    """What `make` makes of the pairs, some at a time, in order; a few at once, since tokenizers leave Python alone."""
    begins, done = iter(range(0, len(pairs), _AT_ONCE)), 0

    def begun(begin: int) -> Future[_Made]:
        return pool.submit(make, pairs.take(np.arange(begin, min(begin + _AT_ONCE, len(pairs)))), begin)

    cores, said = os.cpu_count() or 1, time.monotonic()
    with ThreadPoolExecutor(cores) as pool:
        coming = deque(begun(begin) for begin in islice(begins, 2 * cores))
        while coming:
            yield coming.popleft().result()
            if time.monotonic() - said > _SAID:
                said = time.monotonic()
                progress.info("tokenised %s of %s rows", f"{min(done + _AT_ONCE, len(pairs)):,}", f"{len(pairs):,}")
            done += _AT_ONCE
            coming.extend(begun(begin) for begin in islice(begins, 1))


def in_words(cut: int, prompts: int, answers: int, dropped: int, turns: int = 0) -> str:
    """The counts of `Cuts`; "" where all are 0.

    >>> in_words(cut=1200, prompts=3, answers=1198, dropped=2)
    '1,200 cut (3 in the text, 1,198 in the answer), 2 dropped'
    >>> in_words(0, 0, 0, 2), in_words(0, 0, 0, 0)
    ('2 dropped', '')
    >>> in_words(cut=3, prompts=0, answers=1, dropped=0, turns=3)
    '3 cut (1 in the answer, 3 after an earlier answer)'
    """
    parts = {"in the text": prompts, "in the answer": answers, "after an earlier answer": turns}
    where = ", ".join(f"{count:,} {part}" for part, count in parts.items() if count)
    return ", ".join([*[f"{cut:,} cut ({where})"] * (cut > 0), *[f"{dropped:,} dropped"] * (dropped > 0)])


def _rows(pairs: Pairs, processor: Tokenizer, max_length: int) -> list[TokenRow | Dropped | None]:
    """A row for each pair; None for one without a token to learn from."""
    if len(pairs.chats):
        return chat_rows(pairs, processor, max_length)
    if pairs.kind in LABELLED:
        texts = fitted_texts(processor.texts, pairs, [max_length] * len(pairs))
        return [_classified(text) for text in texts]
    answers = first_tokens(processor.answers, list(pairs.answers), max_length)
    # An answer's share of the row: all of it, or half of the row.
    shares = [min(len(answer), max_length - max_length // 2) for answer in answers]
    prompts = fitted_texts(processor.prompts, pairs, [max_length - share for share in shares])
    tail = processor.tail
    return [_answered(prompt, answer, max_length, tail) for prompt, answer in zip(prompts, answers, strict=True)]


def _classified(text: Fitted) -> TokenRow | Dropped | None:
    if not text.tokens:
        return None
    used = len(text.tokens)
    return TokenRow(text.tokens, used, text.cut, False) if text.fits else Dropped(used)


def _paired(pairs: Pairs, encode: EncodePairs) -> list[TokenRow | Dropped | None]:
    """A row for each pair of texts; least of a dropped one is the length of the whole."""
    texts = [
        (question[:end], question[begin:])
        for question, ((_, end), (begin, _)) in zip(pairs.questions, pairs.spans, strict=True)
    ]
    return [
        TokenRow(made.tokens, len(made.tokens), made.cut, False, types=made.types)
        if made.fits
        else Dropped(len(made.tokens))
        for made in encode(texts)
    ]


def _answered(prompt: Fitted, answer: list[int], max_length: int, tail: int) -> TokenRow | Dropped | None:
    if not answer:
        return None
    used = len(prompt.tokens)
    if not prompt.fits:
        return Dropped(used + min(used, len(answer)))  # half of 2 * used is the prompt's, where the answer is longer
    begun = answer[: max_length - used]
    if tail and len(begun) < len(answer):
        begun[-tail:] = answer[-tail:]
    return TokenRow([*prompt.tokens, *begun], used, prompt.cut, len(begun) < len(answer))


def _chunks(pairs: Pairs, begin: int, processor: Tokenizer, max_length: int) -> _Made:
    rows, behind, silent = list[list[int]](), list[int](), 0
    for number, tokens in enumerate(processor.documents(list(pairs.questions)), begin):
        silent += not tokens
        made = chunked(tokens, max_length)
        rows += made
        behind += [number] * len(made)
    return _Made(Rows.of(rows, [1] * len(rows)), np.asarray(behind, np.int64), Cuts(), silent)


def chunked(tokens: Sequence[int], most: int) -> list[list[int]]:
    """Chunks of at most `most` >= 2 tokens, which overlap in one: the last of a chunk is the first of the next, where
    it is no label but what the next token follows.  So every token but the first of all is a label once.

    >>> chunked([1, 2, 3, 4, 5], 3), chunked([1, 2, 3], 3), chunked([1], 3)
    ([[1, 2, 3], [3, 4, 5]], [[1, 2, 3]], [])
    """
    return [list(tokens[begin : begin + most]) for begin in range(0, len(tokens) - 1, most - 1)]


def _counted(cuts: Sequence[Cuts]) -> Cuts:
    least = min((part.least for part in cuts if part.dropped), default=0)
    counts = (field.name for field in fields(Cuts) if field.name != "least")
    return Cuts(**{name: sum(getattr(part, name) for part in cuts) for name in counts}, least=least)


def _classes(pairs: Pairs) -> NDArray[Any]:
    """What each row's loss is computed from (`labels.targets`)."""
    return targets(pairs.kind, pairs.answers, pairs.class_names)
