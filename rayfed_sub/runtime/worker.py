"""The worker actor: a frozen backbone mapped from shared memory, resident clients, packs trained side by side."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rayfed_sub.config.schema import Config
from rayfed_sub.core.arrays import Guard, Packed, unpacked
from rayfed_sub.core.devices import deterministic, sent
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.types import (
    Broadcast,
    Client,
    ClientState,
    LocalResult,
    ServerState,
    Update,
    wire_bytes,
)
from rayfed_sub.data.batching import Batch, ClientBatches, collate
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.data.objects import Objects, OwnBatch
from rayfed_sub.data.processors import Processor, Tokenizer
from rayfed_sub.data.rows import Rows
from rayfed_sub.diagnostics.client_diagnostics import ClientDiagnostics, gradient_watch, measured
from rayfed_sub.diagnostics.gradients import GradientWatch
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.architecture import Architecture
from rayfed_sub.models.text_to_text import KIND, start_token
from rayfed_sub.models.weights import assemble, dense, target_weights
from rayfed_sub.planning.sampling import PackWork
from rayfed_sub.privacy.mechanism import clipped
from rayfed_sub.runtime import object_store
from rayfed_sub.telemetry.environment import machine, versions
from rayfed_sub.telemetry.process_memory import PeakMemory, Sample, few_kernels, give_back, gpu_peak, keep_freed
from rayfed_sub.training import client_round
from rayfed_sub.training.client_errors import failed
from rayfed_sub.training.executor import ClientWork, PackResult, train_pack
from rayfed_sub.training.inference import Generation, Prediction, answers, global_model, predictions
from rayfed_sub.training.layers import based_on
from rayfed_sub.training.own_loss import BatchScores, OwnCodeError, own_scores
from rayfed_sub.training.pack_experts import install
from rayfed_sub.training.projectors import eigen_dtype

_RESIDENT_BYTES = 256 * 2**20  # client states that a worker keeps; older ones are read from the object store again
_FETCH_SECONDS = 120


Answer = tuple[dict[str, str], dict[str, Any]]
"""A worker's versions and machine."""


@dataclass(frozen=True)
class Spec:
    """Specification of a worker besides the shared memory; small and picklable.  noise: as in `Job`; recompute: see
    `LocalRule`.

    Reading it imports transformers: the coordinator only passes it on.
    """

    config: Config
    method: Method
    architecture: Architecture
    processor: Processor
    noise: float | None = None
    recompute: bool = False


@dataclass(frozen=True)
class PackOutcome:
    """Outcome of a pack: updates and new states, in the pack's order.  A failed client's state is None: it keeps the
    old one.  seconds: the worker's own, passed and computed; memory: of its process; diagnostics: of the watched
    clients; tokens, computed: see `PackRow`."""

    updates: tuple[Update, ...]
    states: tuple[ClientState | None, ...]
    seconds: tuple[float, float]
    memory: Sample
    diagnostics: tuple[ClientDiagnostics, ...] = ()
    tokens: int | None = None
    computed: int | None = None


def broadcast_of(config: Config, method: Method, server: ServerState) -> Broadcast:
    """Server tensors for workers: the method's broadcast; under privacy all server tensors, which `aggregate` reads
    when a worker clips."""
    all_tensors = server.tensors if config.privacy.of_clients else {}
    return Broadcast(server.round, {**all_tensors, **method.broadcast(server).tensors})


class Worker:
    """Trains and evaluates with one backbone.  A plain class, so that it also works without Ray."""

    def __init__(self, spec: Spec, backbone: Packed, dataset: Dataset, gpu_share: float = 0.0) -> None:
        torch.set_num_threads(spec.config.resources.threads)
        keep_freed()
        few_kernels()
        self._memory = PeakMemory()
        self._spec, self._dataset = spec, dataset
        self._device = _device(gpu_share, spec.config.resources.deterministic)
        self._tensors = {name: tensor.to(self._device) for name, tensor in unpacked(backbone).items()}
        self._model = assemble(spec.architecture, self._tensors)
        self._layers = install(self._model, spec.architecture.shape)
        held = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        held |= {name: tensor for name, tensor in self._tensors.items() if "/" in name}  # of quantised weights
        plain = ((name, layer.weight) for name, layer in self._layers.items() if isinstance(layer.weight, torch.Tensor))
        self._guard = Guard([*held.items(), *plain])
        self._broadcast: Broadcast | None = None  # a GPU's copy
        self._resident: OrderedDict[int, ClientState] = OrderedDict()
        self._resident_bytes = 0

    def ready(self) -> Answer:
        """This worker's versions and machine, once the backbone is mapped."""
        on_gpu = self._device.type == "cuda"
        return versions(), machine(on_gpu) | ({"eigenproblems": str(eigen_dtype(self._device))} if on_gpu else {})

    def memory(self) -> Sample:
        """Proportional set size, bytes: as last sampled, and the largest seen so far; on a GPU its peak there too."""
        return replace(self._memory.sample(), gpu=gpu_peak(self._device))

    def close(self) -> None:
        """Ends the thread that samples memory."""
        self._memory.close()

    def train(self, work: PackWork, states: Sequence[Any], broadcast: Broadcast) -> PackOutcome:
        """Trains one pack.  states: per client None (its first round), or key and handle for `object_store.get`, which
        is read only when the state is not resident.  A failed client has the cause in its update."""
        began, computed = time.perf_counter(), time.thread_time()
        method, shape = self._spec.method, self._spec.architecture.shape
        clients, watched = work.clients, work.watched
        received = self._received(broadcast)
        before = [self._state(client, state) for client, state in zip(clients, states, strict=True)]
        states_of = (state.tensors for state in before if state is not None)
        given = Guard(item for tensors in (received.tensors, *states_of) for item in tensors.items())
        works = [
            ClientWork(
                client,
                method.start_client(received, state, Client(client, self._spec.config.seed), shape),
                batches := self._batches(client, state, steps),
                state.cursor if state else 0,
                batches.expected,
            )
            for client, state, steps in zip(clients, before, work.steps, strict=True)
        ]
        asked = self._spec.config.diagnostics
        examined = {one.client: one.start for one in works if one.client in work.examined}
        watch = gradient_watch(asked, shape, examined)
        trained = self._trained_or_failed(received, works, work.lr, watch)
        results = trained.results
        updates: list[Update] = []
        kept: list[ClientState | None] = []
        diagnostics: list[ClientDiagnostics] = []
        fresh: dict[int, ClientState] = {}
        for result, state, one, weight in zip(results, before, works, work.weights, strict=True):
            ended = self._ended(broadcast, result, state, weight)
            if isinstance(ended, str):
                updates.append(_failed(result, ended))
                kept.append(None)
                continue
            update, new = ended
            fresh[result.client] = new
            updates.append(update)
            kept.append(new)
            if result.client in watched:
                diagnostics.append(measured(asked, shape, one.start, result, update.weight, watch))
        # A pack with a failure runs again; if the failure stays away then, the others may end with other bits on models
        # that are not the same in any pack.
        if len(fresh) == len(results):
            for client, new in fresh.items():
                self._remember(client, new)
        given.check()
        self._guard.check()
        seconds = (time.perf_counter() - began, time.thread_time() - computed)
        found, counts = (tuple(updates), tuple(kept)), (trained.tokens, trained.computed)
        return PackOutcome(*found, seconds, self._memory.sample(), tuple(diagnostics), *counts)

    def evaluate(self, rows: Sequence[int], broadcast: Broadcast, client: int | None, state: Any) -> list[Prediction]:
        """Predictions for the given held-out rows by the global model, or by that of `client` where it is given (state
        as in `train`)."""
        batch = self._held_out(rows)
        assert not isinstance(batch, OwnBatch)
        with self._judged(broadcast, client, state):
            out = predictions(self._model, batch, self._spec.processor.pad)
        give_back()
        return out

    def measure(self, rows: Sequence[int], broadcast: Broadcast, client: int | None, state: Any) -> BatchScores:
        """Scores of a batch of the caller's own, the given held-out rows of one client; arguments as in `evaluate`.
        Raises RunError where the caller's code fails."""
        try:
            batch = self._held_out(rows)
            assert isinstance(batch, OwnBatch)
            with self._judged(broadcast, client, state):
                out = own_scores(self._model, batch.to(self._device))
        except OwnCodeError as error:
            whose = int(self._dataset.held_out_clients[rows[0]])
            raise RunError("evaluation", str(error), round=broadcast.round, client=whose, resume=None) from None
        give_back()
        return out

    def generate(self, rows: Sequence[int], broadcast: Broadcast, client: int | None, state: Any) -> list[Generation]:
        """Answers to the questions of the given held-out rows; arguments as in `evaluate`."""
        held_out, processor = self._dataset.held_out, self._spec.processor
        assert isinstance(held_out, Rows)
        assert isinstance(processor, Tokenizer)
        prompts = [held_out.row(row)[: held_out.prompts[row]].tolist() for row in rows]
        references = [held_out.row(row)[held_out.prompts[row] :].tolist() for row in rows]
        limit, batch = self._spec.config.evaluation.max_new_tokens, self._held_out(rows)
        assert not isinstance(batch, OwnBatch)
        with self._judged(broadcast, client, state):
            how: dict[str, Any] = {"pad": processor.pad, "ends": processor.ends, "limit": limit}
            if self._spec.architecture.kind == KIND:
                how["start"] = start_token(self._model, processor.answers(["?"])[0])
            tokens = answers(self._model, prompts, **how)
            forced = predictions(self._model, batch, processor.pad)
        give_back()
        said, labels = [row.predicted for row in forced], [row.labels for row in forced]
        texts = zip(prompts, tokens, references, said, labels, strict=True)
        return [Generation(*map(processor.decode, row)) for row in texts]

    def _held_out(self, rows: Sequence[int]) -> Batch:
        indices, task = np.asarray(rows, dtype=np.int64), self._spec.config.task
        draw, pad = (task.seed, "held-out", rows[0]), self._spec.processor.pad
        try:
            how: dict[str, Any] = {"mask_prompt": task.mask_prompt, "pad": pad, "draw": draw}
            return collate(self._dataset.held_out, indices, **how, apart=self._spec.architecture.kind == KIND)
        except Exception as error:
            if not isinstance(self._dataset.held_out, Objects):
                raise
            raise OwnCodeError(f"batch raises {type(error).__name__}: {error}") from error

    def _received(self, broadcast: Broadcast) -> Broadcast:
        """The round's broadcast on this worker's device.  A GPU keeps its copy for several packs and shards; no
        reference to shared memory is kept, so that the store can free the round."""
        if self._device.type == "cpu":
            return broadcast
        if self._broadcast is None or self._broadcast.round != broadcast.round:
            self._broadcast = None  # free the last one first
            tensors = {name: sent(tensor, self._device) for name, tensor in broadcast.tensors.items()}
            self._broadcast = Broadcast(broadcast.round, tensors)
        return self._broadcast

    @contextmanager
    def _judged(self, broadcast: Broadcast, client: int | None, state: Any) -> Iterator[None]:
        method, shape = self._spec.method, self._spec.architecture.shape
        received = self._received(broadcast)
        server = ServerState(received.round, received.tensors)
        given = Guard(server.tensors.items())
        if client is None:
            changes = method.model(server, shape)
        else:
            changes = method.personal_model(server, self._state(client, state), shape)
        with global_model(self._layers, shape, changes, server.tensors):
            yield
        given.check()
        self._guard.check()

    def _train(self, received: Broadcast, works: Sequence[ClientWork], lr: float, watch: GradientWatch) -> PackResult:
        config, shape = self._spec.config, self._spec.architecture.shape
        pad, noise = self._spec.processor.pad, self._spec.noise
        rule = client_round.local_rule(config, lr, pad=pad, recompute=self._spec.recompute, noise=noise)
        bases = {
            layer.name: received.tensors[f"{layer.name}/weight"]
            for layer in shape.targets
            if f"{layer.name}/weight" in received.tensors
        }
        if config.resources.executor == "reference":
            from rayfed_sub.training.reference import train_reference

            weights = target_weights(shape, self._spec.architecture.transposed, self._tensors)
            weights |= {f"{name}/weight": weight for name, weight in bases.items()}
            plain = assemble(self._spec.architecture, dense(self._spec.architecture, self._tensors))
            return PackResult(train_reference(plain, shape, weights, works, rule))
        with based_on(self._layers, bases):
            return train_pack(self._model, self._layers, shape, works, rule, watch.hooks)

    def _trained_or_failed(
        self, received: Broadcast, works: Sequence[ClientWork], lr: float, watch: GradientWatch
    ) -> PackResult:
        """As `_train`; a client with whose batch the caller's own code fails has failed."""
        try:
            return self._train(received, works, lr, watch)
        except OwnCodeError as error:
            (work,) = works  # such clients train alone
            return PackResult([failed(work.client, work.start, str(error))])

    def _ended(
        self, broadcast: Broadcast, result: LocalResult, state: ClientState | None, weight: float
    ) -> tuple[Update, ClientState] | str:
        """A client's update and next state, or the cause of its failure; the broadcast's tensors are in host memory."""
        method, shape, private = self._spec.method, self._spec.architecture.shape, self._spec.config.privacy
        found = client_round.ended(method, broadcast, result, state, weight, shape)
        if isinstance(found, str):
            return found
        update, new = found
        if private.of_clients and private.clip is not None:
            update = clipped(method, ServerState(broadcast.round, broadcast.tensors), update, shape, private.clip)
            if not math.isfinite(update.weight):
                return "non-finite norm of its change"
        return update, new

    def _batches(self, client: int, state: ClientState | None, steps: int) -> ClientBatches:
        spec, dataset = self._spec, self._dataset
        rows, apart = dataset.rows_of(client), spec.architecture.kind == KIND
        whose = (client, 0 if state is None else state.cursor, steps)
        return client_round.batches(spec.config, dataset, rows, *whose, pad=spec.processor.pad, apart=apart)

    def _state(self, client: int, stored: Any) -> ClientState | None:
        """The client's state: resident where this worker trained the client last, else from the object store."""
        if stored is None:
            return None
        (_, round), handle = stored
        resident = self._resident.get(client)
        if resident is not None and resident.round == round:
            return resident
        state: ClientState = object_store.get(handle, _FETCH_SECONDS)
        return state

    def _remember(self, client: int, state: ClientState) -> None:
        old = self._resident.pop(client, None)
        self._resident_bytes += wire_bytes(state.tensors) - (0 if old is None else wire_bytes(old.tensors))
        self._resident[client] = state
        while self._resident_bytes > _RESIDENT_BYTES and len(self._resident) > 1:
            _, oldest = self._resident.popitem(last=False)
            self._resident_bytes -= wire_bytes(oldest.tensors)


def _failed(result: LocalResult, failure: str) -> Update:
    """Update of a failed client: the cause alone; the loss is omitted when no step ran."""
    metrics = result.metrics if result.metrics["steps"] else {"steps": 0.0}
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return Update(result.client, 0.0, {}, finite, failure)


def _device(gpu_share: float, steady: bool) -> torch.device:
    """This worker's device; limits a GPU's memory to the worker's share, which Ray does not enforce."""
    if not gpu_share:
        return torch.device("cpu")
    if steady:
        deterministic()
    if gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_share)
    return torch.device("cuda")
