"""Pairs as rows of tokens, cut to length, or of pixels.

A row that is longer than `task.max_length` is cut in the user's text alone.  The prompt is rendered anew from the
shortened text, so the tokens of the chat template and of `task.prompt` stay whole for every tokenizer and template.
A chat that is longer ends with an earlier answer, as if the rest had not been said.
"""

from __future__ import annotations

import logging
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.batching import AnyRows
from rayfed_sub.data.chats import Chat, ChatError, Turn
from rayfed_sub.data.columns import ArrayWriter
from rayfed_sub.data.images import Images
from rayfed_sub.data.labels import targets
from rayfed_sub.data.objects import AsTheyAre, Objects
from rayfed_sub.data.pairs import LABELLED, Pairs, Span
from rayfed_sub.data.processors import ImageProcessor, PairTokens, Processor, Tokenizer
from rayfed_sub.data.rows import Ints, Rows

log = logging.getLogger(__name__)
progress = logging.getLogger("rayfed_sub.progress")
"""How far a long reading is, for displays; nobody else hears it."""

_CHARACTERS = 6  # in a token, at most, of all but few texts
_AT_ONCE = 256  # rows in a tokenizer's hands: their lists of integers take ten times the arrays' memory

_SAID = 1.0  # seconds between two words on progress

Encode = Callable[[Sequence[str]], list[list[int]]]
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


@dataclass(frozen=True)
class _Row:
    """A row's tokens, of which the first `prompt` are its prompt, and whether text, answer and turns were cut.
    learned: of a chat, for each token whether it is learned; types: of a pair, each token's text."""

    tokens: list[int]
    prompt: int
    text_cut: bool
    answer_cut: bool
    turns_cut: bool = False
    learned: Sequence[bool] = ()
    types: Sequence[int] = ()


@dataclass(frozen=True)
class _Fitted:
    """A question's tokens, whether its text was cut for them, and whether they fit; if not, those of its shortest
    form."""

    tokens: list[int]
    cut: bool
    fits: bool


@dataclass(frozen=True)
class _Dropped:
    """A row without room: the smallest max_length that keeps it."""

    least: int


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
    kept = np.flatnonzero([isinstance(row, _Row) for row in made])
    rows = [row for row in made if isinstance(row, _Row)]
    least = [row.least for row in made if isinstance(row, _Dropped)]
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


def shortened(text: str, spans: Sequence[Span], most: int) -> str:
    """`text` with at most `most` >= 1 characters of each span, its beginning and its end; what is between spans stays.

    The middle goes, as in LongBench (arXiv 2308.14508, section 4.1): instructions stand at the beginning of long
    prompts or at their end.

    >>> shortened("Q: abcdefgh, by xy", [(3, 11), (16, 18)], most=3)
    'Q: abh, by xy'
    """
    parts, at = [], 0
    for begin, end in spans:
        over = end - begin - most
        cut = begin + (most + 1) // 2 if over > 0 else end
        parts += [text[at:cut], text[cut + over : end] if over > 0 else ""]
        at = end
    return "".join([*parts, text[at:]])


def _rows(pairs: Pairs, processor: Tokenizer, max_length: int) -> list[_Row | _Dropped | None]:
    """A row for each pair; None for one without a token to learn from."""
    if len(pairs.chats):
        return _chats(pairs, processor, max_length)
    if pairs.kind in LABELLED:
        texts = _fitted(processor.texts, pairs, [max_length] * len(pairs))
        return [_classified(text) for text in texts]
    answers = _begun(processor.answers, list(pairs.answers), max_length)
    # An answer's share of the row: all of it, or half of the row.
    shares = [min(len(answer), max_length - max_length // 2) for answer in answers]
    prompts = _fitted(processor.prompts, pairs, [max_length - share for share in shares])
    tail = processor.tail
    return [_answered(prompt, answer, max_length, tail) for prompt, answer in zip(prompts, answers, strict=True)]


def _classified(text: _Fitted) -> _Row | _Dropped | None:
    if not text.tokens:
        return None
    used = len(text.tokens)
    return _Row(text.tokens, used, text.cut, False) if text.fits else _Dropped(used)


def _paired(pairs: Pairs, encode: EncodePairs) -> list[_Row | _Dropped | None]:
    """A row for each pair of texts; least of a dropped one is the length of the whole."""
    texts = [
        (question[:end], question[begin:])
        for question, ((_, end), (begin, _)) in zip(pairs.questions, pairs.spans, strict=True)
    ]
    return [
        _Row(made.tokens, len(made.tokens), made.cut, False, types=made.types)
        if made.fits
        else _Dropped(len(made.tokens))
        for made in encode(texts)
    ]


def _answered(prompt: _Fitted, answer: list[int], max_length: int, tail: int) -> _Row | _Dropped | None:
    if not answer:
        return None
    used = len(prompt.tokens)
    if not prompt.fits:
        return _Dropped(used + min(used, len(answer)))  # half of 2 * used is the prompt's, where the answer is longer
    begun = answer[: max_length - used]
    if tail and len(begun) < len(answer):
        begun[-tail:] = answer[-tail:]
    return _Row([*prompt.tokens, *begun], used, prompt.cut, len(begun) < len(answer))


def _chats(pairs: Pairs, processor: Tokenizer, max_length: int) -> list[_Row | _Dropped | None]:
    chats = list(pairs.chats)
    try:
        made = processor.chats([chat.turns for chat in chats])
    except ChatError as error:
        raise _refused(chats[error.index], error.cause) from None
    rows: list[_Row | _Dropped | None] = []
    for chat, (tokens, learned) in zip(chats, made, strict=True):
        row: _Row | _Dropped | None = _whole_chat(tokens, learned)
        if isinstance(row, _Row) and len(row.tokens) > max_length:
            try:
                row = _shorter_chat(chat.turns, processor, max_length)
            except ChatError as error:
                raise _refused(chat, error.cause) from None
        rows.append(row)
    return rows


def _refused(chat: Chat, cause: str) -> UserError:
    allowed = "chats that the model's chat template renders with every text in its place"
    return UserError("task.messages", str(chat.place), allowed, cause)


def _whole_chat(tokens: list[int], learned: list[bool], turns_cut: bool = False) -> _Row | None:
    if True not in learned:
        return None
    end = len(tokens) - learned[::-1].index(True)  # nothing is learned after it
    begin = end - [*learned[:end][::-1], False].index(False)
    return _Row(tokens[:end], begin, False, False, turns_cut, learned[:end])


def _shorter_chat(turns: Sequence[Turn], processor: Tokenizer, max_length: int) -> _Row | _Dropped | None:
    """The chat up to the latest answer that fits, or else its first exchange with a shorter text and answer."""
    ends = [end for end, (role, _) in enumerate(turns, 1) if role == "assistant"]

    def length(end: int) -> int:
        row = _whole_chat(*processor.chats([turns[:end]])[0])
        return len(row.tokens) if row is not None else 0

    if fitting := bisect_right(ends, max_length, key=length):
        end = ends[fitting - 1]
        return _whole_chat(*processor.chats([turns[:end]])[0], turns_cut=end < len(turns))
    *before, answer = turns[: ends[0]]
    text = before.pop()[1] if before and before[-1][0] == "user" else ""

    def said(shorter: str, answered: Turn = answer) -> tuple[list[int], list[bool]]:
        return processor.chats([[*before, *[("user", shorter)] * bool(text), answered]])[0]

    def prompt(shorter: str) -> list[int]:
        tokens, learned = said(shorter, ("assistant", "."))  # a long answer need not be read at every try
        return tokens[: learned.index(True)]

    tokens, learned = said(text)
    if True not in learned:
        return None
    begin = learned.index(True)
    row = _whole_chat(tokens, learned)
    assert row is not None, "a token is learned"
    tokens, learned = row.tokens[begin:], list(row.learned[begin:])
    share = min(len(tokens), max_length - max_length // 2)
    spans = ((0, len(text)),) if text else ()
    one = Pairs("causal-lm", (text,), (answer[1],), ("",), spans=(spans,))
    (fitted,) = _fitted(lambda texts: list(map(prompt, texts)), one, [max_length - share])
    used = len(fitted.tokens)
    if not fitted.fits:
        return _Dropped(used + min(used, len(tokens)))
    begun, masks = tokens[: max_length - used], learned[: max_length - used]
    return _Row(
        [*fitted.tokens, *begun],
        used,
        fitted.cut,
        len(begun) < len(tokens),
        turns_cut=len(ends) > 1,
        learned=[*[False] * used, *masks],
    )


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


def _fitted(encode: Encode, pairs: Pairs, rooms: Sequence[int]) -> list[_Fitted]:
    """Each question in as many characters as its room of tokens takes.  All rows are searched side by side, because
    tokenizers are an order faster with many texts at a time."""
    texts = list(pairs.questions)
    spans = list(pairs.spans) if len(pairs.spans) else [((0, len(text)),) for text in texts]
    longest = [max((end - begin for begin, end in row_spans), default=0) for row_spans in spans]
    searches = [_search(most, room) for most, room in zip(longest, rooms, strict=True)]
    asked, found = {row: next(search) for row, search in enumerate(searches)}, dict[int, _Fitted]()
    while asked:
        made = encode([shortened(texts[row], spans[row], most) for row, most in asked.items()])
        going_on = {}
        for row, tokens in zip(asked, made, strict=True):
            try:
                going_on[row] = searches[row].send(tokens)
            except StopIteration as end:
                found[row] = end.value
        asked = going_on
    return [found[row] for row in range(len(texts))]


def _search(longest: int, room: int) -> Generator[int, list[int], _Fitted]:
    """Yields the characters of each span to try, at most `longest`, is sent the tokens of that try, and returns the
    longest text in at most `room` tokens.  At first no more of a very long text is read than may be needed."""
    low, best = 1, list[int]()
    tokens = yield (tried := min(longest, room * _CHARACTERS))
    if len(tokens) <= room and tried < longest:
        low, best = tried, tokens
        tokens = yield (tried := longest)
    if len(tokens) <= room:
        return _Fitted(tokens, cut=False, fits=True)
    high, above = tried, len(tokens)
    if not best:
        best = (yield 1) if high > 1 else tokens
    if len(best) > room:
        return _Fitted(best, cut=True, fits=False)
    turn = 0
    while high - low > 1 and len(best) < room:
        # Where the room would be if characters took equal shares of the tokens; every third time the middle, which
        # bounds the number of tries.
        share = 0.5 if turn % 3 == 2 else (room - len(best)) / (above - len(best))
        tried = min(max(low + int((high - low) * share), low + 1), high - 1)
        tokens = yield tried
        if len(tokens) <= room:
            low, best = tried, tokens
        else:
            high, above = tried, len(tokens)
        turn += 1
    return _Fitted(best, cut=True, fits=True)


def _begun(encode: Encode, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Tokens of `encode` for callers that need only `max_length` tokens and the closing one: encodes the start of a
    long text, up to a space, where tokens end; the whole text where that gives too few."""
    most = max_length * _CHARACTERS
    made = encode([text if len(text) <= most else text[:most].rpartition(" ")[0] or text[:most] for text in texts])
    again = [row for row, text in enumerate(texts) if len(text) > most and len(made[row]) <= max_length]
    for row, tokens in zip(again, encode([texts[row] for row in again]), strict=True):
        made[row] = tokens
    return made


def _classes(pairs: Pairs) -> NDArray[Any]:
    """What each row's loss is computed from (`labels.targets`)."""
    return targets(pairs.kind, pairs.answers, pairs.class_names)
