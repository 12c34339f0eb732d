"""Chats as rows of tokens: rendered as a whole, or up to an earlier answer where the whole is too long."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.chats import Chat, ChatError, Turn
from rayfed_sub.data.cutting import Dropped, TokenRow, fitted_texts
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.processors import Tokenizer


def chat_rows(pairs: Pairs, processor: Tokenizer, max_length: int) -> list[TokenRow | Dropped | None]:
    chats = list(pairs.chats)
    try:
        made = processor.chats([chat.turns for chat in chats])
    except ChatError as error:
        raise _refused(chats[error.index], error.cause) from None
    rows: list[TokenRow | Dropped | None] = []
    for chat, (tokens, learned) in zip(chats, made, strict=True):
        row: TokenRow | Dropped | None = _whole_chat(tokens, learned)
        if isinstance(row, TokenRow) and len(row.tokens) > max_length:
            try:
                row = _shorter_chat(chat.turns, processor, max_length)
            except ChatError as error:
                raise _refused(chat, error.cause) from None
        rows.append(row)
    return rows


def _refused(chat: Chat, cause: str) -> UserError:
    allowed = "chats that the model's chat template renders with every text in its place"
    return UserError("task.messages", str(chat.place), allowed, cause)


def _whole_chat(tokens: list[int], learned: list[bool], turns_cut: bool = False) -> TokenRow | None:
    if True not in learned:
        return None
    end = len(tokens) - learned[::-1].index(True)  # nothing is learned after it
    begin = end - [*learned[:end][::-1], False].index(False)
    return TokenRow(tokens[:end], begin, False, False, turns_cut, learned[:end])


def _shorter_chat(turns: Sequence[Turn], processor: Tokenizer, max_length: int) -> TokenRow | Dropped | None:
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
    (fitted,) = fitted_texts(lambda texts: list(map(prompt, texts)), one, [max_length - share])
    used = len(fitted.tokens)
    if not fitted.fits:
        return Dropped(used + min(used, len(tokens)))
    begun, masks = tokens[: max_length - used], learned[: max_length - used]
    return TokenRow(
        [*fitted.tokens, *begun],
        used,
        fitted.cut,
        len(begun) < len(tokens),
        turns_cut=len(ends) > 1,
        learned=[*[False] * used, *masks],
    )
