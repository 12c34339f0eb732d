"""Versions and machines: what the bits depend on besides the configuration."""

from __future__ import annotations

from rayfed_sub.reports.page import Cell, Facts, Section, Table
from rayfed_sub.reports.run_reader import Runs


def surroundings(runs: Runs) -> Section | None:
    """Of one run as facts, of several side by side."""
    told = {name: {**run.versions, **run.environment} for name, run in runs.items()}
    keys = list(dict.fromkeys(key for tree in told.values() for key in tree))
    if not keys:
        return None
    if len(runs) == 1:
        ((_, tree),) = told.items()
        return Section("Versions and machine", [Facts({key: _said(tree[key]) for key in keys})])
    rows: list[list[Cell | str]] = [[key, *(_said(tree.get(key)) for tree in told.values())] for key in keys]
    return Section("Versions and machines", [Table("What each run was computed with.", ["of what", *runs], rows)])


def _said(value: object) -> str:
    return "-" if value is None else str(value)
