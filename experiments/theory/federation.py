"""Federated rounds without Ray: the methods' own protocol functions around the pack executor, on digits.

Legend: N clients, R rows, m, n layer sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from experiments.theory.problem import Floats, Problem
from rayfed_sub.config.schema import Federation, Optimizer, Partition, Server
from rayfed_sub.core.types import Client, ClientState, LocalResult, ModelShape, ServerState, Start
from rayfed_sub.data.batching import Batches, batch_rows
from rayfed_sub.data.partitions import partitioned
from rayfed_sub.data.rows import Ints
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import advance, nova_factor
from rayfed_sub.training.executor import ClientWork, train_pack
from rayfed_sub.training.layers import based_on, install
from rayfed_sub.training.pack_step import LocalRule


@dataclass(frozen=True, eq=False)
class Round:
    """A finished round: the server after it, every client's start and result."""

    server: ServerState
    starts: Sequence[Start]
    results: Sequence[LocalResult]


@dataclass(frozen=True)
class ClientRows:
    """A client's batches of one round: all its rows every step, or `size` of them as the engine draws them."""

    whole: Mapping[str, Tensor]
    rows: int
    client: int
    seed: int
    size: int | None
    cursor: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        if self.size is None:
            return self.whole
        chosen = batch_rows(self.seed, self.client, np.arange(self.rows), self.size, self.cursor + index)
        return {name: tensor[chosen] for name, tensor in self.whole.items()}

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return (self[index] for index in range(self.steps))


def dealt(problem: Problem, clients: int, alpha: float, seed: int) -> list[Ints]:
    """Each client's rows: Dirichlet(alpha) over the classes by the engine's own partitioner."""
    partition = Partition(kind="dirichlet", column="label", alpha=alpha)
    federation = Federation(clients=clients, partition=partition, rounds=1)
    names = [str(k) for k in range(clients)]
    return [rows.astype(np.int64) for rows in partitioned([str(y) for y in problem.y_R], names, federation, seed)]


def rounds(
    model: nn.Module,
    shape: ModelShape,
    problem: Problem,
    method: Method,
    parts: Sequence[Ints],
    steps: Sequence[int],
    optimizer: Optimizer,
    *,
    seed: int,
    batch_size: int | None = None,
    normalise_steps: bool = False,
) -> Iterator[Round]:
    """One round after the other, endlessly; all clients take part, weighed by their rows.

    model: a fresh one, whose target layers are replaced.  parts: each client's rows of the problem; steps: its local
    steps.  batch_size None: all its rows in every step.  normalise_steps: FedNova.
    Raises ArithmeticError where a client's loss is not finite.
    """
    weights = {f"{t.name}/weight": model.get_parameter(f"{t.name}.weight").detach().clone() for t in shape.targets}
    layers = install(model, shape)
    server = method.init_server(weights, shape, seed)
    states: dict[int, ClientState] = {}
    pixels, labels = torch.from_numpy(problem.x_Rn).float(), torch.from_numpy(problem.y_R)
    own = [{"pixels": pixels[rows], "labels": labels[rows]} for rows in parts]
    share = [len(rows) / (tau if normalise_steps else 1) for rows, tau in zip(parts, steps, strict=True)]
    factor = nova_factor([len(rows) for rows in parts], steps) if normalise_steps else 1.0
    while True:
        sent = method.broadcast(server)
        starts = [method.start_client(sent, states.get(k), Client(k, seed), shape) for k in range(len(parts))]
        batches: list[Batches] = [
            ClientRows(own[k], len(rows), k, seed, batch_size, server.round * steps[k], steps[k])
            for k, rows in enumerate(parts)
        ]
        works = [ClientWork(*work) for work in zip(range(len(parts)), starts, batches, strict=True)]
        base = {t.name: sent.tensors[f"{t.name}/weight"] for t in shape.targets if f"{t.name}/weight" in sent.tensors}
        with based_on(layers, base):
            results = train_pack(model, layers, shape, works, LocalRule(optimizer, optimizer.lr, seed, pad=0)).results
        total = method.accumulator(server, shape)
        for result, weight in zip(results, share, strict=True):
            if result.failure:
                raise ArithmeticError(f"client {result.client}: {result.failure}")
            total = method.accumulate(total, method.upload(sent, result, weight, shape), shape)
            kept = method.client_state(sent, result, shape)
            states[result.client] = ClientState(server.round + 1, 0, result.step, kept)
        server, _ = advance(Server(), server, method.aggregate(server, total, shape), {}, factor)
        yield Round(server, starts, results)


def changes(done: Round) -> list[Floats]:
    """Every client's change of W in its own round, (m, n) each; without weight decay."""
    return [_change(start, result) for start, result in zip(done.starts, done.results, strict=True)]


def _change(start: Start, result: LocalResult) -> Floats:
    before, after = start.tensors, result.tensors
    if start.subspace is not None:
        left, right = result.blocks["layer"]
        return as_array(left) @ as_array(right)
    if "layer/weight" in before:
        return as_array(after["layer/weight"]) - as_array(before["layer/weight"])
    (l0, r0), (l1, r1) = ((as_array(t["layer/left"]), as_array(t["layer/right"])) for t in (before, after))
    return start.scale * (l1 @ r1 - l0 @ r0)


def as_array(tensor: Tensor) -> Floats:
    array: Floats = tensor.double().numpy()
    return array


def weight_of(method: Method, server: ServerState, shape: ModelShape) -> Floats:
    """The global model's W (m, n) where it has one target layer, whose pretrained weight is zero."""
    (layer,) = shape.targets
    return as_array(method.model(server, shape)[layer.name].apply(torch.zeros(layer.m, layer.n)))
