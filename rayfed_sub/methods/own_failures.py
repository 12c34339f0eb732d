"""Failures of the caller's own methods and hooks, in one line that names function, round and client."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rayfed_sub.core.errors import RunError, UserError

_LENGTH = 300  # characters of a cause

T = TypeVar("T")


class AnswerError(Exception):
    """What is wrong with what a function returns, in words."""


@contextmanager
def named(
    kind: str, owner: object, function: str, round: int | None = None, client: int | None = None
) -> Iterator[None]:
    """Makes a RunError of what a function of a method's or a hook's raises; kind: which of them `owner` is.

    What this package's own classes raise is a bug and keeps its traceback.  A RunError gets the round that it lacks.
    """
    try:
        yield
    except UserError:
        raise
    except RunError as error:
        if error.round is not None or round is None:
            raise
        whose = client if error.client is None else error.client
        raise RunError(error.stage, error.cause, round=round, client=whose, resume=error.resume) from error
    except Exception as error:  # the caller's code raises anything
        known = type(owner).__module__.partition(".")[0] == __name__.partition(".")[0]
        if known and not isinstance(error, AnswerError):
            raise
        what = str(error) if isinstance(error, AnswerError) else f"it raises {type(error).__name__}: {error}"
        stage = f"{kind} {getattr(owner, 'name', type(owner).__qualname__)}.{function}"
        cause = textwrap.shorten(what, _LENGTH)
        raise RunError(stage, cause, round=round, client=client, resume=None) from error


def answer(found: Any, kind: type[T]) -> T:
    """What a function has returned.  Raises AnswerError where it is none of that kind."""
    if not isinstance(found, kind):
        raise AnswerError(f"it gives {shown(found)}, not {kind.__name__}")
    return found


def shown(found: Any) -> str:
    """A wrong answer in words.

    >>> shown(None), shown(3)
    ('nothing', 'a value of type int')
    """
    return "nothing" if found is None else f"a value of type {type(found).__qualname__}"
