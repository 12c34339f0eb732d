"""In which keys configurations differ: from each other, or from the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from rayfed_sub.config.loading import flat
from rayfed_sub.config.schema import Config
from rayfed_sub.methods import METHODS, build
from rayfed_sub.reports.page import Cell, Section, Table, Text
from rayfed_sub.reports.run_reader import Runs


def differences(runs: Runs) -> Section:
    """A table of the keys that differ, and their values."""
    trees = {name: flat(run.config.model_dump(mode="json")) for name, run in runs.items()}
    if len(runs) == 1:
        (own,) = trees.values()
        columns = {"this run": own, "default": defaults(next(iter(runs.values())).config)}
        caption, title = "Keys whose values are not the defaults.", "What was set"
    else:
        columns, title = trees, "How the configurations differ"
        caption = "Keys in which the runs' configurations differ; - where a method has no such key."
    if len(runs) == 1:  # what an older run has not is as it is by default
        columns = {name: {key: value for key, value in tree.items() if key in own} for name, tree in columns.items()}
    keys = [key for key in dict.fromkeys(key for tree in columns.values() for key in tree) if _differ(key, columns)]
    rows: list[list[Cell | str]] = [[key, *(_cell(tree, key) for tree in columns.values())] for key in keys]
    if not rows:
        return Section(title, [Text("In nothing.")])
    return Section(title, [Table(caption, ["key", *columns], rows)])


def defaults(config: Config) -> dict[str, Any]:
    """What every key would be that is not set, the method's own fields among them where it is one of the table: a
    report does not import what a run's configuration names."""
    name, own = config.method["name"], dict[str, Any]()
    if name in METHODS:
        own = asdict(cast(Any, build({"name": name})))
    tree = Config().model_dump(mode="json")
    return flat({**tree, "method": {**own, "name": tree["method"]["name"]}})


def _differ(key: str, columns: Mapping[str, Mapping[str, Any]]) -> bool:
    values = [_plain(tree.get(key)) for tree in columns.values()]
    return any(value != values[0] for value in values)


def _plain(value: Any) -> Any:
    """A tuple of a record is a list in a file."""
    return list(value) if isinstance(value, tuple) else value


def _cell(tree: Mapping[str, Any], key: str) -> Cell | str:
    value = _plain(tree.get(key))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:g}" if isinstance(value, float) else f"{value}", float(value))
    if value is None:
        return "-"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
