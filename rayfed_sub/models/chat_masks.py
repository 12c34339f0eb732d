"""Chats as tokens of a chat template, with what the assistant says of them.

A template with `{% generation %}` says itself which text is the assistant's.  Of the others it is found by rendering:
the assistant speaks from where the generation prompt ends, after which a deployed model goes on, to the special token
that ends its turn.  The chat is rendered whole, then with marks in place of its texts, which shows the template's own
text between them, and up to each answer.  No part of it is taken for the beginning of another without a look: templates
that drop earlier thinking render a chat's beginning otherwise than the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed_sub.data.chats import ChatError, Turn

Render = Callable[[Sequence[Turn], bool], str]
"""Text of turns, with or without a generation prompt.  Raises ChatError."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Marked:
    """A rendered chat.  spans: of each answer what is learned, in characters; closed: False where the last has no
    special token that ends it."""

    text: str
    spans: tuple[tuple[int, int], ...]
    closed: bool


def chat_tokens(
    tokenizer: Any, template: str, eos: int, chats: Sequence[Sequence[Turn]]
) -> list[tuple[list[int], list[bool]]]:
    """Tokens of each chat, and for each token whether the assistant says it.

    eos: ends the last answer where the template closes it with no special token.  Raises ChatError for a chat that
    the template refuses, or of which it cannot be found where the answers are.
    """
    own = _GENERATION.search(template) is not None
    ends = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = sorted((end for end in ends if end != tokenizer.bos_token), key=len, reverse=True)
    marked = []
    for index, turns in enumerate(chats):
        try:
            by_template = _by_template(tokenizer, template, turns) if own else None
            found = by_template or marked_chat(lambda said, prompt: _rendered(tokenizer, said, prompt), turns, ends)
        except ValueError as error:
            raise ChatError(index, str(error)) from None
        marked.append(found)
    return [
        (tokens, learned) if one.closed else _closed(tokens, learned, eos)
        for one, (tokens, learned) in zip(marked, _masked(tokenizer, marked), strict=True)
    ]


def marked_chat(render: Callable[[Sequence[Turn], bool], str], turns: Sequence[Turn], ends: Sequence[str]) -> Marked:
    """The chat as text, and where the answers are in it.  ends: special tokens, the longest first.

    Raises ValueError with what is in the way.

    >>> def render(turns, prompt):
    ...     return "".join(f"<{role}> {text}<end>" for role, text in turns) + "<assistant>" * prompt
    >>> chat = marked_chat(render, [("user", "why?"), ("assistant", "so")], ["<end>"])
    >>> chat.text[slice(*chat.spans[0])]
    ' so<end>'
    """
    whole = render(turns, False)
    between = _between(render, turns)
    spans, at, closed = [], 0, True
    for number, (role, text) in enumerate(turns):
        begin = at + len(between[number])
        if role != "assistant":
            if not whole.startswith(between[number] + text, at):
                raise ValueError(_changed(number))
            at = begin + len(text)
            continue
        if number and len(asked := render(turns[:number], True)) >= at and whole.startswith(asked):
            begin = len(asked)
        elif not whole.startswith(between[number], at):
            raise ValueError(_changed(number))
        last = number + 1 == len(turns)
        tail = between[number + 1]
        if last:
            at = len(whole) - len(tail) if whole.endswith(tail) else -1
        else:
            at = whole.find(tail + turns[number + 1][1], begin)
        if at < begin or not whole[begin:at].strip():
            raise ValueError(_changed(number))
        spaces = len(tail) - len(tail.lstrip())
        end = next((end for end in ends if tail.startswith(end, spaces)), "")
        spans.append((begin, at + spaces + len(end) if end else at))
        closed = bool(end)
    return Marked(whole, tuple(spans), closed)


def _changed(number: int) -> str:
    return f"the template leaves out or changes the text of message {number + 1}, or its surroundings"


def _between(render: Callable[[Sequence[Turn], bool], str], turns: Sequence[Turn]) -> list[str]:
    """The template's own text before each turn's, and after the last; an empty text, which a template may tell from
    others, has none before it."""
    marks = [f"\ue000{number}\ue001" if text else "" for number, (_, text) in enumerate(turns)]
    text = render([(role, mark) for (role, _), mark in zip(turns, marks, strict=True)], False)
    parts = []
    for number, mark in enumerate(marks):
        before, found, text = text.partition(mark) if mark else ("", "-", text)
        if not found:
            raise ValueError(_changed(number))
        parts.append(before)
    return [*parts, text]


def _rendered(tokenizer: Any, turns: Sequence[Turn], prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(_messages(turns), add_generation_prompt=prompt, tokenize=False)
    except Exception as error:  # a template is a stranger's program, and fails in every way that Jinja has
        raise ValueError(f"the template says: {_line(error)}") from None
    return text


def _by_template(tokenizer: Any, template: str, turns: Sequence[Turn]) -> Marked | None:
    """The chat with the template's own marks; None where they mark nothing.

    `apply_chat_template` has a mask of tokens, but looks only for those of a mark's first and last character: a byte
    pair's white space may belong to none, and then it ends the mask, or marks all that follows."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), (spans,) = render_jinja_template(
            conversations=[_messages(turns)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise ValueError(f"the template says: {_line(error)}") from None
    return Marked(text, tuple(spans), closed=True) if any(text[begin:end].strip() for begin, end in spans) else None


def _messages(turns: Sequence[Turn]) -> list[Mapping[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _masked(tokenizer: Any, chats: Sequence[Marked]) -> list[tuple[list[int], list[bool]]]:
    """A token is learned where a character of it is; white space without a place of its own counts where it ends."""
    if not tokenizer.is_fast:  # it does not know which characters its tokens are
        return [_in_pieces(tokenizer, chat) for chat in chats]
    if not chats:
        return []
    given: dict[str, bool] = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
    made = tokenizer([chat.text for chat in chats], return_offsets_mapping=True, **given)
    return [
        (list(tokens), [any(_inside(place, span) for span in chat.spans) for place in offsets])
        for chat, tokens, offsets in zip(chats, made["input_ids"], made["offset_mapping"], strict=True)
    ]


def _inside(place: tuple[int, int], span: tuple[int, int]) -> bool:
    (begin, end), (first, last) = place, span
    return first < begin <= last if begin == end else first < end and begin < last


def _in_pieces(tokenizer: Any, chat: Marked) -> tuple[list[int], list[bool]]:
    tokens, learned, at = list[int](), list[bool](), 0
    for begin, end in [*chat.spans, (len(chat.text), len(chat.text))]:
        for piece, said in ((chat.text[at:begin], False), (chat.text[begin:end], True)):
            made = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] if piece else []
            tokens += made
            learned += [said] * len(made)
        at = end
    return tokens, learned


def _closed(tokens: list[int], learned: list[bool], eos: int) -> tuple[list[int], list[bool]]:
    """The chat with `eos` after its last answer, and nothing behind it."""
    end = len(learned) - learned[::-1].index(True) if True in learned else 0
    return [*tokens[:end], eos], [*learned[:end], True]
