"""Pairs as rows of tokens, cut to length, or of pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from rayfed_sub.data.codec import Codec, PixelCodec, TextCodec
from rayfed_sub.data.images import Images
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.rows import Ints, Rows

log = logging.getLogger(__name__)

_CHARACTERS = 6  # in a token, at most, of all but few texts
_AT_ONCE = 1024  # rows in a tokenizer's hands: their lists of integers take ten times the arrays' memory


def tokenised(pairs: Pairs, codec: Codec, max_length: int) -> tuple[Rows | Images, Ints]:
    """The rows as the model reads them, and the index of the pair behind each, int64 (rows,).

    Language modelling: prompt then answer, at most `max_length` tokens; what is too long loses the answer's end first,
    and only where the prompt alone leaves no room for one answer token, the prompt's beginning.  Classification: the
    text's end is cut, a closing special token stays.  Rows without a token to learn from are dropped, and counted in
    a warning.  Images become pixels.
    """
    if isinstance(codec, PixelCodec):
        pixels = [codec.pixels(content) for content in pairs.images]
        return Images.of(pixels, _classes(pairs), codec.mean, codec.std), np.arange(len(pairs))
    made = [
        row
        for begin in range(0, len(pairs), _AT_ONCE)
        for row in _rows(pairs.take(np.arange(begin, min(begin + _AT_ONCE, len(pairs)))), codec, max_length)
    ]
    kept = np.flatnonzero([row is not None for row in made])
    if len(kept) < len(made):
        log.warning("%s rows have no tokens to learn from; dropped", f"{len(made) - len(kept):,} of {len(made):,}")
    rows = [row for row in made if row is not None]
    classes = _classes(pairs.take(kept))
    return Rows.of([tokens for tokens, _ in rows], [prompt for _, prompt in rows], classes), kept


def _rows(pairs: Pairs, codec: TextCodec, max_length: int) -> list[tuple[list[int], int] | None]:
    if pairs.kind == "classification":
        texts = _begun(codec.texts, pairs.questions, max_length)
        return [_classified(text, codec.eos, max_length) for text in texts]
    both = zip(codec.prompts(pairs.questions), _begun(codec.answers, pairs.answers, max_length), strict=True)
    return [_answered(prompt, answer, max_length) for prompt, answer in both]


def _begun(
    encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str], max_length: int
) -> list[list[int]]:
    """As `encode`, for who needs only `max_length` tokens and the closing one: of a long text no more is read than may
    be needed, up to a space, where tokens end.  Where that was too little, the whole text is."""
    most = max_length * _CHARACTERS
    made = encode([text if len(text) <= most else text[:most].rpartition(" ")[0] or text[:most] for text in texts])
    again = [row for row, text in enumerate(texts) if len(text) > most and len(made[row]) <= max_length]
    for row, tokens in zip(again, encode([texts[row] for row in again]), strict=True):
        made[row] = tokens
    return made


def _classes(pairs: Pairs) -> list[int]:
    """The number of each pair's class; none for language modelling."""
    number = {name: index for index, name in enumerate(pairs.class_names)}
    return [number[answer] for answer in pairs.answers] if number else []


def _answered(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], int] | None:
    prompt = prompt[-(max_length - 1) :]
    return ((prompt + answer)[:max_length], len(prompt)) if answer else None


def _classified(text: list[int], eos: int, max_length: int) -> tuple[list[int], int] | None:
    if len(text) > max_length:
        text = [*text[: max_length - 1], text[-1]] if text[-1] == eos else text[:max_length]
    return (text, len(text)) if text else None
