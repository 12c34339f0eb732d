"""A method with a hook is a method: the engine runs it as any other, and counts, plans, stores and resumes it so.

The hook's tensors stand beside the method's in the same records, as `hook/<name>`; neither sees the other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

from rayfed_sub.core.types import (
    HOOK,
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
    wire_bytes,
)
from rayfed_sub.methods import averaging
from rayfed_sub.methods.hooks import CohortMean, LocalHook
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
    """The functions of `Method` with the hook's beside the method's.  clients: of the federation."""

    method: SharedBasis
    hook: LocalHook
    clients: int

    personal = False  # a client's own model has tensors that are not shared

    def check(self, shape: ModelShape) -> None:
        self.method.check(shape)

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        server = self.method.init_server(weights, shape, seed)
        return _with(server, self.hook.init_server(_trained(self.method, server, shape)))

    def broadcast(self, server: ServerState) -> Broadcast:
        own, held = _parted(server)
        return _with(self.method.broadcast(own), self.hook.broadcast(held))

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        own, held = _parted(server)
        return self.method.download_bytes(own, shape, client, since) + wire_bytes(self.hook.broadcast(held))

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
        return replace(start, correct=self.hook.correct, memory=self.hook.begin(received, kept, trained))

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        update = self.method.upload(_parted(broadcast)[0], result, weight, shape)
        return _with(update, self.hook.upload(*_ended(result)))

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        tensors = self.method.client_state(_parted(broadcast)[0], result, shape)
        return {**tensors, **_stored(self.hook.client_state(*_ended(result)))}

    def accumulator(self, server: ServerState, shape: ModelShape) -> Accumulator:
        return self.method.accumulator(_parted(server)[0], shape)

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        (own, sums), (sent, more) = _parted(total), _parted(update)
        added = self.method.accumulate(own, sent, shape)
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
            held, learned = self.hook.aggregate(held, mean)
            after = replace(after, tensors={**after.tensors, **learned})
        if self.method.shared_basis(before.round) != self.method.shared_basis(after.round):
            held = self.hook.init_server(_trained(self.method, after, shape))
        return _with(after, held)

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        return self.method.model(_parted(server)[0], shape)

    personal_model = averaging.no_personal_model


def hooked(method: Method, hook: LocalHook, clients: int) -> Method:
    """The method with the hook; clients: of the federation.  The method has `shared_basis`."""
    # `Method` asks for attributes of a class; those that the engine reads follow from the method here.
    return cast(Method, Hooked(cast(SharedBasis, method), hook, clients))


def unhooked(method: Method) -> Method:
    """The method without its hook, if it has one."""
    return method.method if isinstance(method, Hooked) else method


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
