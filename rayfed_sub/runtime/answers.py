"""The coordinator's answers, waited for as long as it lives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from ray import ObjectRefGenerator
from ray.exceptions import RayTaskError

from rayfed_sub.core.errors import RunError, UserError

_SECONDS = 600.0  # for an answer that takes no work


def answer(coordinator: Any, reference: Any, stage: str) -> Any:
    """The coordinator's answer, or the cause of its failure."""
    _wait(coordinator, reference, stage)
    try:
        return ray.get(reference, timeout=_SECONDS)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, RunError | UserError) else error from None


def stream_of(coordinator: Any, stream: ObjectRefGenerator, stage: str) -> Iterator[Any]:
    """The stream's references as they come."""
    while True:
        _wait(coordinator, stream, stage)
        try:
            yield next(stream)
        except StopIteration:
            return


def _wait(coordinator: Any, coming: Any, stage: str) -> None:
    """Waits for a reference, or for a stream's next, as long as the coordinator is alive: its second thread says so.

    Raises RunError where it hangs.
    """
    while not ray.wait([coming], timeout=_SECONDS)[0]:
        if not ray.wait([coordinator.alive.remote()], timeout=_SECONDS)[0]:
            raise RunError(stage, f"the coordinator has not answered for {_SECONDS:.0f} s")
