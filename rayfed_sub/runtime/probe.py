"""Probe: times the worker's code on packs of several sizes before a run, in this process and without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rayfed_sub.config.schema import Config
from rayfed_sub.core.arrays import packed
from rayfed_sub.core.types import Broadcast, Tensors
from rayfed_sub.models.start import merged
from rayfed_sub.models.weights import load_weights, target_weights
from rayfed_sub.planning.fit import PACKS
from rayfed_sub.planning.job import Job
from rayfed_sub.planning.plan import recomputes
from rayfed_sub.planning.sampling import PackWork, local_steps
from rayfed_sub.runtime.worker import Spec, Worker, broadcast_of

_STEPS = 3  # of the longer of two timings; the shorter has one
_ENOUGH = 1.0  # seconds for which a timing is repeated: short timings are less certain
_GAIN = 0.97  # a smaller gain does not count: timings are not more precise


@dataclass(frozen=True)
class PackSpeed:
    """Seconds per client with packs of this size: a local step, and what a pack's first step takes besides (GaLore's
    refresh, putting the pack together)."""

    pack_size: int
    step: float
    refresh: float


@dataclass(frozen=True)
class Speed:
    """packs: as timed; now: the configured pack size, or the cohort where that is smaller; best: the one that trains a
    round's clients fastest (`quickest`); round, run: seconds estimated for the configured workers and pack size,
    evaluations of the loss included; best_round, best_run: the same with the best pack size."""

    packs: tuple[PackSpeed, ...]
    now: int
    best: int
    round: float
    best_round: float
    run: float
    best_run: float


def probe(job: Job, sizes: Sequence[int] = PACKS) -> Speed:
    """Times packs of the given sizes (made `even`), up to the first without a gain, and of the configured size.

    Loads the backbone into this process and trains three packs of each size, short ones repeatedly for a second.
    """
    config = job.config
    cohort, workers = config.federation.updates, config.resources.trainers
    backbone = merged(load_weights(config.model, job.architecture, config.seed), job.start, job.architecture)
    broadcast = _broadcast(job, backbone)
    spec = Spec(config, job.method, job.architecture, job.processor, job.noise, recomputes(job))
    worker = Worker(spec, packed(backbone), job.dataset, config.resources.gpus_per_worker)

    def timed(size: int) -> PackSpeed:
        worker.train(_work(size, 1), [None] * size, broadcast)  # a size's first pass is slower than all others
        one, more = (_seconds(worker, _work(size, steps), broadcast) for steps in (1, _STEPS))
        step = max(0.0, more - one) / (_STEPS - 1)
        return PackSpeed(size, step / size, max(0.0, one - step) / size)

    evened = sorted({even(size, cohort, workers) for size in sizes})
    packs = {speed.pack_size: speed for speed in while_it_gains(evened, timed, lambda speed: _client(config, speed))}
    now = min(config.resources.first_pack, cohort)
    if job.any_pack:  # as it is cut
        now = even(now, cohort, workers)
    if now not in packs:
        packs[now] = timed(now)
    training = {size: _round(config, packs[size]) for size in sorted(packs)}
    best = quickest(training, now)
    judging = _evaluation(job, worker, broadcast)
    rounds, every = config.federation.rounds or 0, config.evaluation.every
    evaluations = 1 + -(-rounds // every)

    def once(size: int) -> float:
        return training[size] + judging

    def run(size: int) -> float:
        return rounds * training[size] + evaluations * judging

    tried = tuple(packs[size] for size in training)
    return Speed(tried, now, best, once(now), once(best), run(now), run(best))


def even(size: int, cohort: int, workers: int) -> int:
    """The smallest pack size with which the workers train the cohort in no more turns than with this one.

    >>> [even(size, cohort=50, workers=2) for size in (1, 8, 16, 32, 64)]
    [1, 7, 13, 25, 25]
    """
    turns = math.ceil(cohort / (size * workers))
    return math.ceil(cohort / (turns * workers))


def while_it_gains(
    sizes: Iterable[int], timed: Callable[[int], PackSpeed], client: Callable[[PackSpeed], float]
) -> list[PackSpeed]:
    """Timings of growing sizes: up to the first at which a client takes as long as at the one before.

    timed: times a size.  client: a client's seconds in a round.
    """
    found: list[PackSpeed] = []
    for size in sizes:
        found.append(timed(size))
        if len(found) > 1 and client(found[-1]) > _GAIN * client(found[-2]):
            break
    return found


def quickest(rounds: Mapping[int, float], now: int) -> int:
    """The pack size with the shortest round.  Sizes whose times do not differ are equally good: `now` if it is
    among those, else the smallest, which takes the least memory.

    >>> quickest({1: 9.0, 2: 6.1, 4: 6.0, 8: 7.0}, now=4), quickest({1: 9.0, 2: 6.1, 4: 6.0, 8: 7.0}, now=8)
    (4, 2)
    """
    near = [size for size in rounds if _GAIN * rounds[size] <= min(rounds.values())]
    return now if now in near else min(near)


def _work(size: int, steps: int) -> PackWork:
    return PackWork(tuple(range(size)), (steps,) * size, (1.0,) * size, lr=0.0)


def _broadcast(job: Job, backbone: Tensors) -> Broadcast:
    pretrained = target_weights(job.architecture.shape, job.architecture.transposed, backbone)
    server = job.method.init_server(pretrained, job.architecture.shape, job.config.seed)
    return broadcast_of(job.config, job.method, server)


def _seconds(worker: Worker, work: PackWork, broadcast: Broadcast) -> float:
    """Shortest of several timings: other work on the machine only adds time."""
    found: list[float] = []
    while sum(found) < _ENOUGH:
        began = time.perf_counter()
        worker.train(work, [None] * len(work.clients), broadcast)
        found.append(time.perf_counter() - began)
    return min(found)


def _evaluation(job: Job, worker: Worker, broadcast: Broadcast) -> float:
    """Seconds of one evaluation of the loss by all workers; generated answers are not timed."""
    examples = min(job.config.evaluation.eval_rows, len(job.dataset.held_out))
    rows = range(min(job.config.evaluation.batch_size, examples))
    began = time.perf_counter()
    worker.evaluate(rows, broadcast, None, None)
    shards = math.ceil(examples / max(1, len(rows)))
    return (time.perf_counter() - began) * math.ceil(shards / job.config.resources.trainers)


def _client(config: Config, speed: PackSpeed) -> float:
    """Upper estimate of one client's seconds in a round: the steps of the busiest client, and one refresh."""
    steps = max(local_steps(config, client) for client in range(config.federation.cohort))
    return steps * speed.step + speed.refresh


def _round(config: Config, speed: PackSpeed) -> float:
    """Seconds until the slowest worker has trained its packs."""
    size = speed.pack_size
    turns = math.ceil(math.ceil(config.federation.updates / size) / config.resources.trainers)
    return turns * size * _client(config, speed)
