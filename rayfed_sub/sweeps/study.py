"""Definition of a study: a claim, variants of a configuration, several seeds, and a setting to tune first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rayfed_sub.config.checks import check
from rayfed_sub.config.loading import check_kind, load_config, read_yaml
from rayfed_sub.config.schema import Config, Devices, Record
from rayfed_sub.core.errors import UserError
from rayfed_sub.methods import build, build_hook
from rayfed_sub.reports.retiming import waits_for_all, with_devices
from rayfed_sub.sweeps.space import Axis, Search


class Tune(Record):
    """Tuning of a study: each variant takes the value with the lowest mean loss on the validation rows; the held-out
    rows are never used."""

    key: str = Field(description="The configuration's key to tune.")
    values: Annotated[tuple[bool | int | float | str, ...], Field(min_length=1)] = Field(description="Candidates.")
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        default=(0,), description="Seeds of the tuning runs."
    )
    set: tuple[str, ...] = Field(default=(), description="Overrides of the tuning runs, such as fewer rounds.")
    more: dict[str, tuple[float, ...]] = Field(
        default={}, description="More candidates of single variants, by name, where `values` are numbers."
    )

    def values_of(self, variant: str) -> tuple[bool | int | float | str, ...]:
        """The variant's candidates, in rising order where it has more than the others."""
        more = self.more.get(variant, ())
        return tuple(sorted({*self.values, *more})) if more else self.values


class Written(Record):
    """The keys of a study's file, where they stand without `study.`; paths are relative to it."""

    claim: str = Field(description="The claim to be tested, with its source.")
    base: Path = Field(description="File of the configuration that all variants share.")
    variants: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)] = Field(
        description="Overrides of each variant, by its name."
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = Field(description="Seeds of the runs that count.")
    set: tuple[str, ...] = Field(default=(), description="Overrides of all runs.")
    tune: Tune | None = Field(default=None, description="A key whose value each variant chooses first.")
    equal_bytes: str | None = Field(
        default=None, description="Variant whose traffic is the budget of the column of equal bytes."
    )
    mixes: dict[str, Devices] = Field(
        default={},
        description="Mixes of devices by name, each a section `devices`: every counted run, which has none of its own, "
        "is told again for each of them, for a table of hours.",
    )
    target: float | None = Field(
        default=None,
        description="Held-out loss: the table of hours has what it takes to reach it; needs mixes or devices.",
    )
    equal_hours: str | None = Field(
        default=None,
        description="Variant whose simulated time is the budget of a column of the table of hours; it needs mixes "
        "or devices.",
    )
    results: Path = Field(default=Path(), description="Folder of the CSV files; by default that of the study's file.")


class Study(Written):
    """A study with paths relative to the working directory; file: the study's file."""

    file: Path

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem


@dataclass(frozen=True)
class StudyTrial:
    """A run of a study.  value: of the tuned key; tuning: True for a run that serves to choose the value."""

    variant: str
    seed: int
    value: Any
    tuning: bool
    overrides: tuple[str, ...] = field(repr=False)

    @property
    def folder(self) -> Path:
        """Its run folder, relative to the study's."""
        value = "" if self.value is None else f"-{self.value}"
        return Path(self.variant) / f"{'tuning' if self.tuning else 'run'}{value}-{self.seed}"

    @property
    def values(self) -> dict[str, Any]:
        """The values that identify the trial in its part of the study."""
        return {"variant": self.variant, "seed": self.seed, "value": self.value}


@dataclass(frozen=True)
class Part:
    """A study's tuning trials or its counted trials, as `Trials` for `sweeps/runner.py`.  tree: the keys of the study's
    base."""

    name: str
    tree: Mapping[str, Any]
    trials: tuple[StudyTrial, ...]
    concurrent: int

    @property
    def search(self) -> Search:
        """Settings of the trials: no early stopping, no retry after a failure."""
        first, points = self.trials[0].values, self.points()
        values = {key: [point[key] for point in points] for key in first if first[key] is not None}
        space = {key: Axis(grid=tuple(dict.fromkeys(found))) for key, found in values.items()}
        return Search(space=space, concurrent=self.concurrent, retries=0, loggers=())

    @property
    def count(self) -> int:
        """Number of trials."""
        return len(self.trials)

    def points(self) -> list[dict[str, Any]]:
        """The values of every trial."""
        return [trial.values for trial in self.trials]

    def trial(self, values: Mapping[str, Any]) -> StudyTrial:
        """The trial of these values."""
        return next(trial for trial in self.trials if trial.values == values)

    def config(self, values: Mapping[str, Any]) -> Config:
        """The configuration of a trial.  Raises UserError where the overrides do not go together."""
        return load_config(self.tree, [*self.trial(values).overrides, f"name={self.name}"])

    def folder(self, number: str, values: Mapping[str, Any]) -> str:
        """The run folder of a trial."""
        return self.trial(values).folder.as_posix()


def load_study(path: Path) -> Study:
    """The checked study from its YAML file.  Raises UserError for keys and values that are not valid."""
    tree = read_yaml(path, "STUDY.yaml")
    if "sweep" in tree or not tree.keys() & Written.model_fields.keys():
        check_kind(path, tree, "study")
    for key in ("base", "results"):
        if not isinstance(tree.get(key, "."), str):
            raise UserError(f"study.{key}", tree[key], "a path from the study's file", f"e.g. {key}: ../tiny.yaml")
    if "base" not in tree:
        raise UserError("study.base", None, "the configuration that all variants share", "e.g. base: ../tiny.yaml")
    if "file" in tree:
        raise UserError("study.file", tree["file"], "the keys of a study", "remove it")
    places = {"file": path, "base": path.parent / tree["base"], "results": path.parent / tree.get("results", ".")}
    if isinstance(tree.get("tune"), Mapping):
        check(Tune, tree["tune"], "study.tune")  # first, so that the error names its key
    study = check(Study, {**tree, **places}, "study")
    for budget in ("equal_bytes", "equal_hours"):
        if (variant := getattr(study, budget)) is not None:
            check_variant(study, f"study.{budget}", variant)
    for name in study.variants:
        if "/" in name or name in ("", ".", ".."):
            raise UserError("study.variants", name, "names that may be a folder's", "rename it")
    if study.tune is not None:
        _check_more(study, study.tune)
    given = {"seeds": study.seeds} if study.tune is None else {"seeds": study.seeds, "tune.seeds": study.tune.seeds}
    for key, seeds in given.items():
        if len(set(seeds)) < len(seeds):
            raise UserError(f"study.{key}", list(seeds), "each seed once", "remove the second")
    return study


def _check_more(study: Study, tune: Tune) -> None:
    for variant, more in tune.more.items():
        check_variant(study, "study.tune.more", variant)
        if any(isinstance(value, str | bool) for value in tune.values):
            allowed = "nothing where study.tune.values are no numbers"
            raise UserError("study.tune.more", {variant: list(more)}, allowed, "add them to study.tune.values")


def check_variant(study: Study, option: str, name: str) -> None:
    """UserError where the study has no variant of that name; option: the key or option that names it."""
    if name not in study.variants:
        raise UserError(option, name, f"a variant of {study.name}: {'; '.join(study.variants)}", "name one of these")


def tuning_trials(study: Study, variant: str, more: Sequence[str]) -> Iterator[StudyTrial]:
    """The variant's tuning runs, always evaluated on validation rows; more: overrides of all runs."""
    tune = study.tune
    if tune is None:
        return
    for value in tune.values_of(variant):
        for seed in tune.seeds:
            settings = (f"{tune.key}={value}", "evaluation.generate_rows=0", "evaluation.split=validation")
            shared = (*study.set, *study.variants[variant], *tune.set, f"seed={seed}", *more)
            yield StudyTrial(variant, seed, value, True, (*shared, *settings))


def counted_trials(study: Study, variant: str, more: Sequence[str], value: Any) -> Iterator[StudyTrial]:
    """The variant's counted runs, with the chosen value if the study tunes a key."""
    key = () if study.tune is None else (f"{study.tune.key}={value}",)
    for seed in study.seeds:
        overrides = (*study.set, *study.variants[variant], f"seed={seed}", *more, *key)
        yield StudyTrial(variant, seed, value, False, overrides)


def check_trials(study: Study, more: Sequence[str]) -> None:
    """UserError for a run whose configuration is not valid, and for keys of a table of hours that no run is in; more:
    overrides of all runs."""
    base, timed = read_yaml(study.base, "study.base"), set[str]()
    for variant in study.variants:
        value = study.tune.values[0] if study.tune else None
        for trial in (*tuning_trials(study, variant, more), *counted_trials(study, variant, more, value)):
            config = load_config(base, trial.overrides)
            build(config.method)
            build_hook(config.hook)
            if study.mixes and not trial.tuning:
                _check_mixes(study, trial, config)
            if study.mixes or (config.devices.classes and not trial.tuning):
                timed.add(variant)
    advice = "give its runs devices.classes, or the study mixes; or remove it"
    if study.target is not None and not timed:
        raise UserError("study.target", study.target, "null in a study without devices, which has no hours", advice)
    if study.equal_hours is not None and study.equal_hours not in timed:
        raise UserError("study.equal_hours", study.equal_hours, "a variant with devices, whose hours are known", advice)


def _check_mixes(study: Study, trial: StudyTrial, config: Config) -> None:
    """UserError where a run could not be told again for each of the study's mixes."""
    if config.devices.classes or not waits_for_all(config):
        allowed = f"nothing with {trial.variant}, whose training depends on devices of its own"
        raise UserError("study.mixes", list(study.mixes), allowed, "remove its devices, or the mixes")
    for name, devices in study.mixes.items():
        if devices.trace is not None:  # whose clients are known once the rows are read
            allowed = "null, for the devices of a mix are dealt by shares"
            raise UserError(f"study.mixes.{name}.trace", devices.trace, allowed, "rayfed-sub retime reads traces")
        try:
            with_devices(config, devices)
        except UserError as error:
            field = f"study.mixes.{name}{error.field.removeprefix('--').removeprefix('devices')}"
            raise UserError(field, error.value, error.allowed, error.advice) from None
        for kind, device in devices.classes.items():
            if device.hours or device.dropout:
                allowed = "devices without hours and dropout, by which other clients would train"
                raise UserError(f"study.mixes.{name}.classes.{kind}", "hours or dropout", allowed, "remove them")
