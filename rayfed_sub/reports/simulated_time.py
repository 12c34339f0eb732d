"""Runs with devices in simulated time: scores against hours, bytes to a score, energy, and classes of devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rayfed_sub.clock.accounts import Cost, account, best_within, cost_at, cost_to, costs
from rayfed_sub.clock.fleet import fleet_of
from rayfed_sub.core.text import LOWER, SCORES, number, score
from rayfed_sub.reports.curves import AGAINST_BYTES, Axis, Curve, legend, overall, overlay, problem, shown_scores
from rayfed_sub.reports.page import Cell, Figure, Section, Table, cell
from rayfed_sub.reports.run_reader import Run, Runs

_HOUR, _KILO = 3600.0, 1000.0
_PARTS = (0.5, 0.9, 1.0)
"""Of the gain that every run reaches: targets of the table of costs."""


def simulated_time(runs: Runs) -> Section | None:
    """Section about the runs with devices."""
    timed = {name: run for name, run in runs.items() if len(run.timeline)}
    if not timed:
        return None
    places = {name: at for at, name in enumerate(runs)}
    spent = {name: costs(run.timeline) for name, run in timed.items()}
    metrics = [metric for metric in shown_scores(timed) if metric in AGAINST_BYTES]
    figures = [figure for metric in metrics for figure in _against(timed, places, spent, metric)]
    asked = (timed, spent, metrics)
    tables = [_totals(timed), _classes(timed, metrics), *_under_budgets(*asked), *_to_targets(*asked)]
    return Section("Simulated time", [*(legend(runs) if figures else []), *figures, *tables])


def _against(runs: Runs, places: dict[str, int], spent: dict[str, list[Cost]], metric: str) -> list[Figure]:
    """A score against simulated hours, and against energy where every run knows it."""
    hours, energy = list[Curve](), list[Curve]()
    for name, run in runs.items():
        values = overall(run, metric)
        at = [cost_at(spent[name], rounds) for rounds in values.index]
        x, y = [cost.seconds / _HOUR for cost in at], values.tolist()
        if y:
            hours.append(Curve(places[name], name, x, y, f"{number(y[-1])} after {number(x[-1])} hours"))
        if y and spent[name][-1].joules is not None:
            kilojoules = [(cost.joules or 0.0) / _KILO for cost in at]
            energy.append(Curve(places[name], name, kilojoules, y, f"{number(y[-1])} for {number(kilojoules[-1])} kJ"))
    title = score(metric, problem(runs))
    title = title[0].upper() + title[1:]
    found = [overlay(title, Axis("simulated hours"), hours, "By the virtual clock of the devices.")] if hours else []
    if energy:
        caption = "Energy of training, of the clients whose device's power is known."
        found.append(overlay(title, Axis("kJ"), energy, caption))
    return found


def _totals(runs: Runs) -> Table:
    rows: list[list[Cell | str]] = []
    for name, run in runs.items():
        found = account(run.timeline)
        rows.append([name, run.config.federation.mode, cell(found["seconds"] / _HOUR), *_shares(found)])
    heads = ["run", "mode", "simulated hours", *_SHARES]
    return Table("Simulated time, and what of it and of the bytes was of no use.", heads, rows)


_SHARES = ("rounds that counted (%)", "idle (%)", "wasted (MB)", "wasted bytes (%)", "wasted time (h)", "energy (kJ)")


def _shares(found: dict[str, Any]) -> list[Cell]:
    joules = found["joules"]
    return [
        cell(100 * found["counted_share"]),
        cell(100 * found["idle_share"]),
        cell(found["wasted_bytes"] / 1e6),
        cell(100 * found["wasted_share"]),
        cell(found["wasted_seconds"] / _HOUR),
        cell(None if joules is None else joules / _KILO),
    ]


def _classes(runs: Runs, metrics: Sequence[str]) -> Table:
    """Participation, waiting, waste and the clients' own scores by class."""
    shown = [metric for metric in metrics if any(metric in run.of_clients for run in runs.values())]
    traced = any(run.config.devices.trace is not None for run in runs.values())
    rows: list[list[Cell | str]] = []
    for name, run in runs.items():
        device_of = _device_of(run)
        for kind, found in account(run.timeline, run.config.devices.classes)["classes"].items():
            own = run.of_clients[run.of_clients.index.map(device_of) == kind]
            means = [float(own[metric].mean()) if metric in own and len(own) else None for metric in shown]
            stale = found["staleness"] if found["counted"] else None
            taken = (found["clients"], found["rounds"], 100 * found["participation"], stale)
            rows.append([name, kind, *map(cell, taken), *_shares(found), *map(cell, means)])
    heads = ["run", "devices", "clients", "rounds begun", "of all updates (%)", "staleness", *_SHARES]
    caption = "By class of devices. clients: that took part; staleness: mean over the updates that counted. "
    whose = "class's clients, of a trace's over those that took part" if traced else "class's clients"
    caption += f"Scores: means over the {whose}."
    return Table(caption, [*heads, *(score(metric).partition(" (")[0] for metric in shown)], rows)


def _device_of(run: Run) -> Callable[[int], str | None]:
    """The class of each client; of a trace, whose file may be gone, of those that began a round."""
    fleet = fleet_of(run.config) if run.config.devices.trace is None else None
    if fleet is None:
        known = {int(client): str(device) for client, device in run.timeline[["client", "device"]].to_numpy()}
        return known.get
    return fleet.name_of


_BUDGETS: tuple[tuple[str, float, Callable[[Cost], float]], ...] = (
    ("simulated hours", _HOUR, lambda cost: cost.seconds),
    ("MB", 1e6, lambda cost: float(cost.bytes)),
)


def _under_budgets(runs: Runs, spent: dict[str, list[Cost]], metrics: Sequence[str]) -> list[Table]:
    """Scores within half and all of the hours and bytes of the thriftiest run, by the first of the scores."""
    metric = next((metric for metric in metrics if metric in SCORES), None)
    values = {} if metric is None else {name: found for name, run in runs.items() if len(found := overall(run, metric))}
    if metric is None or len(values) < 2:
        return []
    heads, columns = list[str](), list[list[Cell]]()
    for unit, size, of in _BUDGETS:
        least = min(of(cost_at(spent[name], int(found.index[-1]))) for name, found in values.items())
        for most in (0.5 * least, least):
            heads.append(f"{number(most / size)} {unit}")
            within = (best_within(spent[k], found, most, of, lower=metric in LOWER) for k, found in values.items())
            columns.append([cell(best) for best in within])
    rows = [[name, *cells] for name, *cells in zip(values, *columns, strict=True)]
    caption = f"Quality under a budget: the best {score(metric).partition(' (')[0]} at an evaluation within half and "
    return [Table(f"{caption}all of the hours and bytes that the thriftiest run takes.", ["run", *heads], rows)]


def _to_targets(runs: Runs, spent: dict[str, list[Cost]], metrics: Sequence[str]) -> list[Table]:
    """Cost to targets that every run reaches, by the first of the scores."""
    metric = next((metric for metric in metrics if metric in SCORES), None)
    if metric is None:
        return []
    lower, values = metric in LOWER, {name: overall(run, metric) for name, run in runs.items()}
    values = {name: found for name, found in values.items() if len(found) > 1}
    if not values:
        return []
    worst, best = (max, min) if lower else (min, max)
    begin, end = worst(found.iloc[0] for found in values.values()), worst(best(found) for found in values.values())
    rows: list[list[Cell | str]] = []
    for part in _PARTS:
        target = end if part == 1.0 else begin + part * (end - begin)
        for name, found in values.items():
            cost = cost_to(spent[name], found, target, lower=lower)
            rows.append([cell(target), name, *cost_cells(cost)])
    caption = (
        f"Cost up to the first evaluation that reaches a {score(metric).partition(' (')[0]}: of the gain that every "
    )
    caption += "run reaches, half, nine tenths and all."
    return [Table(caption, ["target", "run", "round", "simulated hours", "MB sent", "energy (kJ)"], rows)]


def cost_cells(cost: Cost | None) -> list[Cell]:
    """Round, hours, MB and kJ of a cost; empty ones of a target that is not reached."""
    if cost is None:
        return [cell(None)] * 4
    joules = None if cost.joules is None else cost.joules / _KILO
    return [cell(cost.rounds), cell(cost.seconds / _HOUR), cell(cost.bytes / 1e6), cell(joules)]


def told(run: Run) -> dict[str, Any]:
    """What a run takes, as plain values: its account, and the scores with their costs by evaluation."""
    spent = costs(run.timeline)
    evaluations = []
    for rounds in run.overall["held_out_loss"].index:
        cost = cost_at(spent, int(rounds))
        scores = {metric: float(values[rounds]) for metric, values in run.overall.items() if rounds in values.index}
        evaluations.append(
            {"rounds": int(rounds), "seconds": cost.seconds, "bytes": cost.bytes, "joules": cost.joules, **scores}
        )
    return {**account(run.timeline, run.config.devices.classes), "evaluations": evaluations}
