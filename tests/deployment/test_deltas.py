"""What crosses to a node: any client that was away for any number of rounds ends with the server's bits, from as many
bytes as `download_bytes` counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from rayfed_sub.config.schema import Optimizer, Privacy, Server
from rayfed_sub.core.arrays import settled
from rayfed_sub.core.types import Client, ClientState, Layer, ModelShape, ServerState, Update, wire_bytes
from rayfed_sub.deployment import deltas
from rayfed_sub.deployment.deltas import Download, History
from rayfed_sub.methods import METHODS, build
from rayfed_sub.methods.downloads import downloaded, mixes
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import advance
from tests.helpers.tiny_models import Tiny, draw_batches, llama, run_pack

RULE = Server()
COHORTS = [(0, 1), (1,), (0, 1)]  # 0 is away for one round, 1 for none, 2 for all

# More than counted: rounds of one basis are counted as one sum, and of some methods the residual alone, without what
# the server makes it from; both cross as they were.
OVER = {"fedsub", "shared-galore", "fedex-lora", "fedmomentum"}


@dataclass
class Federation:
    """A server and its nodes, by hand."""

    method: Method
    tiny: Tiny
    rule: Server = RULE
    history: History = field(default_factory=History)
    since: dict[int, int] = field(default_factory=dict)
    nodes: dict[int, ServerState] = field(default_factory=dict)
    states: dict[int, ClientState] = field(default_factory=dict)
    memory: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.initial = self.method.init_server(self.tiny.weights, self.tiny.shape, 0)
        self.server = self.initial

    def download(self, client: int) -> tuple[Download, int]:
        """What the client receives, and the bytes that are counted for it."""
        who, since, shape = Client(client, 0), self.since.get(client, -1), self.tiny.shape
        mixed = mixes(self.method, self.rule, Privacy())
        counted = downloaded(self.method, self.server, shape, who, since, learned=bool(self.since), mixed=mixed)
        return deltas.download(self.method, shape, self.server, self.history, who, since), counted

    def receive(self, client: int, got: Download) -> ServerState:
        before = self.nodes.get(client, self.initial)
        return deltas.applied(self.method, self.tiny.shape, self.rule, before, got)

    def round(self, clients: Sequence[int], trained: Sequence[int] | None = None) -> None:
        """A round of these clients, each from its own version; trained: those of them that do not fail."""
        method, shape, n = self.method, self.tiny.shape, self.server.round
        updates = []
        for client in clients if trained is None else trained:
            version = self.nodes[client] = self.receive(client, self.download(client)[0])
            read = method.broadcast(version)
            start = method.start_client(read, self.states.get(client), Client(client, 0), shape)
            base = {name: x for name, x in read.tensors.items() if name.endswith("/weight")}
            how = {"lr": 0.01, "weights": base, "clients": [client]}
            batches = [draw_batches(self.tiny, 1000 * n + client, 1, rows=1)]
            (result,) = run_pack(self.tiny, [start], batches, Optimizer(lr=0.01, weight_decay=0.1), **how)
            updates.append(method.upload(read, result, 1.0 + client, shape))
            kept = method.client_state(read, result, shape)
            self.states[client] = ClientState(n + 1, n, result.step, kept)
        total = method.accumulator(self.server, shape)
        for update in updates:
            total = method.accumulate(total, update, shape)
        done = None if mixes(method, self.rule, Privacy()) else deltas.repeatable(method, shape, n, updates, total, 1.0)
        before, after = self.server, method.aggregate(self.server, total, shape)
        after, self.memory = advance(self.rule, before, after, self.memory)
        self.server = ServerState(after.round, settled(after.tensors))
        self.history = deltas.continued(self.history, method, shape, before, self.server, done)
        self.since |= {update.client: n for update in updates}


def made(name: str) -> Method:
    return build({"name": name} if name == "fedavg" else {"name": name, "rank": 2})


def check(federation: Federation, client: int, *, exact: bool) -> None:
    """The client would hold what it reads of the server's broadcast, to the bit, from the counted bytes."""
    method, shape = federation.method, federation.tiny.shape
    got, counted = federation.download(client)
    have = method.broadcast(federation.receive(client, got)).tensors
    sent = method.broadcast(federation.server).tensors
    for name, tensor in deltas.received(method, sent, shape, Client(client, 0)).items():
        assert torch.equal(have[name], tensor), (name, client, federation.server.round)
    assert counted <= deltas.wire(got)
    assert not exact or deltas.wire(got) - single(got, shape) <= counted


def single(got: Download, shape: ModelShape) -> int:
    """Bytes of single numbers that belong to no layer, which nobody counts: what weight decay left, a round, a seed."""
    layers = {layer.name for layer in (*shape.targets, *shape.head)}
    parts = [got.tensors, *(one.total.tensors for one in got.rounds)]
    parts += [update.tensors for one in got.rounds for update in one.updates]
    return sum(wire_bytes({n: x for n, x in part.items() if n.partition("/")[0] not in layers}) for part in parts)


@pytest.mark.parametrize("name", METHODS)
def test_every_client_catches_up_to_the_bit(name: str) -> None:
    federation = Federation(made(name), llama())
    for cohort in COHORTS:
        federation.round(cohort)
        for client in range(3):
            check(federation, client, exact=name not in OVER)


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
def test_a_client_of_low_rank_receives_its_components(name: str) -> None:
    federation = Federation(build({"name": name, "rank": 4, "client_ranks": [1, 4]}), llama())
    federation.round((0, 1))
    (small, _), (large, _) = (federation.download(client) for client in (0, 1))
    assert deltas.wire(large) == 4 * deltas.wire(small)  # no head
    for client in range(4):
        check(federation, client, exact=True)


@pytest.mark.parametrize("name", ["fedftg", "fedavg", "fedit"])
def test_a_server_optimizer_sends_what_it_moved(name: str) -> None:
    federation = Federation(made(name), llama(), Server(optimizer="momentum"))
    for cohort in COHORTS[1:]:
        federation.round(cohort)
        for client in range(3):
            check(federation, client, exact=True)


def test_a_round_without_an_update_sends_nothing() -> None:
    federation = Federation(made("fedftg"), llama())
    federation.round((0, 1))
    federation.round((0, 1), trained=())
    check(federation, 0, exact=True)
    federation.round((2,))
    check(federation, 0, exact=True)


def test_blocks_give_way_to_the_weight_where_that_is_smaller() -> None:
    """One layer of 24 x 16, rank 2: a client's blocks are 2 (24 + 16) = 80 numbers, the weight is 384.  Four updates,
    320 numbers, cross as they are; a fifth would make them larger than the weight."""
    shape = ModelShape((Layer("a", 24, 16),))
    method, rng = made("fedftg"), torch.Generator().manual_seed(0)
    server = method.init_server({"a/weight": torch.zeros(24, 16)}, shape, 0)
    history, sizes = History(), []
    for n in range(5):
        draw = {"a/left": torch.randn(24, 2, generator=rng), "a/right": torch.randn(2, 16, generator=rng)}
        updates = [Update(0, 1.0, draw)]
        total = method.accumulate(method.accumulator(server, shape), updates[0], shape)
        done = deltas.repeatable(method, shape, n, updates, total, 1.0)
        before, server = server, method.aggregate(server, total, shape)
        history = deltas.continued(history, method, shape, before, server, done)
        sizes.append(deltas.wire(deltas.download(method, shape, server, history, Client(9, 0), -1)))
    assert sizes == [4 * 80, 4 * 160, 4 * 240, 4 * 320, 4 * 384]
    # What no client can be sent any more is not kept.
    assert sum(wire_bytes(update.tensors) for one in history.rounds for update in one.updates) == 4 * 320


def test_a_server_from_a_checkpoint_sends_what_differs_from_the_start() -> None:
    federation = Federation(made("ffa-lora"), llama())
    federation.round((0, 1))
    again = replace(federation, history=deltas.begun(federation.initial, federation.server))
    again.server, again.since = federation.server, {}
    got, _ = again.download(2)
    assert set(got.tensors) == {f"{layer.name}/left" for layer in llama().shape.targets}  # A follows from the seed
