"""Chats: cells of a table's column of messages as turns, and what is wrong with those that are none."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.columns import Labels, Texts, numbers_of
from rayfed_sub.data.readers import Place
from rayfed_sub.data.rows import Ints

log = logging.getLogger(__name__)

Turn = tuple[str, str]
"""Role (system, user or assistant) and text."""

ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant"},
}
"""Roles of OpenAI's form and of ShareGPT's, and those that they mean."""

_KEYS = (("role", "content"), ("from", "value"))
_ALLOWED = (
    "lists of {role, content} or {from, value}, or their JSON text, of texts with the roles system (once, at the "
    "beginning), user (human) and assistant (gpt)"
)


@dataclass(frozen=True)
class Chat:
    """A chat that ends with an answer.  place: its file or data set, and its row there; turns: at most one system text,
    the first, then texts of user and assistant, none of them empty but for the system's."""

    place: Place
    turns: tuple[Turn, ...]

    @property
    def history(self) -> str:
        """The turns before the last answer, as one text: what makes two chats ask the same."""
        return json.dumps(self.turns[:-1], ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class Chats(Sequence[Chat]):
    """Chats of which only those that are asked for are read.  histories: their `Chat.history`; answers: their last
    texts; files: their files; rows int32 (chats,): their numbers there."""

    histories: Texts
    answers: Texts
    files: Labels
    rows: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int, /) -> Chat: ...
    @overload
    def __getitem__(self, index: slice, /) -> Chats: ...
    def __getitem__(self, index: int | slice, /) -> Chat | Chats:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        before = [(role, text) for role, text in json.loads(self.histories[index])]
        place = Place(self.files[index], int(self.rows[index]))
        return Chat(place, (*before, ("assistant", self.answers[index])))

    def take(self, rows: Ints) -> Chats:
        """The chats at `rows`, in that order."""
        return Chats(self.histories.take(rows), self.answers.take(rows), self.files.take(rows), self.rows[rows])


class ChatError(Exception):
    """A chat that cannot be rendered.  index: its number among those given; cause: as a person may read it."""

    def __init__(self, index: int, cause: str) -> None:
        self.index, self.cause = index, cause
        super().__init__(cause)

    def __reduce__(self) -> tuple[type[ChatError], tuple[int, str]]:
        return ChatError, (self.index, self.cause)


def read_chats(column: str, cells: Iterable[Any], places: Iterable[Place]) -> Iterator[Chat | None]:
    """The chat of each cell, which stands at such a place; None for an empty one and one without an answer.

    Turns after the last answer are left out, which one warning counts: nothing in them is learned.  Texts lose their
    outer white space.  Raises UserError (task.messages) naming the file, the row and what is wrong with the first bad
    chat.

    >>> cells = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], None,
    ...          '[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": " So. "}]']
    >>> places = [Place("a.jsonl", row) for row in (1, 2, 3)]
    >>> [chat and chat.turns for chat in read_chats("messages", cells, places)]
    [(('user', 'Why?'), ('assistant', 'So.')), None, (('user', 'Why?'), ('assistant', 'So.'))]
    """
    count = unanswered = 0
    for place, cell in zip(places, cells, strict=True):
        try:
            turns = _turns(cell)
        except ValueError as error:
            raise UserError("task.messages", column, _ALLOWED, f"{place}: {error}") from None
        answered = max((end for end, (role, _) in enumerate(turns, 1) if role == "assistant"), default=0)
        unanswered += 0 < answered < len(turns)
        count += 1
        yield Chat(place, tuple(turns[:answered])) if answered else None
    if unanswered:
        log.warning(
            "task.messages: %s of %s chats go on after their last answer; those turns are left out",
            f"{unanswered:,}",
            f"{count:,}",
        )


def beginnings(chats: Iterable[Chat]) -> Ints:
    """A number for each chat, int64, equal for those alone that begin with the same one of them, but for case and
    spaces: whoever learns one of these learns answers of the others.  What the assistant says unasked begins nothing.

    >>> ask, say, more = ("user", "Why?"), ("assistant", "So."), ("user", "How?")
    >>> turns = [(ask, say), (ask, say, more, say), (ask, ("assistant", "No."), more, say)]
    >>> first, second, third = beginnings(Chat(Place("a.jsonl", 1), own) for own in turns)
    >>> bool(first == second), bool(second == third)
    (True, False)
    """
    found, counts = bytearray(), list[int]()
    for chat in chats:
        said, asked, count = hashlib.blake2b(digest_size=16), False, 0
        for number, (role, text) in enumerate(chat.turns, 1):
            words = " ".join(text.casefold().split())
            said.update(f"{role} {len(words)} {words}".encode())
            asked = asked or role == "user"
            if number == len(chat.turns) or (asked and role == "assistant"):
                found += said.digest()
                count += 1
        counts.append(count)
    numbers = numbers_of(np.frombuffer(found, np.uint8).reshape(-1, 16))
    ends = np.cumsum(counts, dtype=np.int64)
    whole = np.zeros(len(numbers), bool)
    whole[numbers[ends - 1]] = True
    places = np.flatnonzero(whole[numbers])
    firsts: Ints = numbers[places[np.searchsorted(places, ends - counts)]]
    return firsts


def _turns(cell: Any) -> list[Turn]:
    """The turns of a cell.  Raises ValueError for what is no chat."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip()):
        return []
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise ValueError("the text is no JSON list of messages") from None
    if isinstance(cell, Mapping) and cell and all(isinstance(column, list) for column in cell.values()):
        # `datasets` keeps a list of mappings as a mapping of lists where a feature is an old Sequence.
        cell = [dict(zip(cell, message, strict=True)) for message in zip(*cell.values(), strict=True)]
    if not isinstance(cell, list | tuple):
        raise ValueError(f"{_named(cell)}, not a list of messages")
    turns = [_turn(number, message) for number, message in enumerate(cell, 1)]
    for number, (role, _) in enumerate(turns, 1):
        if role == "system" and number > 1:
            raise ValueError(f"message {number} is another system text, or stands after the beginning")
    return turns


def _turn(number: int, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {_named(message)}, not a mapping")
    found = [(message[role], message.get(text)) for role, text in _KEYS if message.get(role) is not None]
    if not found:
        keys = ", ".join(map(str, message)) or "nothing"
        raise ValueError(f"message {number} has no role: neither role and content nor from and value, but {keys}")
    said, text = found[0]
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise ValueError(f"message {number} has the role {said!r}")
    if not isinstance(text, str):
        raise ValueError(f"message {number} ({said}) has {_named(text)} in place of a text")
    if not text.strip() and role != "system":
        raise ValueError(f"message {number} ({said}) is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # of JSON in a text, whose escapes no reader of files has seen
        raise ValueError(f"message {number} ({said}) holds half of a surrogate pair, which is no character") from None
    return role, text.strip()


def _named(value: Any) -> str:
    """Kind of a value for messages."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", bytes: "bytes"}
    if value is None:
        return "nothing"
    return kinds.get(type(value), "a list" if isinstance(value, list | tuple) else "a mapping")
