"""Texts that are cut until their tokens have room: the rows that come of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from rayfed_sub.data.pairs import Pairs, Span

_CHARACTERS = 6  # in a token, at most, of all but few texts

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class TokenRow:
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
class Fitted:
    """A question's tokens, whether its text was cut for them, and whether they fit; if not, those of its shortest
    form."""

    tokens: list[int]
    cut: bool
    fits: bool


@dataclass(frozen=True)
class Dropped:
    """A row without room: the smallest max_length that keeps it."""

    least: int


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


def fitted_texts(encode: Encode, pairs: Pairs, rooms: Sequence[int]) -> list[Fitted]:
    """Each question in as many characters as its room of tokens takes.  All rows are searched side by side, because
    tokenizers are an order faster with many texts at a time."""
    texts = list(pairs.questions)
    spans = list(pairs.spans) if len(pairs.spans) else [((0, len(text)),) for text in texts]
    longest = [max((end - begin for begin, end in row_spans), default=0) for row_spans in spans]
    searches = [_search(most, room) for most, room in zip(longest, rooms, strict=True)]
    asked, found = {row: next(search) for row, search in enumerate(searches)}, dict[int, Fitted]()
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


def _search(longest: int, room: int) -> Generator[int, list[int], Fitted]:
    """Yields the characters of each span to try, at most `longest`, is sent the tokens of that try, and returns the
    longest text in at most `room` tokens.  At first no more of a very long text is read than may be needed."""
    low, best = 1, list[int]()
    tokens = yield (tried := min(longest, room * _CHARACTERS))
    if len(tokens) <= room and tried < longest:
        low, best = tried, tokens
        tokens = yield (tried := longest)
    if len(tokens) <= room:
        return Fitted(tokens, cut=False, fits=True)
    high, above = tried, len(tokens)
    if not best:
        best = (yield 1) if high > 1 else tokens
    if len(best) > room:
        return Fitted(best, cut=True, fits=False)
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
    return Fitted(best, cut=True, fits=True)


def first_tokens(encode: Encode, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Tokens of `encode` for callers that need only `max_length` tokens and the closing one: encodes the start of a
    long text, up to a space, where tokens end; the whole text where that gives too few."""
    most = max_length * _CHARACTERS
    made = encode([text if len(text) <= most else text[:most].rpartition(" ")[0] or text[:most] for text in texts])
    again = [row for row, text in enumerate(texts) if len(text) > most and len(made[row]) <= max_length]
    for row, tokens in zip(again, encode([texts[row] for row in again]), strict=True):
        made[row] = tokens
    return made
