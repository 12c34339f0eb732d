"""Causes of a client's own failure, one line each, for both executors and the worker."""

from __future__ import annotations

import textwrap

from rayfed_sub.core.errors import RunError
from rayfed_sub.core.types import LocalResult, Start
from rayfed_sub.data.batching import Batch, Batches

_LENGTH = 300  # characters; an error message may hold whole records


def drawn(batches: Batches, t: int) -> Batch | str:
    """Batch number t, or why it cannot be drawn: a client's data may raise, and that is the client's failure alone.

    >>> drawn([{}, {}], 2)
    'batch of local step 2: IndexError: list index out of range'
    """
    try:
        return batches[t]
    except Exception as error:
        return textwrap.shorten(f"batch of local step {t}: {type(error).__name__}: {error}", _LENGTH)


def failed(client: int, start: Start, cause: str) -> LocalResult:
    """The result of a client whose training ended with an error, as if it had taken no step."""
    metrics = {"loss": 0.0, "loss_last": 0.0, "labels": 0.0, "steps": 0.0, "periods": 1.0}
    return LocalResult(
        client, start.tensors, start.moments, start.step, {}, 1.0, 1, metrics, cause, trained=start.trained
    )


def client_failed(cause: str, n: int, client: int) -> RunError:
    """The end of a run whose configuration does not let a failed client be skipped.

    A client fails in the same way when the run goes on from its checkpoint.  Skipping mends what is wrong with one
    client's data; a learning rate at which losses overflow is everybody's.
    """
    skip = "federation.on_client_failure=skip"
    if cause.startswith("non-finite"):
        advice = f"lower optimizer.lr and begin anew in another folder; {skip} would leave such clients out"
        return RunError("local training", f"{cause}; {advice}", round=n, client=client, resume=None)
    return RunError("local training", f"{cause}; {skip} would go on without it", round=n, client=client, resume=(skip,))
