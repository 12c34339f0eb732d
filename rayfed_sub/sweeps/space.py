"""Search space of a sweep: SWEEP.yaml is a configuration, the file that it builds on, and a section `sweep`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import numpy as np
from pydantic import Field

from rayfed_sub.clock.device_presets import power_of
from rayfed_sub.config.checks import NEEDS, check
from rayfed_sub.config.loading import as_override, check_kind, effective, flat, load_config, overridden, read_yaml
from rayfed_sub.config.schema import Config, Count, EachRound, Record
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.core.text import KINDS, LOWER, SCORES_OF
from rayfed_sub.methods import GROUPS, adopted, build, build_hook, fields_of

_LABELS = tuple(dict.fromkeys(name for kind, own in SCORES_OF.items() if kind != "causal-lm" for name in own))
_TEXTS = (
    *("rouge_l", "rouge_l_unicode", "bleu_4", "bleu_4_unicode"),
    *("teacher_forced_rouge_l", "teacher_forced_rouge_l_unicode"),
    *("teacher_forced_bleu_4", "teacher_forced_bleu_4_unicode"),
)
METRICS = {
    name: "min" if name in LOWER else "max"
    for name in ("held_out_loss", "perplexity", "token_accuracy", *_LABELS, *_TEXTS)
}
"""Scores for comparing trials, each with its better direction."""
COSTS = ("simulated_hours", "sent_bytes", "joules")
"""What trials may be compared by in place of a score, less being better: the clock's hours and energy need devices."""
_AT_THE_END = (*_TEXTS, *COSTS)

_SECTION = "sweep."


class Axis(Record):
    """Values of a key of the space."""

    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = Field(
        default=None, description="All of them, combined with every point of the other grids."
    )
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = Field(
        default=None, description="One of these is drawn."
    )
    uniform: tuple[float, float] | None = Field(default=None, description="Drawn between two numbers.")
    loguniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="Drawn between the logarithms of two numbers."
    )

    @property
    def between(self) -> tuple[float, float] | None:
        """The two ends of the range to draw from; None for a list of values."""
        return self.uniform or self.loguniform

    @property
    def values(self) -> tuple[Any, ...]:
        """All values, or the two ends."""
        return self.grid or self.choice or cast(tuple[float, float], self.between)

    def drawn(self, draws: np.random.Generator) -> Any:
        """A random value."""
        if self.choice:
            return self.choice[int(draws.integers(len(self.choice)))]
        low, high = cast(tuple[float, float], self.between)
        if self.loguniform:
            return math.exp(draws.uniform(math.log(low), math.log(high)))
        return float(draws.uniform(low, high))


class Search(Record):
    """The section `sweep`: the space of its trials, and how they are drawn, compared and stopped."""

    space: Annotated[dict[str, Axis], Field(min_length=1)] = Field(
        description="Dotted keys of the configuration, each with one kind of values: grid (all of them, combined with "
        "every point of the other grids), choice (drawn from these), uniform or loguniform (drawn between two numbers, "
        "or between their logarithms)."
    )
    metric: Literal[
        EachRound,
        "rouge_l",
        "rouge_l_unicode",
        "bleu_4",
        "bleu_4_unicode",
        "teacher_forced_rouge_l",
        "teacher_forced_rouge_l_unicode",
        "teacher_forced_bleu_4",
        "teacher_forced_bleu_4_unicode",
        "simulated_hours",
        "sent_bytes",
        "joules",
    ] = Field(
        default="held_out_loss",
        description="Score that compares the trials, or what they cost in all: simulated_hours and joules by the clock "
        "of their devices, sent_bytes up and down.",
    )
    trials: Count = Field(default=1, description="Draws for each point of the grid.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Seed of the draws.")
    scheduler: Literal["none", "asha", "median"] = Field(
        default="none",
        description="`asha` stops the worse half of the trials at rounds grace, 2 grace, 4 grace ...; `median` stops a "
        "trial whose best so far is worse than the median of what at least three others were on average up to that "
        "round, from round grace on.",
    )
    grace: Count = Field(default=1, description="Rounds before the scheduler stops a trial.")
    searcher: Literal["random", "optuna"] = Field(
        default="random", description="`random` draws, or optuna's TPE, which proposes and has no grid."
    )
    concurrent: Count | None = Field(
        default=None, description="Trials at a time at most; null stands for as many as fit."
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Times that a trial that failed goes on from its last round."
    )
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",),
        description="Loggers besides the sweep's own table; wandb and mlflow must be installed.",
    )

    @property
    def mode(self) -> str:
        """min or max: the better direction of the metric."""
        return METRICS.get(self.metric, "min")

    @property
    def score(self) -> str:
        """The metric, or the held-out loss where that is a cost."""
        return "held_out_loss" if self.metric in COSTS else self.metric


class Trials(Protocol):
    """Trials to run side by side: those of a sweep, or of a part of a study (`sweeps/study.py`)."""

    @property
    def name(self) -> str:
        """Name of the sweep or study."""

    @property
    def search(self) -> Search:
        """Space, metric and limits."""

    @property
    def count(self) -> int:
        """Number of trials."""

    def points(self) -> list[dict[str, Any]]:
        """The values of every trial."""

    def config(self, values: Mapping[str, Any]) -> Config:
        """The configuration of a trial."""

    def folder(self, number: str, values: Mapping[str, Any]) -> str:
        """The trial's run folder, relative to the folder of all trials; number: the trial's, of five digits."""


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.  tree: the keys of the configuration that all trials share; base: the path of the file that the
    sweep builds on, if there is one."""

    tree: Mapping[str, Any]
    search: Search
    base: tuple[str, ...] = ()

    @property
    def programs(self) -> dict[str, tuple[str, ...]]:
        """The programs that the configuration of any trial names besides its method, by key."""
        varied = {"evaluation", "evaluation.metrics", "callbacks"} & self.search.space.keys()
        found = [_with_values(self.tree, values).programs for values in (self.points() if varied else [{}])]
        return {key: tuple(dict.fromkeys(name for one in found for name in one[key])) for key in found[0]}

    @property
    def name(self) -> str:
        """Name of the configuration."""
        return load_config(self.tree).name

    def config(self, values: Mapping[str, Any]) -> Config:
        """The configuration of a trial.  Raises UserError where the values do not go together."""
        return adopted(_with_values(self.tree, values))[0]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Lines that name the fields of other methods that trials ignore, see `adopted`."""
        found = (adopted(_with_values(self.tree, values))[1] for values in self.points())
        return tuple(dict.fromkeys(filter(None, found)))

    def points(self) -> list[dict[str, Any]]:
        """The values of every trial; with optuna, which proposes them one by one, a sample for checks: each value of a
        key with the first and with the last values of all other keys."""
        space, seed = self.search.space, self.search.seed
        if self.search.searcher == "optuna":
            ends = [{key: axis.values[end] for key, axis in space.items()} for end in (0, -1)]
            return [{**end, key: value} for end in ends for key, axis in space.items() for value in axis.values]
        grids = {key: axis.grid for key, axis in space.items() if axis.grid}
        found: list[dict[str, Any]] = []
        for _ in range(self.search.trials):
            for point in product(*grids.values()):
                given, draws = dict(zip(grids, point, strict=True)), stream(seed, "sweep", len(found))
                drawn = {key: axis.drawn(draws) for key, axis in space.items() if not axis.grid}
                found.append({key: {**given, **drawn}[key] for key in space})
        return found

    def folder(self, number: str, values: Mapping[str, Any]) -> str:
        """The trial's number."""
        return number

    @property
    def count(self) -> int:
        """Number of trials."""
        return self.search.trials * math.prod(len(axis.grid) for axis in self.search.space.values() if axis.grid)


def _with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """A point's configuration; keys that have no effect there, as others of the space have it, are left out."""
    return load_config(effective(overridden(tree, [as_override(key, value) for key, value in values.items()])))


_RISING = {
    *("method.rank", "method.dropout", "task.max_length", "optimizer.weight_decay", "optimizer.momentum"),
    *("federation.sampled", "federation.availability", "federation.over_selection", "federation.rounds"),
    *("federation.local_steps", "federation.local_seconds", "federation.batch_size", "federation.proximal"),
}
"""Keys of which a larger number takes as much memory or more."""
_FREE = {
    *("seed", "task.seed", "optimizer.lr", "optimizer.final_lr_ratio", "optimizer.clip_norm", "optimizer.eps"),
    *("server.lr", "server.tau", "server.momentum", "federation.partition.alpha", "federation.partition.exponent"),
    *("method.scale", "method.alpha", "privacy.clip", "privacy.noise", "privacy.epsilon"),
}
"""Keys whose numbers take no memory."""


def largest(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The most demanding points: the Pareto-largest by numbers, for every combination of the other values and of
    those of `resources`.  Numbers of `_FREE` do not count; of keys that are not in `_RISING` small ones may take as
    much as large ones, so that both ends are kept.

    >>> largest([{"method.rank": 4, "optimizer.lr": 0.1}, {"method.rank": 8, "optimizer.lr": 0.2}])
    [{'method.rank': 8, 'optimizer.lr': 0.2}]
    >>> largest([{"method.refresh_every": every} for every in (5, 20, 200)])
    [{'method.refresh_every': 5}, {'method.refresh_every': 200}]
    """
    kinds: dict[str, list[tuple[tuple[float, ...], Mapping[str, Any]]]] = {}
    ways: dict[str, list[tuple[int, ...]]] = {}
    for point in points:
        sizes = {key: value for key, value in point.items() if _is_number(key, value) and key not in _FREE}
        kind = json.dumps({key: value for key, value in point.items() if not _is_number(key, value)})
        kinds.setdefault(kind, []).append((tuple(sizes.values()), point))
        ways[kind] = list(product(*((1,) if key in _RISING else (1, -1) for key in sizes)))
    found = []
    for kind, alike in kinds.items():
        by_size = dict(reversed(alike))  # of points alike the first
        ahead = {one for way in ways[kind] for one in by_size if not any(_less(one, o, way) for o in by_size)}
        found += [point for size, point in alike if size in ahead and by_size[size] is point]
    return found


def _less(one: Sequence[float], other: Sequence[float], way: Sequence[int]) -> bool:
    """Whether no number of `one` is ahead of the other's, and one behind it; way: 1 or -1, the direction of each."""
    return one != other and all(sign * a <= sign * b for a, b, sign in zip(one, other, way, strict=True))


def _is_number(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not key.startswith("resources.")


def load_sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    named: Callable[[str, object, str | None], None] = lambda group, name, base: None,
) -> Sweep:
    """The checked sweep from its YAML file and overrides: `sweep.trials=20` of the section, others of all trials.

    named: called with every name of a method or hook before its class is imported, and may refuse it; arguments:
    `method` or `hook`, the name, and the path of `base` where the name comes from there, None where it is in the
    sweep's file.
    Raises UserError, one line, for a file, a key of the space or a combination of values that is not valid.
    """
    tree = read_yaml(Path(path))
    section = [override for override in overrides if override.startswith(_SECTION)]
    if not section:
        check_kind(path, tree, "sweep")
    if not isinstance(tree.get("sweep"), Mapping) and not section:
        raise UserError("sweep", tree.get("sweep"), "a section with a space", "see experiments/sweeps")
    own = {key: value for key, value in tree.items() if key not in ("sweep", "base")}
    base = None if tree.get("base") is None else Path(path).parent / str(tree["base"])
    said = flat(own)
    if base is not None:
        own = overridden(base, [as_override(*item) for item in flat(own).items()])
    found = overridden({"sweep": tree.get("sweep", {})}, section)
    shared = overridden(own, [override for override in overrides if override not in section])
    axes = found["sweep"].get("space")
    axes = axes if isinstance(axes, Mapping) else {}
    common = load_config(_common(shared, axes))  # errors without any value of the space come first
    for key, axis in axes.items():
        prefix = f"sweep.space.{key}"
        _check_axis(check(Axis, axis, prefix), prefix)  # one at a time, so that the error names the key
    search = check(Search, found["sweep"], "sweep")
    _check_search(search)
    for group in GROUPS:
        naming, name = {group, f"{group}.name"}, getattr(common, group).get("name")
        if search.space.keys() - naming:  # else every trial has one of the space
            named(group, name, None)
            if base is not None and f"{group}.name" not in said:
                named(group, name, str(base))
        for key in naming & search.space.keys():
            for value in search.space[key].values:
                named(group, value.get("name") if isinstance(value, Mapping) else value, None)
    space = {key: _settled(shared, key, axis) for key, axis in search.space.items()}
    sweep = Sweep(shared, search.model_copy(update={"space": space}), () if base is None else (str(base),))
    for config in map(sweep.config, sweep.points()):
        build(config.method)
        build_hook(config.hook)
        _check_metric(search.metric, config)
    return sweep


def _common(tree: Mapping[str, Any], axes: Iterable[str]) -> dict[str, Any]:
    """The tree without keys that have an effect only at some points of a space with these keys."""
    below = tuple(f"{axis}." for axis in axes)  # an axis may be a section
    varied = [need for need in NEEDS if any(f"{key}.".startswith(below) for key in need[:2])]
    return effective(overridden(tree, []), varied)


def _settled(tree: Mapping[str, Any], key: str, axis: Axis) -> Axis:
    """The axis with its values in the configuration's types.

    Raises UserError for an unknown key, and for a value that the key does not allow.
    """
    if key == "name":
        raise UserError("sweep.space", key, "keys that change what a trial does", "remove it")
    values = tuple(_taken(tree, key, value) for value in axis.values)
    kind = next(kind for kind in Axis.model_fields if getattr(axis, kind) is not None)
    return Axis(**{kind: values})


def _taken(tree: Mapping[str, Any], key: str, value: Any) -> Any:
    """The value in the configuration's type: 3 for 3.0 of an integer key, 1.0 for 1 of a float key."""
    _with_values(tree, {key: value})
    config = check(Config, overridden(tree, [as_override(key, value)]))
    found: Any = {**config.model_dump(), **fields_of(config, build(config.method), build_hook(config.hook))}
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, bool | int | float | str) else value


def _check_axis(axis: Axis, prefix: str) -> None:
    """UserError where a key has no kind of values or several kinds, or a range whose ends do not fit."""
    given = [kind for kind in Axis.model_fields if getattr(axis, kind) is not None]
    kind = (given or ["grid"])[-1]
    if len(given) != 1:
        allowed = "one of grid, choice, uniform and loguniform"
        raise UserError(f"{prefix}.{kind}", getattr(axis, kind), allowed, "e.g. grid: [1, 2]")
    if axis.between is not None and axis.between[0] >= axis.between[1]:
        raise UserError(f"{prefix}.{kind}", axis.between, "a lower and a higher number", f"e.g. {kind}: [0.1, 1.0]")


def _check_search(search: Search) -> None:
    """UserError where searcher or scheduler do not fit the space or the metric."""
    if search.searcher == "optuna" and any(axis.grid for axis in search.space.values()):
        allowed = "random where the space has a grid"
        raise UserError("sweep.searcher", "optuna", allowed, "write choice: in place of grid:")
    for field in ("scheduler", "searcher"):
        value, default = getattr(search, field), Search.model_fields[field].default
        if value != default and search.metric in _AT_THE_END:
            allowed = f"{default} with metric={search.metric}, known at a trial's end"
            raise UserError(f"sweep.{field}", value, allowed, "use held_out_loss")


def check_metric_of(metric: str, kinds: Iterable[str]) -> None:
    """UserError for a metric that data sets with these kinds of labels do not have: a column of numbers may be classes
    or a regression, which its rows say."""
    for kind in kinds:
        known = (*SCORES_OF[kind], *(_TEXTS if kind == "causal-lm" else ()), *COSTS)
        if metric not in known:
            allowed = f"a score of {KINDS[kind]}: {', '.join(SCORES_OF[kind])}"
            raise UserError("sweep.metric", metric, allowed, "change sweep.metric")


def _check_metric(metric: str, config: Config) -> None:
    """UserError for a metric that the trial will not compute."""
    if metric in COSTS:
        _check_cost(metric, config)
        return
    from rayfed_sub.data.tasks import filled

    task = filled(config.task)
    if task.labels and task.problem is None and metric not in _LABELS:
        allowed = f"a score of labels: {', '.join(_LABELS)}"
        raise UserError("sweep.metric", metric, allowed, "change sweep.metric")
    if task.problem is not None and metric not in SCORES_OF[task.problem]:
        allowed = f"a score with task.problem={task.problem}: {', '.join(SCORES_OF[task.problem])}"
        raise UserError("sweep.metric", metric, allowed, "change sweep.metric")
    if not task.labels and metric in _LABELS and metric != "held_out_loss":
        raise UserError("sweep.metric", metric, "a metric of texts, for this task has no classes", "e.g. held_out_loss")
    if metric in _TEXTS and not config.evaluation.generate_rows:
        raise UserError("sweep.metric", metric, "a metric that is measured", "set evaluation.generate_rows, e.g. 32")


def _check_cost(metric: str, config: Config) -> None:
    classes = config.devices.classes
    if metric != "sent_bytes" and not classes:
        allowed = "a metric of trials without devices, such as sent_bytes"
        raise UserError("sweep.metric", metric, allowed, "add devices.classes")
    if metric == "joules" and any(power_of(device) is None for device in classes.values()):
        allowed = "a metric of devices whose power is known"
        raise UserError("sweep.metric", metric, allowed, "set the power of each of devices.classes")
