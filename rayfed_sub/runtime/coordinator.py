"""The server: an actor that owns the global state and runs the rounds.

One round follows the paper's algorithm: sample clients, broadcast, train packs, accumulate in order, aggregate,
evaluate.  Workers never call the coordinator; the caller only reads the stream of records that `run_round` yields.
After any failure a new coordinator goes on from the newest checkpoint in the run folder.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import ray
import torch

from rayfed_sub.clock.fleet import Fleet
from rayfed_sub.clock.virtual_clock import Clock
from rayfed_sub.config.schema import Config
from rayfed_sub.core.arrays import Packed, add_to_digest, checksum, matrices_checksum, packed, unpacked
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.finite import not_finite
from rayfed_sub.core.schemas import AnswerRow, ClientLayer, ClientRow, CohortLayer, RoundRow, Score, TimelineRow
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Change,
    Client,
    ClientState,
    ModelShape,
    ServerState,
    Tensors,
    Update,
)
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.diagnostics import client_diagnostics
from rayfed_sub.diagnostics.server_change import ServerChange, server_changes, working
from rayfed_sub.evaluation.named_metrics import MetricError, metrics_of
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.methods import METHODS
from rayfed_sub.methods.downloads import downloaded, mixes, unchanged
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import Noise, advance
from rayfed_sub.methods.stale_updates import sent_values
from rayfed_sub.models.start import StartInfo
from rayfed_sub.models.weights import target_weights
from rayfed_sub.planning import packs, sampling
from rayfed_sub.privacy import mechanism
from rayfed_sub.privacy.accountant import spent
from rayfed_sub.runtime import held_out, object_store
from rayfed_sub.runtime.fork_server import server_of_this_process
from rayfed_sub.runtime.held_out import JudgedModel
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.runtime.pack_queue import PackQueue
from rayfed_sub.runtime.round_metrics import RoundMetrics, client_row
from rayfed_sub.runtime.round_sum import RoundSum
from rayfed_sub.runtime.scheduler import Done
from rayfed_sub.runtime.simulated_rounds import Result, SimulatedRounds
from rayfed_sub.runtime.worker import Answer, PackOutcome, broadcast_of
from rayfed_sub.runtime.workers import workers_of
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.state_store import StateStore
from rayfed_sub.telemetry.environment import environment, merged
from rayfed_sub.telemetry.events import PackDone, RoundDone
from rayfed_sub.telemetry.process_memory import PeakMemory, Sample, give_back
from rayfed_sub.training.client_errors import client_failed

_CLAIM_SECONDS = 60.0


@dataclass(frozen=True)
class _Trained:
    """Results of a round's training besides the state store.  sums: emptied; changes: the server's change of each
    diagnosed target layer; empty in a round without diagnostics."""

    seconds: float
    sums: RoundSum
    changes: dict[str, ServerChange]
    layers: tuple[CohortLayer, ...]
    client_layers: tuple[ClientLayer, ...]


class Coordinator:
    """Server of a run.  As an actor (`links.py`) it has two threads: one does all the arithmetic, the other, of the
    concurrency group "aside", answers calls in the middle of a round.  processes: see `RayWorkers`."""

    def __init__(
        self,
        config: Config,
        method: Method,
        shape: ModelShape,
        transposed: frozenset[str],
        any_pack: bool,
        shared: Shared,
        folder: Path,
        noise: float | None,
        start: StartInfo | None = None,
        fleet: Fleet | None = None,
        processes: Sequence[Any] | None = None,
    ) -> None:
        server = server_of_this_process()  # holds what its forks share, and is counted with them
        self._memory = [PeakMemory(), *([] if server is None else [PeakMemory(process=server)])]
        self._claim: IO[bytes] | None = None
        self._config, self._method, self._shape, self._transposed = config, method, shape, transposed
        self._folder, self._noise, self._any_pack, self._start = folder, noise, any_pack, start
        self._workers = workers_of(config.resources, shared, processes)
        self._dataset: Dataset = object_store.get(shared.dataset)
        values = sent_values(method, shape) if config.federation.mode == "async" else ()
        self._simulated = None if fleet is None else SimulatedRounds(config, self._dataset, fleet, values)
        arrays: Packed = object_store.get(shared.backbone)
        self._backbone_sum, self._backbone_arrays = checksum(arrays), arrays
        self._backbone = unpacked(arrays)
        self._metrics = metrics_of(config, self._dataset.class_names, self._dataset.kind)
        self._answers: list[Answer] = []
        self._sent: tuple[int, Any, int] | None = None  # round, handle, checksum of the broadcast
        self._pinned: tuple[int, Any, int] | None = None  # the same, in whose memory the pinned round's tensors lie

    def take_over(self, *parts: Any) -> None:
        """Becomes the coordinator of another run, whose parts these are, and whose workers are this one's processes."""
        processes = self._workers.processes
        vars(self).clear()  # what the last run held is free before the next one's is loaded
        give_back()
        self.__init__(*parts, processes=processes)  # type: ignore[misc]

    def _initial(self) -> ServerState:
        return self._method.init_server(self._pretrained(self._shape), self._shape, self._config.seed)

    def _pretrained(self, shape: ModelShape) -> Tensors:
        """The layers' pretrained weights; copies where the backbone is not float32."""
        return target_weights(shape, self._transposed, self._backbone)

    def start(self) -> int:
        """Loads the newest checkpoint, if there is one, and waits for the workers; returns the number of finished
        rounds.

        Raises RunError where another run uses the folder, and where a worker cannot start."""
        torch.set_num_threads(self._config.resources.threads)  # of this thread
        # The coordinator of a run that was killed may still be writing.
        self._claim = checkpoints.claim(self._folder, _CLAIM_SECONDS)
        memory = self._config.resources.state_memory
        self._store = StateStore(self._folder, memory, self._initial, self._workers.put, object_store.get)
        self._answers = self._workers.ready()
        stored, free = self._store.stored, self._any_pack
        self._packs = PackQueue(self._config, self._dataset, self._workers, stored, free=free)
        return self._store.current.server.round

    def workers_environment(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The workers' versions, and the other parts of their environment that the bits depend on; after `start`."""
        versions, machines = zip(*self._answers, strict=True)
        return merged(versions), environment(self._config, machines, self._any_pack)

    @ray.method(concurrency_group="aside")  # type: ignore[untyped-decorator]
    def alive(self) -> None:
        """Answers."""

    @ray.method(concurrency_group="aside")  # type: ignore[untyped-decorator]
    def halt(self) -> int:
        """Lets no further round finish, and pins the last finished one; returns the number of finished rounds."""
        finished, sent = self._store.halt(), self._sent
        self._pinned = sent if sent is not None and sent[0] == finished else None
        return finished

    def pin(self) -> None:
        """Makes the last finished round the one that `checkpoint` writes; called between rounds.

        Shares the next round's broadcast first, so that the server is not in memory a second time for the checkpoint.
        """
        self._broadcast()
        self._store.pin()
        self._pinned = self._sent

    @ray.method(concurrency_group="aside")  # type: ignore[untyped-decorator]
    def checkpoint(self) -> None:
        """Writes a checkpoint of the pinned round, while the next one may run.  Raises RunError where the disk is full,
        and where somebody wrote into the broadcast, whose memory holds the server's tensors."""
        self._verify_broadcast(self._pinned)
        self._pinned = None  # its memory stays until the store has written what lies in it
        self._store.checkpoint()

    @ray.method(concurrency_group="aside")  # type: ignore[untyped-decorator]
    def keep_best(self) -> None:
        """Keeps the newest checkpoint as the best one."""
        self._store.keep_best()

    def run_round(self, n: int, lr_factor: float) -> Iterator[PackDone | RoundDone]:
        """Runs round n, counted from 0, and yields its records; may be called again until the round is committed.
        lr_factor: on the round's learning rate."""
        finished = self._store.current.server.round
        assert n == finished, f"round {n} asked of a server that has finished {finished}"
        began = time.perf_counter()
        config = self._config
        due = (n + 1) % config.evaluation.every == 0 or n + 1 == config.federation.rounds
        trained = yield from self._trained(n, began, lr_factor, due)
        if trained is None:
            return  # the run is being interrupted
        sums, metrics = trained.sums, trained.sums.metrics
        (up, down), ranks = sums.bytes, [change.rank for change in trained.changes.values()]
        scores, answers = self._evaluated(ends=n + 1 == config.federation.rounds) if due else ((), ())
        row = RoundRow(
            round=n,
            clients=sums.clients,
            failed=metrics.failed,
            loss=metrics.loss,
            held_out_loss=overall(scores).get("held_out_loss"),
            uplink_bytes=up,
            downlink_bytes=down,
            labels=metrics.labels,
            change_rank=statistics.median(ranks) if ranks else None,
            epsilon=self._spent(n + 1) if due else None,  # takes most of a second
            train_seconds=trained.seconds,
            retries=sum(pack.attempts - 1 for pack in sums.packs),
            memory_bytes=self._memory_now(),
            seconds=time.perf_counter() - began,
        )
        if due:  # the workers have used shared memory again
            self._verify()
        layers = (trained.layers, trained.client_layers)
        yield RoundDone(row, tuple(metrics.rows), scores, tuple(sums.packs), *layers, answers, sums.timeline)

    def _trained(self, n: int, began: float, lr_factor: float, due: bool) -> Generator[PackDone, None, _Trained | None]:
        """The round up to its commit; None where the run is being interrupted.  due: True where an evaluation follows.

        A separate function, so that the sum and the old server are freed before the next broadcast."""
        config, method, shape = self._config, self._method, self._shape
        current = self._store.current
        sums = yield from self._gathered(n, began, lr_factor)
        self._verify()

        before, after = current.server, method.aggregate(current.server, sums.total, shape)
        factor, noise = self._rule(n, sums.metrics.rows, sums.total.weight, lr_factor)
        after, memory = advance(config.server, before, after, current.memory, factor * sums.factor, noise)
        _check_finite(after, n)
        still = not sums.trained and unchanged(method, before, after)
        if not self._store.commit(after, memory, sums.trained, sums.clock, sums.landings, sums.received, still=still):
            return None
        seconds = time.perf_counter() - began
        changes = self._server_changes(before, sums.ranks, due)
        layer_rows = client_diagnostics.rows(n, shape, sums.watched, changes)
        sums.empty()
        return _Trained(seconds, sums, changes, *layer_rows)

    def _gathered(self, n: int, began: float, lr_factor: float) -> Generator[PackDone, None, RoundSum]:
        """The sum of the round's updates and all that goes with it."""
        config, simulated, current = self._config, self._simulated, self._store.current
        mode, broadcast = config.federation.mode, self._broadcast()
        apart = simulated is not None and (mode == "async" or simulated.drops)
        cohort = [] if apart else packs.ordered(config, self._dataset, sampling.cohort(config, n))
        metrics = RoundMetrics(n, len(cohort), began)
        ranks: dict[str, int | None] = dict.fromkeys(self._change_layers(n), 0)
        sums = RoundSum(n, metrics, self._zero(), ranks, config.diagnostics.clients)
        if simulated is None or not apart:
            down = self._download_bytes(cohort, {})
            for done in self._packed(n, cohort, broadcast, lr_factor):
                sums.pack(done)
                for client, update, state in zip(done.units, done.result.updates, done.result.states, strict=True):
                    self._add(n, sums, update, state, down[client])
                yield metrics.progress()
            if simulated is not None:
                sums.clock, sums.timeline = simulated.told(n, current.clock or Clock(), metrics.rows)
            return sums

        # Of all that train: the clock says later whose update counts.
        shown = RoundMetrics(n, config.federation.updates, began)

        def train(clients: Sequence[int]) -> Generator[PackDone, None, dict[int, Result]]:
            """The clients' results; in the cohort's order, so that packs follow from simulated time alone."""
            found = dict[int, Result]()
            for done in self._packed(n, packs.ordered(config, self._dataset, clients), broadcast, lr_factor):
                sums.pack(done)
                outcome: PackOutcome = done.result
                results = zip(outcome.updates, outcome.states, strict=True)
                found |= dict(zip(done.units, results, strict=True))
                for update in outcome.updates:
                    shown.add(client_row(n, update, 0))
                yield shown.progress()
            return found

        if mode == "async":
            gathered = yield from simulated.buffered(n, current, train, self._download_bytes)
        else:
            gathered = yield from simulated.collected(n, current.clock or Clock(), train, self._download_bytes)
        for update, state, down_bytes in gathered.results:
            self._add(n, sums, update, state, down_bytes)
        sums.clock, sums.timeline = gathered.clock, gathered.timeline
        sums.factor, sums.landings = gathered.factor, gathered.landings
        sums.received |= gathered.received
        return sums

    def _packed(self, n: int, clients: Sequence[int], broadcast: Any, lr_factor: float) -> Iterator[Done]:
        """The packs of these clients, which stand in the cohort's order, as they are done."""
        items = self._packs.items(n, clients, broadcast, lr_factor)
        for done in self._workers.in_order(items, f"round {n}, local training"):
            self._packs.done(n, done)
            yield done

    def _add(self, n: int, sums: RoundSum, update: Update, state: ClientState | None, down: int) -> None:
        """Adds a client's result to the sum, or its failure to the rows."""
        if update.failure is not None or state is None:
            sums.skip(self._skipped(n, update, down))
            return
        sums.add(self._method, self._shape, update, down)
        sums.trained.append(self._store.add(update.client, state))

    def evaluated(self) -> tuple[tuple[Score, ...], tuple[AnswerRow, ...]]:
        """Scores, answers and their scores of the current model: the initial one, or that of a run that ends here."""
        found = self._evaluated(ends=True)
        self._verify()
        return found

    def _evaluated(self, *, ends: bool) -> tuple[tuple[Score, ...], tuple[AnswerRow, ...]]:
        """Scores of the current model; ends: answers too, and their scores."""
        round = self._store.current.server.round
        judged = (self._workers, self._config, self._dataset, self._model(), self._metrics)
        try:
            scores = held_out.scores(*judged)
            more, answers = held_out.answers(*judged, round) if ends else ([], [])
        except MetricError as error:
            raise RunError("evaluation", str(error), round=round) from None
        return (*scores, *more), tuple(answers)

    def under_way(self) -> tuple[TimelineRow, ...]:
        """Rows of the clients that are under way if the run ends here."""
        current, simulated = self._store.current, self._simulated
        if simulated is None or current.clock is None:
            return ()
        return simulated.under_way(current.server.round, current.clock)

    def epsilon(self) -> float | None:
        """Privacy spent by the finished rounds; None without privacy."""
        return self._spent(self._store.current.server.round)

    def backbone_sum(self) -> str:
        """Checksum of the loaded weights' matrices."""
        return matrices_checksum(self._backbone_arrays)

    def weights_sha256(self) -> str:
        """SHA-256 of everything learned: effective target weights, server tensors, states of personal clients, and what
        the run began from, which may have changed other layers."""
        digest = hashlib.sha256(b"" if self._start is None else self._start.digest.encode())
        current = self._store.current
        add_to_digest(digest, self._effective(current.server))
        add_to_digest(digest, sorted(current.server.tensors.items()))
        for client in sorted(current.states) if self._method.personal else ():
            _, reference = cast(Any, self._store.stored(client))
            state = sorted(object_store.get(reference).tensors.items())
            add_to_digest(digest, ((f"{client}/{name}", tensor) for name, tensor in state))
        return digest.hexdigest()

    def memory(self) -> list[Sample]:
        """Memory of this process and of the workers that answer in time."""
        return [*(memory.sample() for memory in self._memory), *self._workers.memory(30)]

    def leave(self) -> bool:
        """Closes a finished run; True where its processes may serve another one."""
        self.close()
        return self._workers.whole

    def close(self) -> None:
        """Releases the folder's lock and ends threads, which else outlive the run where this is no separate process."""
        if self._claim is not None:
            self._claim.close()
        for memory in self._memory:
            memory.close()
        self._workers.close()

    def _memory_now(self) -> int | None:
        """Bytes of this process and its workers, as last sampled; None where a worker does not answer."""
        samples = self._workers.memory(1)
        own = [memory.sample() for memory in self._memory]
        last = {sample.process: sample.last for sample in [*own, *samples]}
        return sum(last.values()) if len(samples) == self._workers.count else None

    def _spent(self, rounds: int) -> float | None:
        return spent(self._config, self._noise, partial(sampling.draws, self._config, self._dataset, rounds))

    @property
    def _private(self) -> bool:
        return self._config.privacy.of_clients

    def _zero(self) -> Accumulator:
        """The empty sum; under privacy of clients with an update without change, so that an empty cohort releases noise
        too."""
        method, shape, server = self._method, self._shape, self._store.current.server
        total = method.accumulator(server, shape)
        if not self._private:
            return total
        return method.accumulate(total, mechanism.at_rest(method, server, shape, self._config.seed), shape)

    def _rule(self, n: int, rows: Sequence[ClientRow], weight: float, lr_factor: float) -> tuple[float, Noise | None]:
        """Factor and noise, the arguments of `advance` besides the server's optimizer.

        weight: total weight of the sum.  Under privacy of clients the denominator is fixed: the expected cohort."""
        federation, private = self._config.federation, self._config.privacy
        if private.of_clients and private.clip is not None and self._noise is not None:
            deviation = self._noise * private.clip / federation.cohort
            return weight / federation.cohort, partial(mechanism.noise, self._config.seed, n, deviation)
        if not federation.normalise_steps:
            return 1.0, None
        trained = [(row.client, row.weight) for row in rows if row.failure is None]
        return sampling.nova_factor_of(self._config, n, trained, lr_factor), None

    def _skipped(self, n: int, update: Update, down: int) -> ClientRow:
        """The row of a failed client.  Raises RunError where the configuration does not allow to skip it."""
        cause = str(update.failure)
        if self._config.federation.on_client_failure == "stop":
            raise client_failed(cause, n, update.client)
        return client_row(n, update, down)

    def _model(self) -> JudgedModel:
        stored = self._store.stored if self._method.personal else None
        return JudgedModel(self._broadcast(), stored)

    def _broadcast(self) -> Any:
        """Handle of the current broadcast, which training and evaluation of one server state share."""
        if self._sent is None or self._sent[0] != self._store.current.server.round:
            self._sent = None  # free the last one first
            give_back()
            self._sent = self._put()
            give_back()
        return self._sent[1]

    def _put(self) -> tuple[int, Any, int]:
        """Shares the broadcast: (round, handle, checksum).  Server tensors that are sent unchanged then lie in shared
        memory alone."""
        server = self._store.current.server
        broadcast = broadcast_of(self._config, self._method, server)
        handle = self._workers.share(broadcast)
        stored: Broadcast = object_store.get(handle)
        unchanged = [name for name, tensor in broadcast.tensors.items() if tensor is server.tensors.get(name)]
        self._store.move({name: stored.tensors[name] for name in unchanged})
        return server.round, handle, checksum(packed(broadcast.tensors))

    def _download_bytes(self, cohort: Sequence[int], held: Mapping[int, int]) -> dict[int, int]:
        """Wire bytes to every client of the cohort; they depend on the round in which it last took part.  held: clients
        that have got a version of the server since the last round ended."""
        current, server = self._store.current, self._store.current.server
        mixed = mixes(self._method, self._config.server, self._config.privacy)
        begun, down = 0 if self._start is None else self._start.wire_bytes, {}
        for client in cohort:
            who = Client(client, self._config.seed)
            since = max(current.synchronised(client), held.get(client, -1))
            down[client] = downloaded(
                self._method, server, self._shape, who, since, learned=self._learned(), mixed=mixed, start=begun
            )
        return down

    def _learned(self) -> bool:
        """True where a round has changed the server: a round in which a client trained; under privacy of clients any
        round, because of its noise."""
        current = self._store.current
        return current.server.round > 0 and (self._private or bool(current.states))

    def _effective(self, server: ServerState) -> Iterator[tuple[str, torch.Tensor]]:
        changes = self._method.model(server, self._shape)
        for layer in self._shape.targets:
            change: Change = changes[layer.name]
            weights = self._pretrained(ModelShape((layer,)))
            yield layer.name, change.apply(weights[f"{layer.name}/weight"])

    def _change_layers(self, n: int) -> list[str]:
        """Names of the target layers whose change at the server is diagnosed in round n; none for methods whose clients
        have models of their own, where the server's model stays the pretrained one."""
        diagnostics = self._config.diagnostics
        if self._method.personal or not client_diagnostics.due(diagnostics, n, self._config.federation.rounds or 0):
            return []
        return [layer.name for layer in client_diagnostics.spaced(self._shape.targets, diagnostics.layers)]

    def _server_changes(
        self, before: ServerState, ranks: Mapping[str, int | None], evaluated: bool
    ) -> dict[str, ServerChange]:
        """The server's changes of the layers in `ranks` (layer -> summed rank of the round's updates); dense changes of
        unknown rank only in rounds that are evaluated."""
        old, new = (self._method.model(server, self._shape) for server in (before, self._store.current.server))
        config = self._config
        mixed = mixes(self._method, config.server, config.privacy)
        known = dict.fromkeys(ranks) if mixed else ranks
        layers = {layer.name: layer for layer in self._shape.targets if layer.name in ranks}
        # Of methods of this package the server's change is then the sum of what was sent.
        sums = not (mixed or config.optimizer.weight_decay or config.hook) and config.method["name"] in METHODS

        def pretrained(name: str) -> torch.Tensor:
            return self._pretrained(ModelShape((layers[name],)))[f"{name}/weight"]

        asked = {name: known[name] for name in layers}
        each = working(layers.values())
        return server_changes(old, new, pretrained, asked, dense=evaluated, sums=sums, each=each)

    def _verify(self) -> None:
        """Checks that shared memory is unchanged.  (A worker's `Guard` finds writes by torch, and names the tensor.)"""
        if checksum(self._backbone_arrays) != self._backbone_sum:
            at = self._store.current.server.round
            raise RunError("shared memory", "the backbone's bytes changed", round=at, resume=None)
        self._verify_broadcast(self._sent)

    def _verify_broadcast(self, sent: tuple[int, Any, int] | None) -> None:
        if sent is not None and checksum(packed(object_store.get(sent[1]).tensors)) != sent[2]:
            at = self._store.current.server.round
            raise RunError("shared memory", "the broadcast's bytes changed", round=at, resume=None)


def _check_finite(server: ServerState, n: int) -> None:
    failure = not_finite(server.tensors)
    if failure is not None:
        advice = "lower optimizer.lr and begin anew in another folder"
        raise RunError("aggregation", f"{failure}; {advice}", round=n, resume=None)
