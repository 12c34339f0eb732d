"""Alerts on signs of trouble in a run's rows: the observation, its likely cause, the key to change.

Plain rules with fixed thresholds, each with its reason below.  A rule waits for enough rows not to take noise for a
sign, and reads the newest ones, so it can run after every round.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Protocol

from rayfed_sub.config.schema import Config
from rayfed_sub.core.schemas import ClientLayer, CohortLayer
from rayfed_sub.methods import METHODS, class_of

# Thresholds on losses.
_LEAST = 0.005  # relative fall that counts as progress; two evaluations on some dozens of rows differ by less by chance
_WORSE = 0.05  # relative rise of the held-out loss above its best that is no wobble any more: ten times as much
_NATS = 0.02  # a loss that moves by less (nats per label) stands still, however much that is of a small one
_JUDGED = 3  # evaluations after training, before a rule judges the loss

# Thresholds on diagnostics, which so many diagnosed rounds in a row must pass: one cohort may be an unlucky draw.
DIAGNOSED_ROUNDS = 3
# Mean cosine of two clients' changes.  At 0.05 the mean of eight is 41 % as long as one of them, at 0 it is 35 %.
# Healthy runs come there too as they near their end: it is an alert only where the loss has stopped falling.
_AGREEMENT = 0.05
_CROSS = 0.1  # share of the mean product of B and A that averaging them apart loses: a tenth of all that was learned
_TRUNCATED = 0.3  # share of the norm: 9 % of the square, which is what the truncation minimises
_ENERGY = 0.3  # share of a gradient's square that its strongest directions hold: below it most of it is elsewhere

# Thresholds on machines.
_MEMORY = 1.2  # times the planned memory: plans are right within a fifth; and times what it was when it began to grow
_GROWING = 6  # rounds in a row in which memory grows; caches and heaps settle within the first two or three
_SKIPPED = 0.1  # share of clients' rounds: with more, the mean is one over other data
_FEW = 3  # failures or retries that may be accidents
_LOST = 3  # rounds without any update, and more than half of all: one or two may be an unlucky draw

BY_METHOD = ("cross term", "truncation", "full rank", "gradients")
"""Rules for methods that name them (`alerts` in `methods/protocol.py`); all other rules hold for every method."""


@dataclass(frozen=True)
class Alert:
    """name: the rule's; raised once in a run.  text: one line with the observation in numbers, the likely cause, a
    key."""

    name: str
    text: str


class Round(Protocol):
    """A row of rounds.parquet, as `core/schemas.py` defines it."""

    @property
    def round(self) -> int: ...
    @property
    def clients(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def held_out_loss(self) -> float | None: ...
    @property
    def retries(self) -> int: ...
    @property
    def memory_bytes(self) -> int | None: ...


def alerts(
    rounds: Sequence[Round],
    layers: Sequence[CohortLayer],
    client_layers: Sequence[ClientLayer],
    config: Config,
    *,
    before: float | None = None,
    planned: int | None = None,
) -> list[Alert]:
    """Alerts on the rows so far, the gravest first; empty for a healthy run.

    rounds: all rows so far, in order.  layers, client_layers: rows of the newest three diagnosed rounds; older rows do
    no harm.  before: held-out loss before training; planned: bytes of memory; both may be unknown.
    A missing figure is None or NaN, so rows of a table serve as well.
    """
    method = str(config.method["name"])
    rules, diagnosed = _rules_of(method), _newest(layers)
    found = [
        *_dropped(rounds, config),
        *_losses(rounds, config, before),
        *_drift(rounds, diagnosed, config),
        *(_cross_term(diagnosed, method) if "cross term" in rules else ()),
        *(_truncation(diagnosed) if "truncation" in rules else ()),
        *(_full_rank(diagnosed) if "full rank" in rules else ()),
        *(_gradients(_newest(client_layers)) if "gradients" in rules else ()),
        *_memory(rounds, planned),
        *_trouble(rounds, config),
    ]
    return found


def _rules_of(method: str) -> frozenset[str]:
    """The rules of BY_METHOD that a method names.  A class outside the table of methods is not imported: a run
    folder may come from somebody else."""
    rules: frozenset[str] = getattr(class_of(method), "alerts", frozenset()) if method in METHODS else frozenset()
    return rules


def _dropped(rounds: Sequence[Round], config: Config) -> Iterator[Alert]:
    """Rounds whose clients were all dropped, those aside that failed."""
    lost = sum(row.clients > row.failed and _number(row.loss) is None for row in rounds)
    if not config.devices.classes or lost < _LOST or 2 * lost <= len(rounds):
        return
    federation, devices = config.federation, config.devices
    deadline, classes = federation.round_deadline, devices.classes.values()
    if devices.trace is not None:
        hours = ["lengthen the hours in devices.trace"]
    else:
        hours = ["lengthen the hours of devices.classes"] if any(device.hours for device in classes) else []
    keys = [
        *([] if deadline is None else [f"raise federation.round_deadline={deadline:g}"]),
        *hours,
        *(["lower the dropout of devices.classes"] if any(device.dropout for device in classes) else []),
        f"lower federation.{'local_steps' if federation.local_seconds is None else 'local_seconds'}",
    ]
    yield Alert(
        "dropped clients",
        f"in {lost} of {len(rounds)} rounds no update counted: clients do not end in time, or leave (timeline.parquet "
        f"says which); {' or '.join(keys)}",
    )


def _losses(rounds: Sequence[Round], config: Config, before: float | None) -> Iterator[Alert]:
    """Divergence, or no progress; neither where nobody's training has a loss."""
    judged = _judged(rounds, config)
    if len(judged) < _JUDGED or all(_number(row.loss) is None for row in rounds):
        return
    untrained = _number(before)
    first = judged[0][1] if untrained is None else untrained
    best = min(first, *(loss for _, loss in judged))
    (last, now), newest = judged[-1], [loss for _, loss in judged[-2:]]
    if min(newest) > best * (1 + _WORSE) and min(newest) > best + _NATS:
        since = max((n for n, loss in judged if loss == best), default=-1)
        above = f"{now / best - 1:.0%} above its best" if best > 0 else "above its best,"
        observed = f"held-out loss is {now:.3g} after round {last + 1}, {above} {best:.3g}"
        trend = _trend([row for row in rounds if row.round >= since])
        if trend is not None and trend < -_LEAST:
            cause = "while the training loss still falls: clients overfit; end earlier (federation.rounds)"
            yield Alert("divergence", f"{observed}, {cause} or lower federation.local_steps")
        else:
            keys = f"lower optimizer.lr={config.optimizer.lr:g} or federation.local_steps"
            yield Alert("divergence", f"{observed}: training diverges, its steps are too long; {keys}")
        return
    lowest = min(loss for _, loss in judged)
    if lowest > first * (1 - _LEAST) and first > _NATS:
        seen = f"held-out loss is {now:.3g} after round {last + 1}, at best {lowest:.3g}, was {first:.3g}: no progress"
        trend, lr = _trend(rounds), f"optimizer.lr={config.optimizer.lr:g}"
        if trend is None or abs(trend) <= _LEAST:
            yield Alert("no progress", f"{seen}, and the training loss stands still: steps are too short; raise {lr}")
        elif trend > 0:
            yield Alert("no progress", f"{seen}, and the training loss rises by {trend:.1%}: lower {lr}")
        else:
            cause = "what clients learn of their own rows does not carry over"
            keys = "lower federation.local_steps or choose a less skewed federation.partition"
            yield Alert("no progress", f"{seen}, while the training loss falls by {-trend:.1%}: {cause}; {keys}")


def _drift(rounds: Sequence[Round], diagnosed: Sequence[Sequence[CohortLayer]], config: Config) -> Iterator[Alert]:
    """Disagreeing clients while the held-out loss stands still: orthogonal changes alone do no harm."""
    judged = [loss for _, loss in _judged(rounds, config)]
    if len(judged) < _JUDGED or min(judged[-2:]) < min(judged[:-2]) * (1 - _LEAST):
        return
    agreements = [_median(rows, "agreement") for rows in diagnosed]
    if _shown([None if a is None else -a for a in agreements], -_AGREEMENT):
        drift, agreement = _median(diagnosed[-1], "drift"), agreements[-1]
        strayed = "" if drift is None else f", they lie {drift:.1f} times its length from their mean"
        yield Alert(
            "client drift",
            f"clients' changes hardly agree (mean cosine {agreement:.2f}, median over layers){strayed}, and the "
            "held-out loss no longer falls: clients drift apart between two averagings; lower federation.local_steps "
            "(T_agg) or optimizer.lr, set federation.proximal=0.01, or choose a less skewed federation.partition",
        )


def _cross_term(diagnosed: Sequence[Sequence[CohortLayer]], method: str) -> Iterator[Alert]:
    shares = [_median(rows, "cross_term") for rows in diagnosed]
    if _shown(shares, _CROSS):
        yield Alert(
            "cross term",
            f"{method} averages B and A apart, which misses {shares[-1]:.0%} of the mean of the clients' products "
            "(median over layers): method.name=fedex-lora or ffa-lora average exactly",
        )


def _truncation(diagnosed: Sequence[Sequence[CohortLayer]]) -> Iterator[Alert]:
    shares = [_median(rows, "truncated") for rows in diagnosed]
    if _shown(shares, _TRUNCATED):
        yield Alert(
            "truncation",
            f"cutting the mean back to the clients' rank loses {shares[-1]:.0%} of its norm (median over layers): rank "
            "inflation; raise method.rank, or take method.name=flora or fedex-lora, which keep all of it",
        )


def _full_rank(diagnosed: Sequence[Sequence[CohortLayer]]) -> Iterator[Alert]:
    """Mean changes of full rank in most layers."""

    def full(rows: Sequence[CohortLayer]) -> float:
        return sum(bool(row.full_rank) and _number(row.rank) == row.full_rank for row in rows) / len(rows)

    if _shown([full(rows) for rows in diagnosed], 0.5):
        most = statistics.median(row.full_rank for row in diagnosed[-1])
        yield Alert(
            "full rank",
            f"the mean change has full rank ({most:g}, median over layers) in {full(diagnosed[-1]):.0%} of the layers: "
            "of so many clients' changes nothing low-rank is left to send down; lower federation.sampled or "
            "method.rank",
        )


def _gradients(diagnosed: Sequence[Sequence[ClientLayer]]) -> Iterator[Alert]:
    shares = [_median(rows, "gradient_energy") for rows in diagnosed]
    if _shown([None if share is None else -share for share in shares], -_ENERGY):
        yield Alert(
            "gradients",
            f"a gradient's strongest method.rank directions hold {shares[-1]:.0%} of its squared norm (median over "
            "layers): most of it is projected away; raise method.rank or lower method.refresh_every",
        )


def _memory(rounds: Sequence[Round], planned: int | None) -> Iterator[Alert]:
    """Memory above the plan, or memory that keeps growing."""
    used = [memory for row in rounds if (memory := _number(row.memory_bytes)) is not None]
    expected = _number(planned)
    if used and expected and max(used) > _MEMORY * expected:
        yield Alert(
            "memory",
            f"coordinator and workers took {_gb(max(used))}, {max(used) / expected - 1:.0%} more than the planned "
            f"{_gb(expected)}: lower resources.pack_size, resources.workers or federation.batch_size if it gets tight",
        )
    last = used[-_GROWING - 1 :]
    if len(last) > _GROWING and all(a < b for a, b in pairwise(last)) and last[-1] > _MEMORY * last[0]:
        yield Alert(
            "memory growth",
            f"memory grew in each of the last {_GROWING} rounds, from {_gb(last[0])} to {_gb(last[-1])}: clients' "
            "states lie in memory up to resources.state_memory, lower it; if it grows beyond that, something leaks",
        )


def _trouble(rounds: Sequence[Round], config: Config) -> Iterator[Alert]:
    """Clients skipped, packs retried."""
    failed, drawn = sum(row.failed for row in rounds), sum(row.clients for row in rounds)
    if failed > _FEW and failed > _SKIPPED * drawn:
        yield Alert(
            "skipped clients",
            f"{failed} of {drawn} clients' rounds were skipped (clients.parquet says why): where losses are not finite "
            f"lower optimizer.lr={config.optimizer.lr:g} or set optimizer.clip_norm=1.0; else look at their data",
        )
    retries = sum(int(_number(row.retries) or 0) for row in rounds)
    if retries > _FEW and 2 * retries > len(rounds):
        yield Alert(
            "retries",
            f"packs were trained again {retries} times in {len(rounds)} rounds (packs.parquet says why): where workers "
            "die of memory, lower resources.pack_size or resources.workers; where time runs out, raise "
            "resources.deadline",
        )


def _judged(rounds: Sequence[Round], config: Config) -> list[tuple[int, float]]:
    """(round, held-out loss) after warm-up, where it was evaluated."""
    warm = [row for row in rounds if row.round >= config.optimizer.warmup_rounds]
    return [(row.round, loss) for row in warm if (loss := _number(row.held_out_loss)) is not None]


def _trend(rounds: Sequence[Round]) -> float | None:
    """Relative change of the training loss from the first third of the rounds to the last."""
    losses = [loss for row in rounds if (loss := _number(row.loss)) is not None]
    if len(losses) < 2 or losses[0] <= 0:
        return None
    third = max(1, len(losses) // 3)
    return statistics.mean(losses[-third:]) / statistics.mean(losses[:third]) - 1


def _newest(rows: Sequence[Any]) -> list[list[Any]]:
    """The rows of the newest diagnosed rounds, by round; empty while there are too few such rounds."""
    rounds: dict[int, list[Any]] = {}
    for row in rows:
        rounds.setdefault(row.round, []).append(row)
    return [rounds[n] for n in sorted(rounds)[-DIAGNOSED_ROUNDS:]] if len(rounds) >= DIAGNOSED_ROUNDS else []


def _median(rows: Sequence[Any], figure: str) -> float | None:
    """Median over the rows that have the figure; None where none has."""
    numbers = [number for row in rows if (number := _number(getattr(row, figure))) is not None]
    return statistics.median(numbers) if numbers else None


def _shown(figures: Sequence[float | None], threshold: float) -> bool:
    """True where there are values and all are above it."""
    return bool(figures) and all(figure is not None and figure > threshold for figure in figures)


def _number(figure: Any) -> float | None:
    """A number as float; None where it is missing (None or NaN) or not finite."""
    return float(figure) if isinstance(figure, Real) and math.isfinite(figure) else None


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
