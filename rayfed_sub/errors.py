"""The two ways in which this package says no.

A `UserError` is something a person can mend: one line that names the field, the value, what is allowed and
what to do; the command line prints it and exits with code 2.  A `RunError` is a run that could not go on: it
names client, round and stage; exit code 1.  Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input that a person can mend.

    >>> str(UserError("method.rank", 0, "an integer >= 1", "set method.rank=8"))
    'method.rank: got 0; allowed: an integer >= 1; set method.rank=8'
    """

    def __init__(self, field: str, value: object, allowed: str, advice: str = "") -> None:
        self.field, self.value, self.allowed, self.advice = field, value, allowed, advice
        parts = [f"{field}: got {value!r}", f"allowed: {allowed}", *([advice] if advice else [])]
        super().__init__(" ".join("; ".join(parts).split()))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        # Exceptions rebuild themselves from `args`; ours has four, and it crosses process borders.
        return UserError, (self.field, self.value, self.allowed, self.advice)


class RunError(RuntimeError):
    """A run that could not go on: which client, in which round, at which stage, and why."""

    def __init__(self, stage: str, cause: str, *, round: int | None = None, client: int | None = None) -> None:
        self.stage, self.cause, self.round, self.client = stage, cause, round, client
        where = [f"round {round}"] * (round is not None) + [f"client {client}"] * (client is not None)
        super().__init__(f"{', '.join([*where, stage])}: {cause}")

    def __reduce__(self) -> tuple[object, ...]:
        return _run_error, (self.stage, self.cause, self.round, self.client)


def _run_error(stage: str, cause: str, round: int | None, client: int | None) -> RunError:
    return RunError(stage, cause, round=round, client=client)
