"""Metrics of a finished round by name, for TensorBoard and Prometheus, from the same record as the tables.

Counts are summed over the run, because a reader of gauges may miss rounds; metrics of some rounds only (scores, drift)
are set after those.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from rayfed_sub.core.schemas import Score
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.telemetry.events import RoundDone

FIGURES = {
    "loss/training": "mean over the round's clients and their local steps, nats per label",
    "loss/held_out": "over all held-out rows, nats per label",
    "bytes/up": "sent by clients since the run began, wire bytes",
    "bytes/down": "sent to clients since the run began, wire bytes",
    "round/finished": "finished rounds",
    "round/seconds": "seconds of the round, with evaluation",
    "round/training_seconds": "seconds of the round, without evaluation",
    "round/clients_per_second": "clients of the round per second of training",
    "round/labels_per_second": "tokens, or classified rows, that carried loss, per second of training",
    "memory/bytes": "memory of coordinator and workers at the round's end, PSS",
    "trouble/failed": "clients that were skipped since the run began",
    "trouble/retries": "packs that were given out again since the run began",
    "privacy/epsilon": "privacy spent",
    "rank/server": "rank of the server's change of the round, median over target layers",
    "rank/cohort": "rank of the watched clients' mean change, median over target layers",
    "rank/effective": "effective rank of the watched clients' mean change, median over target layers",
    "clients/drift": "distance of the clients' changes to their mean over the norm of that, median over target layers",
    "clients/agreement": "mean cosine between two clients' changes, median over target layers",
    "clients/overlap": "mean overlap of two clients' subspaces, 0 to 1, median over target layers",
    "lost/truncated": "share of the mean term that truncation to the clients' rank loses, median over target layers",
    "lost/cross_term": "relative error of averaging A and B apart, median over target layers",
    "gradient/energy": "share of a gradient's energy in its top r directions, median over clients and layers",
    "weights/accumulated": "distance to the pretrained weights over their norm, median over target layers",
}
"""Names and meanings of all metrics except `scores/<metric>`."""

SCORES = "scores"

_LAYERS = {
    "rank/cohort": "rank",
    "rank/effective": "effective_rank",
    "clients/drift": "drift",
    "clients/agreement": "agreement",
    "clients/overlap": "overlap",
    "lost/truncated": "truncated",
    "lost/cross_term": "cross_term",
    "weights/accumulated": "accumulated",
}
SUMMED = {
    "bytes/up": "uplink_bytes",
    "bytes/down": "downlink_bytes",
    "trouble/failed": "failed",
    "trouble/retries": "retries",
}
"""Totals over the run, each with its column of rounds.parquet."""


def scalars(done: RoundDone, before: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a round by name, without missing ones, such as scores where no evaluation was due.
    before: `SUMMED` over the rounds before this one."""
    row, seconds = done.row, done.row.train_seconds
    known = {
        "loss/training": row.loss,
        **{tag: before[tag] + getattr(row, column) for tag, column in SUMMED.items()},
        "round/finished": row.round + 1,
        "round/seconds": row.seconds,
        "round/training_seconds": seconds,
        "round/clients_per_second": row.clients / seconds,
        "round/labels_per_second": row.labels / seconds,
        "memory/bytes": row.memory_bytes,
        "privacy/epsilon": row.epsilon,
        "rank/server": row.change_rank,
        **{tag: _median(getattr(layer, name) for layer in done.layers) for tag, name in _LAYERS.items()},
        "gradient/energy": _median(layer.gradient_energy for layer in done.client_layers),
    }
    return {tag: float(value) for tag, value in known.items() if value is not None} | judged(done.scores)


def judged(scores: Iterable[Score]) -> dict[str, float]:
    """The scores over all held-out rows by name.

    >>> judged([Score(None, "held_out_loss", 2.5, 40), Score(None, "accuracy", 0.5, 4), Score(3, "accuracy", 1.0, 1)])
    {'loss/held_out': 2.5, 'scores/accuracy': 0.5}
    """
    values = overall(tuple(scores))
    return {"loss/held_out" if name == "held_out_loss" else f"{SCORES}/{name}": value for name, value in values.items()}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
