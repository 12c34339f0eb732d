"""The two errors that this package raises on purpose.

A `UserError` is something a person can mend: one line that names the field, the value, what is allowed and
what to do; the command line prints it and exits with code 2.  A `RunError` is a run that could not go on: it
names client, round and stage; exit code 1.  Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from urllib.parse import quote, unquote

_SCHEME = r"(?:(?P<web>(?i:https?))|(?!(?i:https?):)[A-Za-z][\w+.-]*)"
_USER = re.compile(rf"""\b({_SCHEME}:/+)(?:[^\s/?#@:'"]*:(?(web)(?!\d+/))[^\s@'"]*|[^\s/?#@:'"]+)@""")
_QUERY = re.compile(r"""\?([^\s'"#]*?)(?=[;:,.)]*(?:[\s'"#]|$))""")
_SECRET = re.compile(r"key|secret|token|passw|pwd|credential|signature|^sig$|auth", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text without the credentials in its URIs: user and password, and such parameters of a query.

    Errors apply it to themselves, `storage/remote.py` to what it calls a place.  After a colon everything up to the @
    is a password, slashes as well, for AWS's secret keys have them; the port of an http URI is none.

    >>> redacted("s3://AKIA:se/cr+et@bucket/run?region=eu-west-1&secret_key=x&scheme=http")
    's3://bucket/run?region=eu-west-1&scheme=http'
    >>> redacted("'s3://bucket/a@b?access_key=x', http://host:9000/a@b: not found")
    "'s3://bucket/a@b', http://host:9000/a@b: not found"
    """
    if ":/" not in text:
        return text
    while (shorter := _USER.sub(r"\1", text)) != text:  # an @ may stand in a password
        text = shorter
    return _QUERY.sub(_without_secrets, text)


def _without_secrets(query: re.Match[str]) -> str:
    kept = [_shown(item) for item in query[1].split("&") if not _SECRET.search(_decoded(item.partition("=")[0]))]
    return f"?{'&'.join(kept)}" if kept != [""] and kept else query[0] if kept else ""


def _shown(item: str) -> str:
    """A parameter as it is, or anew where its value, once decoded, is a URI with credentials."""
    key, equals, value = item.partition("=")
    plain = _decoded(value)
    shorter = redacted(plain)
    return item if shorter == plain else f"{key}{equals}{quote(shorter, safe='')}"


def _decoded(text: str) -> str:
    while (plain := unquote(text)) != text:  # each time shorter
        text = plain
    return text


class UserError(ValueError):
    """Input that a person can mend.

    >>> str(UserError("method.rank", 0, "an integer >= 1", "set method.rank=8"))
    'method.rank: got 0; allowed: an integer >= 1; set method.rank=8'
    """

    def __init__(self, field: str, value: object, allowed: str, advice: str = "") -> None:
        value = redacted(value) if isinstance(value, str) else value
        allowed, advice = redacted(allowed), redacted(advice)
        self.field, self.value, self.allowed, self.advice = field, value, allowed, advice
        parts = [f"{field}: got {redacted(repr(value))}", f"allowed: {allowed}", *([advice] if advice else [])]
        super().__init__(" ".join("; ".join(parts).split()))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        # Exceptions rebuild themselves from `args`; ours has four, and it crosses process borders.
        return UserError, (self.field, self.value, self.allowed, self.advice)


def unknown_word(field: str, word: str, known: Sequence[str]) -> UserError:
    """Error for a word that is none of those known, with the nearest of them.

    >>> str(unknown_word("WHAT", "tsaks", ["methods", "tasks"]))
    "WHAT: got 'tsaks'; allowed: methods or tasks; did you mean tasks?"
    """
    near = get_close_matches(word, known, n=1)
    allowed = " or ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)
    return UserError(field, word, allowed, f"did you mean {near[0]}?" if near else "")


class RunError(RuntimeError):
    """A run that could not go on: which client, in which round, at which stage, and why.

    resume: settings with which the run gets further from its checkpoint; None where it would end in the same way.
    """

    def __init__(
        self,
        stage: str,
        cause: str,
        *,
        round: int | None = None,
        client: int | None = None,
        resume: tuple[str, ...] | None = (),
    ) -> None:
        cause = redacted(cause)
        self.stage, self.cause, self.round, self.client, self.resume = stage, cause, round, client, resume
        where = [f"round {round}"] * (round is not None) + [f"client {client}"] * (client is not None)
        super().__init__(f"{', '.join([*where, stage])}: {cause}")

    def __reduce__(self) -> tuple[object, ...]:
        return _run_error, (self.stage, self.cause, self.round, self.client, self.resume)


def _run_error(
    stage: str, cause: str, round: int | None, client: int | None, resume: tuple[str, ...] | None
) -> RunError:
    return RunError(stage, cause, round=round, client=client, resume=resume)
