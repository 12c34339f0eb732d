"""A method with a hook is a method: the engine runs it as any other, and counts, plans, stores and resumes it so.

The hook's tensors stand beside the method's in the same records, as `hook/<name>`; neither sees the other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor

from rayfed_sub.core.types import (
    HOOK,
    Accumulator,
    Broadcast,
    Change,
    Client,
    ClientState,
    LocalResult,
    LocalStep,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging
from rayfed_sub.methods.hooks import CohortMean, LocalHook, moves_server
from rayfed_sub.methods.own_failures import AnswerError, Reported, check_finite, named, shown
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import moved

R = TypeVar("R", ServerState, Broadcast, ClientState, Update, Accumulator)

_CLIENTS, _WEIGHT = f"{HOOK}clients", f"{HOOK}weight"  # counts of the sum: clients in it, and their weight


class SharedBasis(Method, Protocol):
    """A method whose clients all train in one basis."""

    def shared_basis(self, round: int) -> int:
        """See `Method`."""


@dataclass(frozen=True)
class Hooked:
    """The functions of `Method` with the hook's beside the method's.  clients: of the federation.

    They raise RunError, naming function, round and client, where the hook's code fails or gives what it should not."""

    method: SharedBasis
    hook: LocalHook
    clients: int

    personal = False  # a client's own model has tensors that are not shared

    @property
    def name(self) -> str:
        return self.method.name

    def check(self, shape: ModelShape) -> None:
        self.method.check(shape)

    def at_most(self) -> Hooked:
        """With the method whose bytes are the most that this one's can be (`Method.at_most`)."""
        largest = getattr(self.method, "at_most", None)
        return self if largest is None else replace(self, method=largest())

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        server = self.method.init_server(weights, shape, seed)
        return _with(server, self._begun(server, shape))

    def broadcast(self, server: ServerState) -> Broadcast:
        own, held = _parted(server)
        return _with(self.method.broadcast(own), self._sent(server.round, held))

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        own, held = _parted(server)
        return self.method.download_bytes(own, shape, client, since) + wire_bytes(self._sent(server.round, held))

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        own, received = _parted(broadcast)
        device = next(iter(broadcast.tensors.values())).device
        kept: Tensors = {}
        if state is not None:
            last = state.round - 1  # a state is for the round after the one that made it
            state, kept = _parted(state)
            if self.method.shared_basis(last) != self.method.shared_basis(broadcast.round):
                kept = {}
        start = self.method.start_client(own, state, client, shape)
        kept = {name: tensor.to(device) for name, tensor in kept.items()}
        trained = {name: start.tensors[name].to(device) for name in start.trained}
        with self._named("begin", broadcast.round, client.id):
            memory = _tensors(self.hook.begin(received, kept, trained))
        return replace(start, correct=partial(self._corrected, broadcast.round, client.id), memory=memory)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        update = self.method.upload(_parted(broadcast)[0], result, weight, shape)
        with self._named("upload", broadcast.round, result.client):
            sent = _tensors(self.hook.upload(*_ended(result)))
            check_finite(self.hook, sent, result.tensors, result.memory)
            return _with(update, sent)

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        tensors = self.method.client_state(_parted(broadcast)[0], result, shape)
        with self._named("client_state", broadcast.round, result.client):
            kept = _tensors(self.hook.client_state(*_ended(result)))
            check_finite(self.hook, kept, result.tensors, result.memory)
            return {**tensors, **_stored(kept)}

    def accumulator(self, server: ServerState, shape: ModelShape) -> Accumulator:
        return self.method.accumulator(_parted(server)[0], shape)

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        (own, sums), (sent, more) = _parted(total), _parted(update)
        added = self.method.accumulate(own, sent, shape)
        with self._named("upload", None, update.client):
            common = more.keys() & sums.keys()
            _check_shapes(*({name: tensors[name] for name in common} for tensors in (more, sums)))
            beside = averaging.add(Accumulator(total.counts.get(_WEIGHT, 0.0), sums), more, update.weight)
        counts = {_CLIENTS: total.counts.get(_CLIENTS, 0.0) + 1, _WEIGHT: beside.weight}
        return replace(_with(added, beside.tensors), counts={**added.counts, **counts})

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        (before, held), (own, sums) = _parted(server), _parted(total)
        after = self.method.aggregate(before, own, shape)
        if total.counts.get(_CLIENTS):
            names = moved(before, after)
            mean = CohortMean(
                sent=averaging.mean(Accumulator(total.counts[_WEIGHT], sums)),
                before={name: before.tensors[name] for name in names},
                after={name: after.tensors[name] for name in names},
                trained=round(total.counts[_CLIENTS]),
                clients=self.clients,
            )
            with self._named("aggregate", before.round):
                held, learned = map(_tensors, _pair(self.hook.aggregate(held, mean)))
                _check_shapes(learned, {name: after.tensors[name] for name in names if name in learned})
                if learned and not moves_server(self.hook):
                    raise AnswerError(f"it replaces {next(iter(learned))}, but says keeps_mean")
            after = replace(after, tensors={**after.tensors, **learned})
        if self.method.shared_basis(before.round) != self.method.shared_basis(after.round):
            held = self._begun(after, shape)
        return _with(after, held)

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        return self.method.model(_parted(server)[0], shape)

    personal_model = averaging.no_personal_model

    def _named(self, function: str, round: int | None, client: int | None = None) -> AbstractContextManager[None]:
        return named("hook", self.hook, function, round, client)

    def _begun(self, server: ServerState, shape: ModelShape) -> Tensors:
        trained = _trained(self.method, server, shape)
        with self._named("init_server", server.round):
            return _tensors(self.hook.init_server(trained))

    def _sent(self, round: int, held: Tensors) -> Tensors:
        with self._named("broadcast", round):
            return _tensors(self.hook.broadcast(held))

    def _corrected(self, round: int, client: int, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        """The hook's gradients and memory in a local step, of the names and shapes that it was given."""
        wanted = dict(step.gradients)  # the mapping is the hook's own
        with self._named("correct", round, client):
            gradients, after = map(_tensors, _pair(self.hook.correct(memory, step)))
            _check_shapes(gradients, wanted)
            _check_shapes(after, memory)
            for made in (gradients, after):
                check_finite(self.hook, made, wanted, step.tensors, memory)
        return gradients, after


def hooked(method: Method, hook: LocalHook, clients: int) -> Method:
    """The method with the hook; clients: of the federation.  The method has `shared_basis`."""
    # `Method` asks for attributes of a class; those that the engine reads follow from the method here.
    return cast(Method, Hooked(cast(SharedBasis, method), hook, clients))


def unhooked(method: Method) -> Method:
    """The method's own object, without its hook, if it has one."""
    inner = method.method if isinstance(method, Hooked) else method
    return inner.method if isinstance(inner, Reported) else inner


def hook_of(method: Method) -> LocalHook | None:
    """The method's hook, if it has one."""
    return method.hook if isinstance(method, Hooked) else None


def with_hook_of(method: Method, other: Method) -> Method:
    """The other method with the hook of this one, if it has one."""
    return hooked(other, method.hook, method.clients) if isinstance(method, Hooked) else other


def _stored(tensors: Tensors) -> dict[str, Any]:
    return {f"{HOOK}{name}": tensor for name, tensor in tensors.items()}


def _with(record: R, tensors: Tensors) -> R:
    """The method's record with the hook's tensors beside its own."""
    return replace(record, tensors={**record.tensors, **_stored(tensors)})


def _parted(record: R) -> tuple[R, Tensors]:
    """The method's record, and the hook's tensors by their own names."""
    own = {name: tensor for name, tensor in record.tensors.items() if not name.startswith(HOOK)}
    beside = {name.removeprefix(HOOK): x for name, x in record.tensors.items() if name.startswith(HOOK)}
    return replace(record, tensors=own), beside


def _trained(method: Method, server: ServerState, shape: ModelShape) -> Tensors:
    """A client's trained tensors, for their names and shapes."""
    start = method.start_client(method.broadcast(server), None, Client(0, 0), shape)
    return {name: start.tensors[name] for name in start.trained}


def _ended(result: LocalResult) -> tuple[Tensors, Tensors, int]:
    """The arguments of a hook's functions after a client's round."""
    return result.memory, {name: result.tensors[name] for name in result.trained}, int(result.metrics["steps"])


def _pair(found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise AnswerError(f"it gives {shown(found)}, not two mappings of tensors")
    return found


def _tensors(found: Any) -> Tensors:
    if not isinstance(found, Mapping):
        raise AnswerError(f"it gives {shown(found)}, not tensors by name")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise AnswerError(f"it gives {shown(tensor)} as {name}, not a tensor")
    return found


def _check_shapes(found: Tensors, wanted: Tensors) -> None:
    """AnswerError naming the first tensor that is missing, too much, or of another shape or type."""
    given, asked = ({name: _shape(tensor) for name, tensor in tensors.items()} for tensors in (found, wanted))
    apart = sorted(name for name in given.keys() | asked.keys() if given.get(name) != asked.get(name))
    if apart:
        nothing, name = "of no tensor", apart[0]
        raise AnswerError(f"it gives {name} the shape {given.get(name, nothing)}, not {asked.get(name, nothing)}")


def _shape(tensor: Tensor) -> str:
    size = " x ".join(map(str, tensor.shape)) or "of a number"
    return size if str(tensor.dtype) == "torch.float32" else f"{size} ({str(tensor.dtype).removeprefix('torch.')})"
