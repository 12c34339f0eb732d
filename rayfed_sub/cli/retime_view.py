"""A run told again for other devices, in the terminal: time, waste and energy, by class, and the cost of a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from rayfed_sub.cli.run_view import clock, print_table, size
from rayfed_sub.clock.accounts import cost_to, costs
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.text import LOWER, SCORES
from rayfed_sub.reports.run_reader import Run


def show(run: Run, found: Mapping[str, Any], target: tuple[str, float] | None, console: Console | None = None) -> None:
    """Prints the account of `simulated_time.told`, and the cost of a target (score, value) where one is given."""
    rows = [("all", "", clock(found["seconds"]), *_shares(found))]
    for name, of_class in found["classes"].items():
        rows.append((name, f"{of_class['participation']:.0%}", "", *_shares(of_class)))
    columns = ("devices", "of all updates", "simulated time", "counted", "idle", "wasted", "energy")
    print_table(columns, rows, console)
    if target is None:
        return
    metric, value = target
    cost = cost_to(costs(run.timeline), run.overall[metric], value, lower=metric in LOWER)
    reached = "not reached" if cost is None else f"round {cost.rounds}, {clock(cost.seconds)}, {size(cost.bytes)}"
    energy = "" if cost is None or cost.joules is None else f", {cost.joules / 1000:.3g} kJ"
    print_table(("target", "cost"), [(f"{metric}={value:g}", f"{reached}{energy}")], console)


def _shares(found: Mapping[str, Any]) -> tuple[str, str, str, str]:
    joules = "-" if found["joules"] is None else f"{found['joules'] / 1000:.3g} kJ"
    counted, idle = f"{found['counted_share']:.0%}", f"{found['idle_share']:.0%}"
    return counted, idle, f"{size(found['wasted_bytes'])}, {found['wasted_share']:.0%}", joules


def target_of(run: Run, text: str) -> tuple[str, float]:
    """A target given as score=value.  Raises UserError for a score that the run has not, and for no number."""
    metric, _, value = text.partition("=")
    known = [name for name, values in run.overall.items() if name in SCORES and len(values)]
    if not known:
        allowed = f"nothing with {run.folder}, which has no scores"
        raise UserError("--target", text, allowed, "leave it out, or take a run that was evaluated")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if metric not in known or not math.isfinite(number):
        allowed = f"a score of the run and its value: {', '.join(known)}"
        raise UserError("--target", text, allowed, f"e.g. --target {known[0]}=1.0")
    return metric, number
