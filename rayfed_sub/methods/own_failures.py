"""Failures of the caller's own methods and hooks, in one line that names function, round and client."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch

from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.finite import not_finite
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Change,
    Client,
    ClientState,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
)
from rayfed_sub.methods.protocol import Method

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
        if _is_known(owner) and not isinstance(error, AnswerError):
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


def check_finite(owner: object, found: Tensors, *given: Tensors) -> None:
    """AnswerError for a tensor that is not finite of a function of the caller's own that was given finite ones: no
    learning rate is to blame."""
    if _is_known(owner):
        return
    failure = not_finite(found)
    if failure is not None and not any(map(not_finite, given)):
        raise AnswerError(f"it gives {failure}")


def _given(result: LocalResult) -> tuple[Tensors, ...]:
    """All tensors of a client's round."""
    blocks = {f"{layer}/{side}": x for layer, pair in result.blocks.items() for side, x in enumerate(pair)}
    return result.tensors, result.moments, result.memory, blocks


def _changes(found: Any, shape: ModelShape) -> Mapping[str, Change]:
    """The changes of a model.  Raises AnswerError naming the first target without one, or with one of another size."""
    changes = answer(found, Mapping)  # type: ignore[type-abstract]
    for layer in shape.targets:
        if layer.name not in changes:
            raise AnswerError(f"it gives no change of {layer.name}")
        change = answer(changes[layer.name], Change)
        sizes = [torch.Size((len(block.left), block.right.shape[-1])) for block in change.blocks]
        sizes += [] if change.dense is None else [change.dense.shape]
        if wrong := [size for size in sizes if size != (layer.m, layer.n)]:
            size, asked = (" x ".join(map(str, one)) for one in (wrong[0], (layer.m, layer.n)))
            raise AnswerError(f"it gives {layer.name} a change of {size}, not {asked}")
    return changes


def shown(found: Any) -> str:
    """A wrong answer in words.

    >>> shown(None), shown(3)
    ('nothing', 'a value of type int')
    """
    return "nothing" if found is None else f"a value of type {type(found).__qualname__}"


def _is_known(owner: object) -> bool:
    return type(owner).__module__.partition(".")[0] == __name__.partition(".")[0]


@dataclass(frozen=True)
class Reported:
    """The functions of a method of the caller's own.  They raise RunError, naming function, round and client, where its
    code fails or gives what it should not; `accumulate`, which knows no round, without one."""

    method: Method

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def personal(self) -> bool:
        return self.method.personal

    def check(self, shape: ModelShape) -> None:
        with self._named("check"):
            self.method.check(shape)

    def at_most(self) -> Reported:
        """The method whose bytes are the most that this one's can be (`Method.at_most`)."""
        largest = getattr(self.method, "at_most", None)
        if largest is None:
            return self
        with self._named("at_most"):
            return replace(self, method=largest())

    def shared_basis(self, round: int) -> int:
        with self._named("shared_basis", round):
            basis: int = cast(Any, self.method).shared_basis(round)
            return basis

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        with self._named("init_server", 0):
            return answer(self.method.init_server(weights, shape, seed), ServerState)

    def broadcast(self, server: ServerState) -> Broadcast:
        with self._named("broadcast", server.round):
            return answer(self.method.broadcast(server), Broadcast)

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        with self._named("download_bytes", server.round, client.id):
            return self.method.download_bytes(server, shape, client, since)

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        with self._named("start_client", broadcast.round, client.id):
            return answer(self.method.start_client(broadcast, state, client, shape), Start)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        with self._named("upload", broadcast.round, result.client):
            update = answer(self.method.upload(broadcast, result, weight, shape), Update)
            check_finite(self.method, update.tensors, *_given(result))
            return update

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        with self._named("client_state", broadcast.round, result.client):
            tensors = answer(self.method.client_state(broadcast, result, shape), Mapping)  # type: ignore[type-abstract]
            check_finite(self.method, tensors, *_given(result))
            return tensors

    def accumulator(self, server: ServerState, shape: ModelShape) -> Accumulator:
        with self._named("accumulator", server.round):
            return answer(self.method.accumulator(server, shape), Accumulator)

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        with self._named("accumulate", None, update.client):
            return answer(self.method.accumulate(total, update, shape), Accumulator)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        with self._named("aggregate", server.round):
            return answer(self.method.aggregate(server, total, shape), ServerState)

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        with self._named("model", server.round):
            return _changes(self.method.model(server, shape), shape)

    def personal_model(self, server: ServerState, state: ClientState | None, shape: ModelShape) -> Mapping[str, Change]:
        with self._named("personal_model", server.round):
            return _changes(self.method.personal_model(server, state, shape), shape)

    def _named(
        self, function: str, round: int | None = None, client: int | None = None
    ) -> AbstractContextManager[None]:
        return named("method", self.method, function, round, client)


def reported(method: Method) -> Method:
    """The method, its failures named if it is the caller's own."""
    # `Method` asks for attributes of a class; those that the engine reads follow from the method here.
    return method if _is_known(method) else cast(Method, Reported(method))
