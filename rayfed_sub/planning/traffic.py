"""Exact bytes of a method's tensors, without a formula: its own functions walk some rounds of a small model.

The small model has one layer of each shape (m, n), real size, random weights, and the head; nothing is trained, clients
come back with tensors of the right shapes.  All bytes are affine in the number of layers of a shape, so one more walk
per shape, with a second layer of it, gives those of the whole model.  Where bytes follow from data, the figures are
upper bounds: walked clients never prune themselves (HetLoRA), and methods walk as they say in `at_most`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rayfed_sub.config.schema import Config, Server
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import (
    Client,
    ClientState,
    Layer,
    LocalResult,
    ModelShape,
    Start,
    Tensors,
    wire_bytes,
)
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.methods import METHODS, build, lora, shared_fields
from rayfed_sub.methods.downloads import downloaded, first_counted, mixes
from rayfed_sub.methods.hooked import unhooked, with_hook_of
from rayfed_sub.methods.own_failures import named
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import advance
from rayfed_sub.models.architecture import Architecture
from rayfed_sub.models.start import StartInfo
from rayfed_sub.training import optimizers
from rayfed_sub.training.blocks import Closed

_Figures = dict[tuple[str | int, ...], int]


@dataclass(frozen=True)
class ClientTraffic:
    """Bytes of one client: sent and received in a round; received if pretrained weights and seed gave nothing for free
    (`down_counted`, see `methods/downloads.py`); stored for its next one (`state`).  While it trains: its tensors,
    moments and gradients side by side in the pack (`resident`), and its other tensors (`held`): its start
    where that is not the broadcast itself, its upload and state where they are not the result itself."""

    up: int
    down: int
    down_counted: int
    state: int
    resident: int
    held: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of a method.  rounds: per walked round client -> bytes.  broadcast: the largest of a round.  server: all
    that the server holds between rounds, its optimiser's memory included, at first and after each walked round.
    coordinator: the most that lies there at once in a round (server before and after, the sum), without what it shares
    with the pretrained weights and the broadcast.  dense: whether clients train over dense weights that the broadcast
    brings."""

    rounds: tuple[Mapping[int, ClientTraffic], ...]
    broadcast: int
    server: tuple[int, ...]
    coordinator: int
    dense: bool

    @property
    def clients(self) -> list[ClientTraffic]:
        """Every client of every walked round."""
        return [client for walked in self.rounds for client in walked.values()]


def traffic(
    method: Method,
    shape: ModelShape,
    config: Config,
    cohorts: Sequence[Sequence[int]],
    steps: Callable[[int], int],
    start: int = 0,
) -> Traffic:
    """The bytes of the rounds whose clients are `cohorts`; steps: a client's local steps; start: bytes of
    model.start_from."""
    method = getattr(method, "at_most", lambda: method)()
    kinds = _alike(shape.targets, method)
    firsts = [layers[0] for layers in kinds]
    one = _walk(method, ModelShape(tuple(firsts), shape.head), config, cohorts, steps, start)
    figures = Counter(one)
    for layers in kinds:
        if len(layers) > 1:
            two = _walk(method, ModelShape((*firsts, layers[1]), shape.head), config, cohorts, steps, start)
            for key, size in one.items():
                figures[key] += (len(layers) - 1) * (two[key] - size)
    return Traffic(
        tuple(
            {k: ClientTraffic(*(figures[n, k, what] for what in _CLIENT)) for k in cohort}
            for n, cohort in enumerate(cohorts)
        ),
        max(figures["broadcast", n] for n in range(len(cohorts))),
        tuple(figures["server", n] for n in range(len(cohorts) + 1)),
        max(figures["coordinator", n] for n in range(len(cohorts))),
        bool(one["dense",]),
    )


_CLIENT = ("up", "down", "down_counted", "state", "resident", "held")


def first_start(method: Method, shape: ModelShape, config: Config, client: int) -> Start:
    """Start of a client's first round, for all targets, on the `meta` device, from the small model's."""
    kinds = {layers[0].name: layers for layers in _alike(shape.targets, method)}
    small = ModelShape(tuple(layers[0] for layers in kinds.values()), shape.head)
    server = method.init_server(_weights(small), small, config.seed)
    start = method.start_client(method.broadcast(server), None, Client(client, config.seed), small)

    def everywhere(name: str) -> list[str]:
        layer_name, _, rest = name.partition("/")
        return [f"{layer.name}/{rest}" for layer in kinds[layer_name]] if layer_name in kinds else [name]

    tensors, memory, frozen = (
        {name: tensor.to("meta") for old, tensor in given.items() for name in everywhere(old)}
        for given in (start.tensors, start.memory, start.frozen)
    )
    trained = tuple(name for old in start.trained for name in everywhere(old))
    return replace(start, tensors=tensors, trained=trained, moments={}, memory=memory, frozen=frozen)


def _alike(targets: Iterable[Layer], method: Method) -> list[list[Layer]]:
    """The targets of each shape, and of each rank that the method's pattern gives, in the order of their first ones."""
    own: Any = unhooked(method)
    kinds: dict[tuple[int, int, bool, bool, int], list[Layer]] = defaultdict(list)
    for layer in targets:
        rank = lora.layer_rank(own, layer) if getattr(own, "rank_pattern", None) else 0
        kinds[layer.m, layer.n, layer.bias, layer.expert, rank].append(layer)
    return list(kinds.values())


def _walk(
    method: Method,
    shape: ModelShape,
    config: Config,
    cohorts: Sequence[Sequence[int]],
    steps: Callable[[int], int],
    begun: int,
) -> _Figures:
    """All figures of the small model by name."""
    # The plan's tables have methods that no server optimizer fits: some change the shapes of the server's tensors.
    rule = config.server if getattr(unhooked(method), "supports_server_optimizer", True) else Server()
    mixed = mixes(method, rule, config.privacy)
    weights = _weights(shape)
    server = method.init_server(weights, shape, config.seed)
    memory: dict[str, Tensor] = {}
    states: dict[int, ClientState] = {}
    dense = any(f"{layer.name}/weight" in method.broadcast(server).tensors for layer in shape.targets)
    found: _Figures = {("server", 0): wire_bytes(server.tensors), ("dense",): int(dense)}
    for n, cohort in enumerate(cohorts):
        broadcast, total = method.broadcast(server), method.accumulator(server, shape)
        found["broadcast", n] = wire_bytes(broadcast.tensors)
        fresh = {}
        learned = n > 0 and (config.privacy.of_clients or bool(states))
        for k in cohort:
            who, state = Client(k, config.seed), states.get(k)
            since = -1 if state is None else state.round - 1
            down = downloaded(method, server, shape, who, since, learned=learned, mixed=mixed, start=begun)
            start = method.start_client(broadcast, state, who, shape)
            result = _result(start, k, steps(k), shape, config)
            update = method.upload(broadcast, result, 1.0, shape)
            kept = method.client_state(broadcast, result, shape)
            fresh[k] = ClientState(n + 1, steps(k), result.step, kept)
            with named("method", unhooked(method), "accumulate", n, k):
                total = method.accumulate(total, update, shape)
            given = [broadcast.tensors, *([state.tensors] if state else [])]
            ended = [result.tensors, result.moments, *_sides(result)]
            begin = [start.tensors, start.memory, start.frozen]
            held = _own(begin, given) + _own([update.tensors, kept], [*given, *ended])
            figures = (
                update.wire_bytes,
                down,
                first_counted(method, server, since, down, begun),
                wire_bytes(kept),
                _resident(start, config),
                held,
            )
            found |= {(n, k, what): size for what, size in zip(_CLIENT, figures, strict=True)}
        states |= fresh
        after, renewed = advance(rule, server, method.aggregate(server, total, shape), memory)
        waiting = {
            f"{name}/{i}/{side}": x
            for name, own in total.waiting.items()
            for i, terms in enumerate(own)
            for side, x in enumerate(terms)
        }
        there = [server.tensors, total.tensors, waiting, memory, after.tensors, renewed]
        found["coordinator", n] = _own(there, [weights, broadcast.tensors])
        server, memory = after, renewed
        found["server", n + 1] = wire_bytes(server.tensors) + wire_bytes(memory)
    return found


def _weights(shape: ModelShape) -> dict[str, Tensor]:
    """Random pretrained weights, (m, n) and biases (m,), float32."""
    tensors = {}
    for layer in (*shape.targets, *shape.head):
        draw = stream(0, "plan", layer.name)
        tensors[f"{layer.name}/weight"] = torch.from_numpy(draw.standard_normal((layer.m, layer.n), "float32"))
    for layer in shape.head:
        if layer.bias:
            tensors[f"{layer.name}/bias"] = torch.zeros(layer.m)
    return tensors


def _resident(start: Start, config: Config) -> int:
    """Tensors, frozen blocks, moments, gradients, FedProx's anchors and a hook's memory of one client in a pack."""
    trained = wire_bytes({name: start.tensors[name] for name in start.trained})
    copies = len(optimizers.moment_roles(config.optimizer)) + 1 + (config.federation.proximal > 0)
    return wire_bytes({**start.tensors, **start.memory}) + wire_bytes(start.frozen) + copies * trained


def _result(start: Start, client: int, steps: int, shape: ModelShape, config: Config) -> LocalResult:
    """The record of a round in which nothing was learned.  Trained tensors come back doubled, no zero stays zero, and
    no two clients agree: none finds a reason to prune itself, and a cohort's product has the rank of its factors."""
    tensors = dict(start.tensors)
    for name in start.trained:
        noise = stream(0, "plan", "trained", name, client).standard_normal(tuple(tensors[name].shape), "float32")
        tensors[name] = 2 * tensors[name] + torch.from_numpy(noise)
    roles = optimizers.moment_roles(config.optimizer)
    moved = {f"{name}/{role}": torch.zeros_like(start.tensors[name]) for name in start.trained for role in roles}
    counts = {f"{layer.name}/step": torch.tensor(float(steps), dtype=torch.float64) for layer in shape.experts}
    closings = closed_blocks(start, steps)
    scale = optimizers.decay(config.optimizer, config.optimizer.lr) ** steps if start.decays_base else 1.0
    return LocalResult(
        client=client,
        tensors=tensors,
        moments={**start.moments, **moved, **counts},
        step=start.step + steps,
        blocks={} if start.subspace is None else _blocks(start, tensors, shape, closings),
        base_scale=scale,
        periods=closings + 1,
        metrics={"loss": 0.0, "loss_last": 0.0, "labels": 1.0, "steps": float(steps), "periods": closings + 1.0},
        trained=start.trained,
        memory=start.memory,
        base_scales={layer.name: scale for layer in shape.experts if start.decays_base},
    )


def closed_blocks(start: Start, steps: int) -> int:
    """GaLore blocks that a client closes in a round: refreshes at any but its first step."""
    every = 0 if start.subspace is None else start.subspace.refresh_every
    return sum((start.step + t) % every == 0 for t in range(1, steps)) if every else 0


def _blocks(start: Start, tensors: Tensors, shape: ModelShape, closings: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The round's blocks as the pack hands them over: closed ones, shortened as it does, and the open one."""
    assert start.subspace is not None
    blocks, scale_G = {}, torch.tensor([start.scale])
    for layer in shape.targets:
        left, right = tensors[f"{layer.name}/left"], tensors[f"{layer.name}/right"]
        closed = Closed()
        for _ in range(closings):
            closed.close(left[None], right[None], scale_G, [True])
        if closings:
            closed_left, closed_right = closed.of(0)
            left, right = torch.cat([closed_left, left], dim=1), torch.cat([closed_right, right])
        blocks[layer.name] = (left, right)
    return blocks


def _sides(result: LocalResult) -> list[Tensors]:
    return [{"left": left, "right": right} for left, right in result.blocks.values()]


def _own(tensors: Iterable[Tensors], given: Iterable[Tensors]) -> int:
    """Bytes of the storages behind `tensors` that are not behind `given`."""
    there = {tensor.untyped_storage().data_ptr() for group in given for tensor in group.values()}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for group in tensors for t in group.values()
    }
    return sum(size for address, size in storages.items() if address not in there)


RANKS = (4, 8, 16, 64)


@dataclass(frozen=True)
class MethodBytes:
    """A method at a rank: bytes per client up and down in the first and the second round (down_counted: if pretrained
    weights and seed gave nothing for free), stored and in training; the server after two rounds, and at most at the
    coordinator."""

    method: str
    rank: int | None
    up: tuple[int, int]
    down: tuple[int, int]
    down_counted: tuple[int, int]
    state: int
    resident: int
    server: int
    coordinator: int


def by_method(parts: Parts) -> Iterable[MethodBytes]:
    """Every method at the run's rank, or its own default where the run's method has none, over its first two rounds."""
    two, rank = parts.first(2, FEW), getattr(unhooked(parts.method), "rank", None)
    for name in _names(parts):
        yield _bytes(name, replace(two, method=_method(name, rank, parts)))


def by_rank(parts: Parts, client: int) -> Iterable[MethodBytes]:
    """Every method with every rank that the targets allow, over one round of one client."""
    lone = replace(parts, cohorts=[[client]])
    for name in _names(parts):
        for rank in RANKS:
            if rank <= _most(parts):
                yield replace(_bytes(name, replace(lone, method=_method(name, rank, parts))), rank=rank)


def _most(parts: Parts) -> int:
    """The largest rank that fits all targets."""
    return min(min(layer.m, layer.n) for layer in parts.architecture.shape.targets)


def _names(parts: Parts) -> list[str]:
    """A method of the user's own is in no table."""
    return list(dict.fromkeys([*METHODS, parts.name]))


def _method(name: str, rank: int | None, parts: Parts) -> Method:
    """A method at the rank, its default for None, but at most the one that fits all targets, without the run's hook;
    the run's own as it is configured, with its hook."""
    if name == parts.name and rank == getattr(unhooked(parts.method), "rank", None):
        return parts.method
    fields: dict[str, Any] = dict(parts.config.method) if name == parts.name else {"name": name}
    if rank is None:
        rank = getattr(build(fields), "rank", 1)
    rank = min(rank, _most(parts))
    if max(fields.get("client_ranks") or (0,)) > rank:
        fields["client_ranks"] = None
    kept, _ = shared_fields({"rank": rank}, name)
    built = build({**fields, **kept})
    return with_hook_of(parts.method, built) if name == parts.name else built


def _bytes(name: str, parts: Parts) -> MethodBytes:
    """The bytes of the rounds of `parts`, whose method has this name."""
    found = parts.traffic()
    first, last = found.rounds[0], found.rounds[-1]

    def most(figure: Callable[[ClientTraffic], int]) -> tuple[int, int]:
        return max(map(figure, first.values())), max(map(figure, last.values()))

    return MethodBytes(
        method=name,
        rank=getattr(unhooked(parts.method), "rank", None),
        up=most(lambda client: client.up),
        down=most(lambda client: client.down),
        down_counted=most(lambda client: client.down_counted),
        state=max(client.state for client in found.clients),
        resident=max(client.resident for client in found.clients),
        server=found.server[-1],
        coordinator=found.coordinator,
    )


FEW = 64
"""Clients of a cohort that are walked where a sample of them will do."""


@dataclass(frozen=True, eq=False)
class Parts:
    """config: resolved.  cohorts: the clients of every round; steps: how many local steps a client takes in a round;
    noise: under privacy; start: what model.start_from names."""

    config: Config
    method: Method
    architecture: Architecture
    dataset: Dataset
    cohorts: Sequence[Sequence[int]]
    steps: Callable[[int], int]
    noise: float | None = None
    start: StartInfo | None = None

    @property
    def name(self) -> str:
        """The method's."""
        return str(self.config.method["name"])

    @property
    def cohort(self) -> int:
        """Clients of the largest round, or under way at a time with mode=async."""
        federation = self.config.federation
        return federation.cohort if federation.mode == "async" else max(map(len, self.cohorts), default=0)

    @property
    def trained(self) -> int:
        """Clients that ever train; with mode=async those whose updates count, at most."""
        federation = self.config.federation
        if federation.mode == "async":
            return min(federation.clients, sum(map(len, self.cohorts)))
        return len(set().union(*map(set, self.cohorts)))

    def first(self, rounds: int, most: int | None = None) -> Parts:
        """With no more than the first rounds that have clients, `most` in each; with client 0 where none has any."""
        return replace(self, cohorts=[cohort[:most] for cohort in self.cohorts if cohort][:rounds] or [[0]])

    def traffic(self) -> Traffic:
        """The bytes of all its rounds."""
        start = 0 if self.start is None else self.start.wire_bytes
        return traffic(self.method, self.architecture.shape, self.config, self.cohorts, self.steps, start)

    @property
    def stacked(self) -> bool:
        """Whether a later round's download holds the changes of a cohort's clients one beside the other: a client gets
        more after the round of a cohort than after one of its own."""
        rounds = [cohort[:FEW] for cohort in self.cohorts if cohort]
        if len(rounds) < 2:
            return False
        widest = max(rounds, key=len)
        walks = (replace(self, cohorts=[cohort, widest[:1]]).traffic() for cohort in (widest[:1], widest))
        alone, together = (walk.rounds[1][widest[0]].down for walk in walks)
        return together > alone
