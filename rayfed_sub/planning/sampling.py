"""Client sampling: the cohort of a round, its local steps, weights and learning rate, from configuration and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import Config, StepRange
from rayfed_sub.core.rng import stream
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.methods.server_optimizers import nova_factor, nova_length
from rayfed_sub.privacy.accountant import Draws


def cohort(config: Config, n: int) -> list[int]:
    """The clients of round n, sorted: sampled without replacement, less those that are not available.  With privacy of
    clients every one is drawn by itself (Poisson sampling), so that federation.sampled is the mean size.  With
    mode=async as many as the buffer holds, for a plan: those of a run follow from its clock.

    It may be empty when federation.availability is small, and under Poisson sampling.
    """
    federation = config.federation
    if config.privacy.of_clients:
        chances = stream(config.seed, "cohort", n).random(federation.clients)
        return np.flatnonzero(chances < federation.cohort / federation.clients).tolist()
    return drawn(config, n, np.arange(federation.clients), federation.updates)


def drawn(config: Config, n: int, among: NDArray[np.int64], size: int, start: int = 0) -> list[int]:
    """At most `size` clients of `among` for round n, sorted, drawn as `cohort` draws them; start: number of the draw
    within the round, as asynchronous rounds have several."""
    size, availability = min(size, len(among)), config.federation.availability
    again = (start,) if start else ()
    chosen = stream(config.seed, "cohort", n, *again).choice(len(among), size, replace=False)
    if availability < 1.0:
        chosen = chosen[stream(config.seed, "availability", n, *again).random(size) < availability]
    return sorted(among[chosen].tolist())


@dataclass(frozen=True)
class PackWork:
    """A pack's work in a round, as the coordinator sends it.  steps: local steps of each client; weights: their raw
    weights p_k, see `client_weight`; lr: learning rate; watched: clients to diagnose; examined: those of them
    whose gradients are."""

    clients: tuple[int, ...]
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    lr: float
    watched: tuple[int, ...] = ()
    examined: tuple[int, ...] = ()


def pack_work(
    config: Config,
    dataset: Dataset,
    n: int,
    clients: Sequence[int],
    watched: Sequence[int] = (),
    examined: Sequence[int] = (),
    lr_factor: float = 1.0,
) -> PackWork:
    """The work of a pack of clients in round n; watched, examined: of the whole cohort; lr_factor: see
    `learning_rate`."""
    steps = tuple(local_steps(config, client) for client in clients)
    weights = tuple(client_weight(config, dataset, n, client, lr_factor) for client in clients)
    mine = (tuple(client for client in clients if client in some) for some in (watched, examined))
    return PackWork(tuple(clients), steps, weights, learning_rate(config, n, lr_factor), *mine)


def client_weight(config: Config, dataset: Dataset, n: int, client: int, lr_factor: float = 1.0) -> float:
    """p_k before normalisation: the client's rows, or 1; under FedNova over the length of its local steps."""
    weight = float(len(dataset.rows_of(client))) if config.federation.client_weighting == "samples" else 1.0
    return weight / local_length(config, n, client, lr_factor) if config.federation.normalise_steps else weight


def local_steps(config: Config, client: int) -> int:
    """The client's local steps in every round: its own, the same from round to round (a slow client stays slow)."""
    steps = config.federation.local_steps
    if isinstance(steps, int):
        return steps
    if isinstance(steps, StepRange):
        return int(stream(config.seed, "local steps", client).integers(steps.low, steps.high, endpoint=True))
    return steps[client % len(steps)]


def every_local_steps(config: Config) -> NDArray[np.int64]:
    """`local_steps` of all clients, int64 (clients,)."""
    steps, clients = config.federation.local_steps, config.federation.clients
    if isinstance(steps, StepRange):  # a stream each
        return np.fromiter((local_steps(config, client) for client in range(clients)), np.int64, clients)
    return np.resize(np.asarray(steps, np.int64), clients)


def local_length(config: Config, n: int, client: int, lr_factor: float = 1.0) -> float:
    """FedNova's normaliser of the client's local steps in round n: see `server_optimizers.nova_length`."""
    mu = config.federation.proximal
    return nova_length(config.optimizer, learning_rate(config, n, lr_factor), mu, local_steps(config, client))


def nova_factor_of(config: Config, n: int, trained: Sequence[tuple[int, float]], lr_factor: float = 1.0) -> float:
    """FedNova's factor of round n (see `server_optimizers.nova_factor`) from the clients that trained and their raw
    weights, which are per length of their local steps already: w_k is that times the length."""
    lengths = [local_length(config, n, client, lr_factor) for client, _ in trained]
    weights = [weight * length for (_, weight), length in zip(trained, lengths, strict=True)]
    return nova_factor(weights, lengths) if trained else 1.0


def draws(config: Config, dataset: Dataset, rounds: int) -> Draws:
    """What the first `rounds` rounds release, for the accountant; () before the first.

    Of clients: each round takes every client with one chance.  Of examples: each local step of a client takes every row
    of it with chance batch_size / rows, so a client's row has met as many mechanisms as its client took steps; clients
    with fewer steps and a smaller chance than another's are left out.  A client counts as having taken its steps in
    every round that it was drawn for, whether or not it failed.
    """
    federation = config.federation
    if not config.privacy.of_examples:
        return ((federation.cohort / federation.clients, rounds),) if rounds else ()
    steps = np.zeros(federation.clients, np.int64)
    for n in range(rounds):
        steps[cohort(config, n)] += 1
    steps *= every_local_steps(config)
    chances = np.minimum(1.0, federation.batch_size / np.diff(dataset.client_offsets))[steps > 0]
    most, worst = 0, list[tuple[float, int]]()
    for chance, times in sorted({*zip(chances.tolist(), steps[steps > 0].tolist(), strict=True)}, reverse=True):
        if times > most:
            worst.append((chance, times))
            most = times
    return tuple(worst)


def learning_rate(config: Config, n: int, factor: float = 1.0) -> float:
    """The learning rate of round n, counted from 0: the schedule's times `factor`, which callbacks set.

    >>> from rayfed_sub.config.loading import load_config
    >>> config = load_config({"federation": {"rounds": 5}, "optimizer": {"lr": 1.0, "schedule": "linear"}})
    >>> [round(learning_rate(config, n), 2) for n in range(5)]
    [1.0, 0.8, 0.6, 0.4, 0.2]
    """
    return factor * _scheduled(config, n)


def _scheduled(config: Config, n: int) -> float:
    optimizer, rounds = config.optimizer, config.federation.rounds or 1
    if n < optimizer.warmup_rounds:
        return optimizer.lr * (n + 1) / (optimizer.warmup_rounds + 1)
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = (n - optimizer.warmup_rounds) / (rounds - optimizer.warmup_rounds)  # below 1: no round at rate zero
    left = 1 - done if optimizer.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optimizer.lr * (optimizer.final_lr_ratio + (1 - optimizer.final_lr_ratio) * left)


def judged_rows(config: Config, rows: int, most: int) -> list[int]:
    """A choice of at most `most` of so many held-out rows by `task.seed`; a longer choice contains the shorter one."""
    chosen: list[int] = stream(config.task.seed, "held-out choice").permutation(rows)[:most].tolist()
    return sorted(chosen)
