"""Pairs as token rows, cut to length."""

from __future__ import annotations

import logging

import numpy as np

from rayfed_sub.data.codec import Codec
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.rows import Ints, Rows

log = logging.getLogger(__name__)


def tokenised(pairs: Pairs, codec: Codec, max_length: int) -> tuple[Rows, Ints]:
    """The rows of at most `max_length` tokens, and the index of the pair behind each, int64 (rows,).

    Language modelling: prompt then answer; what is too long loses the answer's end first, and only where the
    prompt alone leaves no room for one answer token, the prompt's beginning.  Classification: the text's end
    is cut, a closing special token stays.  Rows without a token to learn from are dropped, and counted in
    a warning.
    """
    made = [
        _answered(codec.prompt(question), codec.answer(answer), max_length)
        if pairs.kind == "causal-lm"
        else _classified(codec.text(question), codec.eos, max_length)
        for question, answer in zip(pairs.questions, pairs.answers, strict=True)
    ]
    kept = np.flatnonzero([row is not None for row in made])
    if len(kept) < len(made):
        log.warning("%d of %d rows have no tokens to learn from; dropped", len(made) - len(kept), len(made))
    rows = [row for row in made if row is not None]
    number = {name: index for index, name in enumerate(pairs.class_names)}
    classes = [number[pairs.answers[index]] for index in kept] if number else ()
    return Rows.of([tokens for tokens, _ in rows], [prompt for _, prompt in rows], classes), kept


def _answered(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], int] | None:
    prompt = prompt[-(max_length - 1) :]
    return ((prompt + answer)[:max_length], len(prompt)) if answer else None


def _classified(text: list[int], eos: int, max_length: int) -> tuple[list[int], int] | None:
    if len(text) > max_length:
        text = [*text[: max_length - 1], text[-1]] if text[-1] == eos else text[:max_length]
    return (text, len(text)) if text else None
