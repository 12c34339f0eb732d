"""A short timing before a run: the worker's own code on one pack after another, in this process, without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rayfed_sub.engine.cohorts import local_steps
from rayfed_sub.engine.exchange import Packed, packed, unpacked
from rayfed_sub.engine.job import Job
from rayfed_sub.engine.workers import Spec, Worker, broadcast_of
from rayfed_sub.models.weights import load_weights, target_weights

PACKS = (1, 2, 4, 8)
_STEPS = 3  # of the longer of two timings; the shorter has one


@dataclass(frozen=True)
class PackSpeed:
    """Seconds per client with packs of this size: a local step, and what a pack's first step takes besides (GaLore's
    refresh, putting the pack together)."""

    pack_size: int
    step: float
    refresh: float


@dataclass(frozen=True)
class Speed:
    """packs: as timed; best: the pack size that trains a round's clients fastest; round, run: seconds estimated for the
    configured workers and pack size, evaluations of the loss included; best_run: the same with the best pack size."""

    packs: tuple[PackSpeed, ...]
    best: int
    round: float
    run: float
    best_run: float


def probe(job: Job, sizes: Sequence[int] = PACKS) -> Speed:
    """Times packs of the given sizes and of the configured one, as far as the cohort is large enough for them.

    Takes the backbone into this process, and about ten local steps of each size.
    """
    config = job.config
    sizes = sorted({min(size, config.federation.cohort) for size in (*sizes, config.resources.pack_size)})
    backbone = packed(load_weights(config.model, job.skeleton, config.seed))
    broadcast = _broadcast(job, backbone)
    short, long = (_worker(job, backbone, steps) for steps in (1, _STEPS))
    _seconds(short, sizes[0], broadcast)  # the first pass is slower than all others
    timed = []
    for size in sizes:
        one, more = _seconds(short, size, broadcast), _seconds(long, size, broadcast)
        step = max(0.0, more - one) / (_STEPS - 1)
        timed.append(PackSpeed(size, step / size, max(0.0, one - step) / size))
    judging = _evaluation(job, long, broadcast)
    rounds, every = config.federation.rounds or 0, config.evaluation.every
    evaluations = 1 + -(-rounds // every)

    def run(speed: PackSpeed) -> float:
        return rounds * _round(job, speed) + evaluations * judging

    now = next(speed for speed in timed if speed.pack_size == min(config.resources.pack_size, config.federation.cohort))
    best = min(timed, key=lambda speed: _round(job, speed))
    return Speed(tuple(timed), best.pack_size, _round(job, now) + judging, run(now), run(best))


def _worker(job: Job, backbone: Packed, steps: int) -> Worker:
    federation = job.config.federation.model_copy(update={"local_steps": steps})
    config = job.config.model_copy(update={"federation": federation})
    spec = Spec(config, job.method, job.skeleton, job.codec)
    return Worker(spec, backbone, job.dataset, job.config.resources.gpus_per_worker)


def _broadcast(job: Job, backbone: Packed) -> Packed:
    pretrained = target_weights(job.skeleton.shape, job.skeleton.transposed, unpacked(backbone))
    server = job.method.init_server(pretrained, job.skeleton.shape, job.config.seed)
    return packed(broadcast_of(job.config, job.method, server))


def _seconds(worker: Worker, size: int, broadcast: Packed) -> float:
    began = time.perf_counter()
    worker.train(0, range(size), [None] * size, broadcast, 0.0)
    return time.perf_counter() - began


def _evaluation(job: Job, worker: Worker, broadcast: Packed) -> float:
    """Seconds of one evaluation of the loss by all workers; generated answers are not timed."""
    examples = min(job.config.evaluation.examples, len(job.dataset.held_out))
    rows = range(min(job.config.evaluation.batch_size, examples))
    began = time.perf_counter()
    worker.evaluate(0, rows, broadcast, None, None)
    shards = math.ceil(examples / max(1, len(rows)))
    return (time.perf_counter() - began) * math.ceil(shards / job.config.resources.workers)


def _round(job: Job, speed: PackSpeed) -> float:
    """Seconds until the slowest worker has trained its packs, with one refresh in each; fewer are the rule."""
    config, size = job.config, speed.pack_size
    steps = max(local_steps(config, client) for client in range(config.federation.cohort))
    turns = math.ceil(math.ceil(config.federation.cohort / size) / config.resources.workers)
    return turns * size * (steps * speed.step + speed.refresh)
