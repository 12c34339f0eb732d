"""The server: an actor that owns the global state and walks the rounds.

One round reads like the paper's algorithm: sample clients, broadcast, train packs, fold in order, finish, evaluate.
Workers never call the coordinator; the caller only reads the stream of records that `run_round` yields.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError

from rayfed_sub.analysis.ranks import change_rank
from rayfed_sub.config import Config
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.engine import cohorts
from rayfed_sub.engine.evaluations import Model, held_out_loss, held_out_rouge
from rayfed_sub.engine.exchange import Packed, checksum, packed, unpacked
from rayfed_sub.engine.journal import ClientRow, PackDone, RoundDone, RoundRow
from rayfed_sub.engine.memory import PeakMemory
from rayfed_sub.engine.schedule import Crew, Piece, in_order
from rayfed_sub.engine.workers import PackedState, PackOutcome, Worker
from rayfed_sub.errors import RunError
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server import advance, download_bytes, nova_factor
from rayfed_sub.models.weights import target_weights
from rayfed_sub.records import Change, Client, ModelShape, ServerState, Update

_START_SECONDS = 300.0  # a worker that has not mapped the backbone by then never will


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds."""

    round: int
    server: Packed
    clients: dict[int, PackedState]


@dataclass(frozen=True)
class Shared:
    """References into the object store, owned by the process that started the run, so that they outlive the
    coordinator.  A record, because Ray would replace bare references in a call by what they refer to."""

    spec: Any
    backbone: Any
    dataset: Any


class Coordinator:
    """Wrapped by `ray.remote(num_cpus=0)`."""

    def __init__(
        self, config: Config, method: Method, shape: ModelShape, transposed: frozenset[str], shared: Shared
    ) -> None:
        torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
        self._memory = PeakMemory()
        self._config, self._method, self._shape, self._shared = config, method, shape, shared
        self._workers = [self._worker() for _ in range(config.resources.workers)]
        self._crew = Crew(self._workers)
        self._dataset: Dataset = ray.get(shared.dataset)
        arrays: Packed = ray.get(shared.backbone)
        self._backbone_sum, self._backbone_arrays = checksum(arrays), arrays
        self._pretrained = target_weights(shape, transposed, unpacked(arrays))
        self._server = self._method.init_server(self._pretrained, self._shape, config.seed)
        self._memory_of_server: dict[str, torch.Tensor] = {}
        self._states: dict[int, tuple[int, Any]] = {}  # client -> (round, reference to its PackedState)
        self._home: dict[int, int] = {}
        self._synchronised: dict[int, int] = {}
        self._sent: tuple[int, Any, int] | None = None  # round, reference, checksum of the broadcast

    def _worker(self) -> Any:
        resources, shared = self._config.resources, self._shared
        options = worker_options(resources.cpus_per_worker, resources.gpus_per_worker)
        actor = ray.remote(Worker).options(**options)
        return actor.remote(shared.spec, shared.backbone, shared.dataset, resources.gpus_per_worker)

    def start(self) -> list[str]:
        """Waits until every worker has mapped the backbone; their devices.  Raises RunError where one cannot."""
        ready = [worker.ready.remote() for worker in self._workers]
        done, _ = ray.wait(ready, num_returns=len(ready), timeout=_START_SECONDS)
        if len(done) < len(ready):
            late = len(ready) - len(done)
            raise RunError("start", f"{late} of {len(ready)} workers not ready in {_START_SECONDS:.0f} s")
        try:
            devices: list[str] = ray.get(ready)
        except RayError as error:
            raise RunError("start", f"a worker could not start: {str(error).strip().splitlines()[-1]}") from None
        return devices

    def run_round(self, n: int) -> Iterator[PackDone | RoundDone]:
        """Round n, counted from 0; it can be asked for again as long as it has not reached its evaluation."""
        assert n == self._server.round, f"round {n} asked of a server that has finished {self._server.round}"
        began = time.perf_counter()
        config, method, shape = self._config, self._method, self._shape
        cohort = cohorts.cohort(config, n)
        broadcast = self._broadcast()
        down = self._download_bytes(cohort)
        size = config.resources.pack_size
        packs = [cohort[i : i + size] for i in range(0, len(cohort), size)]
        pieces = [self._train_piece(n, pack, i, broadcast) for i, pack in enumerate(packs)]

        total, rows, states = method.zero(self._server, shape), [], {}
        for done in in_order(self._crew, pieces, f"round {n}, local training"):
            outcome: PackOutcome = done.result
            for client, sent, state in zip(packs[done.index], outcome.updates, outcome.states, strict=True):
                update = Update(sent.client, sent.weight, unpacked(sent.tensors), sent.metrics)
                total = method.fold(total, update, shape)
                rows.append(ClientRow(n, client, update.weight, update.wire_bytes, down[client], **sent.metrics))
                states[client] = (state.round, ray.put(state))
                self._home[client] = done.worker
            yield _progress(n, rows, len(cohort), time.perf_counter() - began)
        self._verify()

        before, after = self._server, method.finish(self._server, total, shape)
        factor = _nova_factor(rows) if config.federation.normalise_steps else 1.0
        after, memory = advance(config.server, before, after, self._memory_of_server, factor)
        _check_finite(after, n)
        self._server, self._memory_of_server = after, memory
        self._states |= states
        self._synchronised |= dict.fromkeys(cohort, n)
        train_seconds = time.perf_counter() - began
        due = (n + 1) % config.evaluation.every == 0 or n + 1 == config.federation.rounds
        row = RoundRow(
            round=n,
            clients=len(cohort),
            loss=statistics.fmean(r.loss for r in rows) if rows else None,
            held_out_loss=self.held_out_loss() if due else None,
            uplink_bytes=sum(r.uplink_bytes for r in rows),
            downlink_bytes=sum(down.values()),
            labels=int(sum(r.labels for r in rows)),
            change_rank=self._rank(before) if due else None,
            train_seconds=train_seconds,
            seconds=time.perf_counter() - began,
        )
        self._verify()
        yield RoundDone(row, tuple(rows))

    def held_out_loss(self) -> float:
        """Mean held-out loss of the current model, see `evaluations`."""
        return held_out_loss(self._crew, self._config, self._dataset, self._model())

    def held_out_rouge(self) -> float | None:
        """ROUGE-L of the current model's answers, see `evaluations`."""
        return held_out_rouge(self._crew, self._config, self._dataset, self._model())

    def weights_sha256(self) -> str:
        """SHA-256 over everything learned: effective target weights, the server's tensors, personal clients' states."""
        digest = hashlib.sha256()
        for name, weight in self._effective(self._server):
            digest.update(name.encode() + weight.contiguous().numpy().tobytes())
        for name in sorted(self._server.tensors):
            digest.update(name.encode() + self._server.tensors[name].contiguous().numpy().tobytes())
        for client, (_, reference) in sorted(self._states.items()) if self._method.personal else ():
            for name, tensor in sorted(unpacked(ray.get(reference).tensors).items()):
                digest.update(f"{client}/{name}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def snapshot(self) -> Snapshot:
        """The server's and the clients' states, for a checkpoint."""
        clients = {client: ray.get(reference) for client, (_, reference) in sorted(self._states.items())}
        memory = {f"server/{name}": tensor for name, tensor in self._memory_of_server.items()}
        return Snapshot(self._server.round, packed({**self._server.tensors, **memory}), clients)

    def peak_memory(self) -> int:
        """Bytes: the sum of the peaks, each as sampled, of this process and of the workers that answer."""
        asked = [worker.peak_memory.remote() for worker in self._workers]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=30)
        return self._memory.peak + sum(_peak(reference) for reference in answered)

    def _model(self) -> Model:
        return Model(self._server.round, self._broadcast(), self._states if self._method.personal else None)

    def _broadcast(self) -> Any:
        """The current broadcast in the object store; training and evaluation of one state share it."""
        if self._sent is None or self._sent[0] != self._server.round:
            arrays = packed(self._method.broadcast(self._server).tensors)
            self._sent = (self._server.round, ray.put(arrays), checksum(arrays))
        return self._sent[1]

    def _download_bytes(self, cohort: Sequence[int]) -> dict[int, int]:
        """Wire bytes to every client of the cohort, given when it last took part."""
        server, shape, rule = self._server, self._shape, self._config.server
        sent, targets = self._method.broadcast(server).tensors, [layer.name for layer in shape.targets]
        down = {}
        for client in cohort:
            who, since = Client(client, self._config.seed), self._synchronised.get(client, -1)
            counted = self._method.download_bytes(server, shape, who, since)
            down[client] = download_bytes(rule, sent, targets, counted)
        return down

    def _train_piece(self, n: int, clients: list[int], index: int, broadcast: Any) -> Piece:
        states = [self._states.get(client) for client in clients]
        home = self._home.get(clients[0], index % len(self._workers))
        lr = cohorts.learning_rate(self._config, n)
        label = f"clients {clients[0]}-{clients[-1]}"
        return Piece(lambda worker: worker.train.remote(n, clients, states, broadcast, lr), home, label)

    def _effective(self, server: ServerState) -> Iterator[tuple[str, torch.Tensor]]:
        changes = self._method.model(server, self._shape)
        for layer in self._shape.targets:
            change: Change = changes[layer.name]
            yield layer.name, change.apply(self._pretrained[f"{layer.name}/weight"])

    def _rank(self, before: ServerState) -> float:
        """Median over the targets of the rank of the round's aggregated change."""
        pairs = zip(self._effective(before), self._effective(self._server), strict=True)
        return statistics.median(change_rank(old, new) for (_, old), (_, new) in pairs)

    def _verify(self) -> None:
        """Shared memory still holds what was put there; a torch write in a worker is noticed there, by name."""
        if checksum(self._backbone_arrays) != self._backbone_sum:
            raise RunError("shared memory", "the backbone's bytes changed", round=self._server.round)
        if self._sent is not None and checksum(ray.get(self._sent[1])) != self._sent[2]:
            raise RunError("shared memory", "the broadcast's bytes changed", round=self._server.round)


def _peak(reference: Any) -> int:
    try:
        return int(ray.get(reference, timeout=30))
    except RayActorError:  # a worker that died at the very end must not cost the finished run
        return 0


def worker_options(cpus: float, gpus: float) -> dict[str, Any]:
    """Ray's options of a worker: a restart brings it back empty, and the coordinator alone decides what runs again."""
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 0}


def _nova_factor(rows: Sequence[ClientRow]) -> float:
    """The rows' weights are already per step; w_k is that times the steps."""
    steps = [int(row.steps) for row in rows]
    return nova_factor([row.weight * tau for row, tau in zip(rows, steps, strict=True)], steps) if rows else 1.0


def _check_finite(server: ServerState, n: int) -> None:
    for name, tensor in server.tensors.items():
        if not torch.isfinite(tensor).all():
            raise RunError("aggregation", f"non-finite values in {name}; lower optimizer.lr", round=n)


def _progress(n: int, rows: Sequence[ClientRow], clients: int, seconds: float) -> PackDone:
    return PackDone(
        round=n,
        clients_done=len(rows),
        clients=clients,
        loss=statistics.fmean(row.loss for row in rows),
        labels=int(sum(row.labels for row in rows)),
        seconds=seconds,
        uplink_bytes=sum(row.uplink_bytes for row in rows),
    )
