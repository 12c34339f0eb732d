"""Additional metrics named in the configuration by hub id or local path, loaded by `evaluate`.

Their inputs are texts (greedy answers and references), class numbers (predicted and true), numbers of a regression, or
lists of 0 and 1 for each of several labels; their results numbers by name.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError

log = logging.getLogger(__name__)
_WARNED: set[str] = set()

FIELD = "evaluation.metrics"
Compute = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
"""Function from predictions and references, texts, class numbers, numbers or lists of these, to scores by name."""


def load_metrics(names: Sequence[str], sample: Sequence[Any]) -> dict[str, Compute]:
    """The metrics of these names, by name; their scores are named `<metric>/<score>`.

    sample: predictions, also used as references, to try each metric on.  Raises UserError for a name that `evaluate`
    cannot load, for two names with the same last part, and for a metric that needs more than predictions and references
    or returns no number.
    """
    found: dict[str, Compute] = {}
    for name in names:
        short = PurePath(name).stem
        if short in found:
            raise UserError(
                FIELD, name, "metrics whose names differ in their last part", "rename the file or leave one out"
            )
        found[short] = _metric(name, short)
        _tried(name, found[short], sample)
    return found


def metrics_of(config: Config, class_names: Sequence[str], kind: str = "") -> dict[str, Compute]:
    """The metrics of a configuration.  kind: of the data set.  Raises UserError as `load_metrics`, and where the run
    generates no answers."""
    asked = config.evaluation.metrics
    if asked and kind == "regression":
        return load_metrics(asked, [0.5, 1.0, 2.5])
    if asked and kind == "multi-label":
        return load_metrics(asked, [[int(at == one) for at in range(len(class_names))] for one in (0, 1)])
    if asked and not class_names and not config.evaluation.generate_rows:
        allowed = "none where nothing is answered and nothing classified"
        raise UserError(FIELD, list(asked), allowed, "set evaluation.generate_rows, e.g. 32")
    return load_metrics(asked, list(range(len(class_names))) or ["one of two", "a second answer"]) if asked else {}


def _metric(name: str, short: str) -> Compute:
    import evaluate

    # evaluate and its loaders raise many kinds: no such file or id, no network, a missing package, broken code.
    try:
        module = evaluate.load(name, keep_in_memory=True)
    except Exception as error:
        allowed = "ids of `evaluate.load`, or paths of files with an evaluate.Metric"
        raise UserError(FIELD, name, allowed, _line(error)) from None

    def compute(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        given = module.compute(predictions=list(predictions), references=list(references)) or {}
        return {f"{short}/{key}": float(value) for key, value in given.items() if _is_number(value)}

    return compute


def _tried(name: str, compute: Compute, sample: Sequence[Any]) -> None:
    kinds = {str: "texts", int: "class numbers", float: "numbers", list: "lists of 0 and 1 for each label"}
    kind = kinds[type(sample[0])]
    allowed = f"metrics that compute numbers from predictions and references alone, here {kind}"
    advice = "name another, or a file of your own around it"
    try:
        found = compute(sample, sample)
    except Exception as error:
        raise UserError(FIELD, name, allowed, f"{advice} ({_line(error)})") from None
    if not found:
        raise UserError(FIELD, name, allowed, f"{advice} (it gives no number)")


class MetricError(Exception):
    """Failure of a named metric on all predictions of a run."""


def named_scores(
    metrics: Mapping[str, Compute],
    predictions: Sequence[Any],
    references: Sequence[Any],
    client: int | None = None,
) -> dict[str, float]:
    """The scores of all metrics, by name; none without predictions.  client: whose rows these are, None: all rows.

    A score that is not defined is left out: NaN, and of a client, whose rows may be too few, whatever a metric fails
    on, which a warning says once.  Raises MetricError for one that fails on all rows.
    """
    found: dict[str, float] = {}
    for name, compute in metrics.items() if predictions else ():
        try:
            scores = compute(predictions, references)
        except Exception as error:
            if client is None:
                raise MetricError(f"metric {name}: {_line(error)}") from error
            _warn(name, _line(error))
            continue
        found |= {score: value for score, value in scores.items() if not math.isnan(value)}
    return found


def _warn(name: str, cause: str) -> None:
    """Once in a process for a metric: evaluations come again and again."""
    if name not in _WARNED:
        _WARNED.add(name)
        log.warning("evaluation.metrics: %s gives no score for some clients' rows: %s", name, cause)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
