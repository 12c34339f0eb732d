"""A sweep as one HTML file: the best trial, heat maps, parallel coordinates, quality against traffic, all trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from rayfed_sub.engine import files
from rayfed_sub.page import Cell, Facts, Figure, Section, Table, Text, page, plain
from rayfed_sub.sweeps.labels import headings, worded

_CATEGORIES = 12
"""A key with more values than this has no heat map: its cells would be too small, and most of them empty."""
_WORD = 24
"""Characters of a value on an axis."""


def write_report(
    frame: pd.DataFrame,
    keys: Sequence[str],
    metric: str,
    mode: str,
    title: str,
    path: Path,
    settings: Mapping[str, Any],
) -> None:
    """Writes the page about `frame`, a sweep's trials.parquet, to `path`, some 5 MB, nearly all of it plotly.js.

    keys: the columns of the space.  mode: "min" or "max".  settings: what the sweep was told, shown as it is; its
    `space`, if it has one, maps each key to where its values come from, e.g. {"loguniform": [low, high]}.
    """
    files.write(path, page(title, sections(frame, keys, metric, mode, settings)).encode())


def sections(
    frame: pd.DataFrame, keys: Sequence[str], metric: str, mode: str, settings: Mapping[str, Any]
) -> list[Section]:
    """What the report says, as `write_report`."""
    space: Mapping[str, Any] = settings.get("space", {})
    ranked = best_first(frame, metric, mode)
    swept = _Swept(
        ranked=[
            _trial(row, values, metric, value)
            for row, values, value in zip(
                ranked.to_dict("records"), _places(ranked, keys), _comparable(ranked, metric), strict=True
            )
        ],
        heads=headings(keys),
        metric=metric,
        mode=mode,
        kinds={key: kind for key in keys for kind in space.get(key, {})},
    )
    found = [Section("Result", _result(swept)), Section("What was swept", _space(swept, space, settings))]
    if swept.judged:
        few = [key for key in keys if 2 <= len(swept.values(key)) <= _CATEGORIES]
        pairs = list(combinations(few, 2))
        if pairs:
            said = f"Each cell: the {metric} of its best trial over all other keys; stronger is better."
            found.append(Section("Pairs of keys", [Text(said), *(_heat_map(swept, *pair) for pair in pairs)]))
        alone = [key for key in keys if len(swept.values(key)) > 1 and (key not in few or not pairs)]
        if alone:
            found.append(Section("One key at a time", [_points(swept, key) for key in alone]))
        if len(keys) > 1 and len(swept.judged) > 1:
            found.append(Section("All keys at once", [_parallel(swept)]))
        sent = [(trial, trial.sent) for trial in swept.judged if trial.sent is not None]
        if any(count for _, count in sent):
            found.append(Section("Quality against traffic", [_traffic(swept, sent)]))
    failed = [trial for trial in swept.ranked if trial.status == "failed"]
    if failed:
        found.append(Section("Failures", [_failures(swept, failed)]))
    return [*found, Section("Trials", [_table(swept, ranked)])]


def best(frame: pd.DataFrame, metric: str, mode: str) -> int | None:
    """The number of the best trial, None where no trial may be compared."""
    if _comparable(frame, metric).isna().all():
        return None
    return int(best_first(frame, metric, mode)["trial"].iloc[0])


def best_first(frame: pd.DataFrame, metric: str, mode: str) -> pd.DataFrame:
    """The trials by merit: finished ones by the metric, then those that the scheduler stopped, then the rest.

    A stopped trial comes after every finished one whatever its metric, which was taken earlier in its run.  The rest
    are trials that failed or whose metric is missing or not finite.  Ties go to the lower number.
    """
    value = _comparable(frame, metric)
    rank = (frame["status"] == "stopped").astype("int64").where(value.notna(), 2)
    merit = pd.DataFrame({"rank": rank, "value": {"min": 1, "max": -1}[mode] * value, "trial": frame["trial"]})
    return frame.loc[merit.sort_values(["rank", "value", "trial"]).index]


def _comparable(frame: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Each trial's metric as float64, NaN where it cannot be compared."""
    if metric not in frame:
        return pd.Series(math.nan, index=frame.index)
    value = pd.to_numeric(frame[metric], errors="coerce").astype("float64")
    return value.where(frame["status"].isin(["finished", "stopped"]) & (value.abs() < math.inf))


@dataclass(frozen=True)
class _Trial:
    """A row of the table as the figures need it; metric: NaN where it cannot be compared; sent: bytes up and down, of a
    trial that was stopped unknown."""

    number: int
    values: Mapping[str, Any]
    status: str
    rounds: int
    metric: float
    before: float
    sent: int | None
    failure: str
    folder: str


@dataclass(frozen=True)
class _Swept:
    """The trials, best first, and what they were about; kinds: how each key's values were drawn, where it is known."""

    ranked: Sequence[_Trial]
    heads: Mapping[str, str]
    metric: str
    mode: str
    kinds: Mapping[str, str]

    @property
    def judged(self) -> list[_Trial]:
        """The trials that can be compared, best first."""
        return [trial for trial in self.ranked if not math.isnan(trial.metric)]

    def values(self, key: str) -> list[Any]:
        """The key's values over all trials, in order."""
        return sorted({trial.values[key] for trial in self.ranked})

    @property
    def shades(self) -> tuple[float, float]:
        """The metrics that are drawn faintest and strongest."""
        return _shades([trial.metric for trial in self.judged], self.mode)

    def drawn(self, trial: _Trial) -> float:
        """The trial's metric, or the edge of the figures where it is beyond."""
        faint, _ = self.shades
        return {"min": min, "max": max}[self.mode](trial.metric, faint)

    def said(self, trial: _Trial, without: Iterable[str] = ()) -> str:
        """Where in the space the trial is: "rank=8 lr=1e-3"."""
        return " ".join(f"{head}={worded(trial.values[key])}" for key, head in self.heads.items() if key not in without)

    def hover(self, trial: _Trial) -> str:
        """What a figure says of a trial under the pointer."""
        stopped = f"stopped after {_count('round', trial.rounds)}<br>" if trial.status == "stopped" else ""
        said = "<br>".join(f"{plain(f'{head} {_short(trial.values[key])}')}" for key, head in self.heads.items())
        return f"trial {trial.number}<br>{plain(self.metric)} {_score(trial.metric)}<br>{stopped}{said}"


def _places(frame: pd.DataFrame, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Each trial's values: a column's are all numbers, or all words where any is none (true, null, a word)."""
    columns = []
    for key in keys:
        cells = [None if pd.isna(cell) else cell for cell in frame[key].tolist()]
        numbers = all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)
        columns.append(cells if numbers else [worded(cell) for cell in cells])
    return [dict(zip(keys, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _trial(row: Mapping[Any, Any], values: Mapping[str, Any], metric: str, value: float) -> _Trial:
    known = {name: cell for name, cell in row.items() if not pd.isna(cell)}
    return _Trial(
        number=int(row["trial"]),
        values=values,
        status=str(row["status"]),
        rounds=int(known.get("rounds", 0)),
        metric=value,
        before=float(known.get(f"{metric}_before", math.nan)),
        sent=int(known["uplink_bytes"] + known["downlink_bytes"]) if "uplink_bytes" in known else None,
        failure=str(known.get("failure", "")),
        folder=str(known.get("folder", "")),
    )


def _result(swept: _Swept) -> list[Text | Facts]:
    """The best trial and how far ahead it is."""
    counts = pd.Series([trial.status for trial in swept.ranked], dtype="object").value_counts()
    ended = ", ".join(f"{counts[status]} {status}" for status in ("finished", "stopped", "failed") if status in counts)
    summary = f"{_count('trial', len(swept.ranked))}: {ended}."
    if not swept.judged:
        return [Text(f"{summary} None has a {swept.metric}, so there is no best one.")]
    first, *others = swept.judged
    facts = {"best trial": f"{first.number}", **{key: worded(value) for key, value in first.values.items()}}
    facts[swept.metric] = _score(first.metric)
    if not math.isnan(first.before):
        facts["before training"] = _score(first.before)
    if others:
        second, middle = others[0], median(trial.metric for trial in swept.judged)
        facts["next"] = f"trial {second.number}, {swept.said(second)}: {_score(second.metric)}"
        facts["ahead of the next by"] = _lead(first.metric, second.metric)
        facts["ahead of the median by"] = f"{_lead(first.metric, middle)}; the median is {_score(middle)}"
    if first.sent is not None:
        facts["sent up and down"] = _megabytes(first.sent)
    facts["run folder"] = first.folder
    better = {"min": "lower", "max": "higher"}[swept.mode]
    return [Text(f"{summary} {swept.metric}: {better} is better."), Facts(facts)]


def _lead(value: float, other: float) -> str:
    lead = abs(other - value)
    return f"{_score(lead)} ({lead / abs(other):.2%})" if other else _score(lead)


def _space(swept: _Swept, space: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Table | Facts]:
    """The keys and their values, and the sweep's other settings."""
    rows: list[list[Cell | str]] = []
    for key, head in swept.heads.items():
        values = swept.values(key)
        told = "; ".join(f"{kind} {_listed(given)}" for kind, given in space.get(key, {}).items())
        few = len(values) <= _CATEGORIES
        drawn = ", ".join(map(worded, values)) if few else f"{worded(values[0])} to {worded(values[-1])}"
        rows.append([key, head, told, Cell(f"{len(values)}", len(values)), drawn])
    others = {name: _listed(value) for name, value in settings.items() if name != "space"}
    caption = "Keys of the space, what they are called below, and the values that trials had."
    return [Table(caption, ["key", "called", "drawn from", "different", "values of the trials"], rows), Facts(others)]


def _listed(value: object) -> str:
    return ", ".join(map(worded, value)) if isinstance(value, list | tuple) else worded(value)


def _heat_map(swept: _Swept, across: str, up: str) -> Figure:
    """The best trial of every pair of values."""
    xs, ys = swept.values(across), swept.values(up)
    cells: dict[tuple[int, int], _Trial] = {}
    for trial in swept.judged:
        cells.setdefault((ys.index(trial.values[up]), xs.index(trial.values[across])), trial)
    places = [(row, column) for row in range(len(ys)) for column in range(len(xs))]
    empty = [place for place in places if place not in cells]
    faint, strong = _shades([trial.metric for trial in cells.values()], swept.mode)
    bold = {place for place, trial in cells.items() if abs(trial.metric - strong) < abs(strong - faint) / 2}
    top = next(trial for trial in swept.judged if trial in cells.values())
    x, y = swept.heads[across], swept.heads[up]
    said = f"{_score(top.metric)} at {x}={worded(top.values[across])} {y}={worded(top.values[up])}"
    none = f" {len(empty)} of {len(places)} cells are empty." if empty else ""
    return Figure(
        label=f"Heat map of {swept.metric} over {x} and {y}. The best cell: {said}.{none}",
        caption=f"{y} over {x}: best {said}, trial {top.number}.",
        data=[
            {
                "type": "heatmap",
                "z": _grid({place: trial.metric for place, trial in cells.items()}, places, len(xs)),
                "hovertext": _grid({place: swept.hover(trial) for place, trial in cells.items()}, places, len(xs)),
                "hoverinfo": "text",
                "hoverongaps": False,
                "xgap": 2,
                "ygap": 2,
                "coloraxis": "coloraxis",
            },
            _words({place: _score(cells[place].metric) for place in places if place in bold}, "--on-strong"),
            _words({place: _score(cells[place].metric) for place in cells if place not in bold}, "--on-faint"),
            _words(dict.fromkeys(empty, "-"), "--dim"),
        ],
        layout={
            "height": 130 + max(44 * len(ys), 110),
            "showlegend": False,
            "xaxis": {**_categories(x, xs), "showgrid": False, "fixedrange": True},
            "yaxis": {**_categories(y, ys), "showgrid": False, "fixedrange": True},
            "coloraxis": {**_coloraxis(faint, strong), "showscale": False},
        },
        width=110 + 56 * len(xs),
    )


def _grid(cells: Mapping[tuple[int, int], Any], places: Sequence[tuple[int, int]], width: int) -> list[list[Any]]:
    """The cells in rows of `width`, None where there is none."""
    row = [cells.get(place) for place in places]
    return [row[start : start + width] for start in range(0, len(row), width)]


def _words(cells: Mapping[tuple[int, int], str], color: str) -> dict[str, Any]:
    """Text in cells of a heat map."""
    return {
        "type": "scatter",
        "mode": "text",
        "x": [column for _, column in cells],
        "y": [row for row, _ in cells],
        "text": list(cells.values()),
        "textfont": {"color": color},
        "hoverinfo": "skip",
    }


def _points(swept: _Swept, key: str) -> Figure:
    """Every trial over one key, and the best of each value."""
    values, head = swept.values(key), swept.heads[key]
    words = any(isinstance(value, str) for value in values)
    place = {value: at if words else value for at, value in enumerate(values)}
    tops: dict[Any, _Trial] = {}
    for trial in swept.judged:
        tops.setdefault(trial.values[key], trial)
    reached = [value for value in values if value in tops]
    said = [f"{worded(value)}: {_score(tops[value].metric)}" for value in reached[:_CATEGORIES]]
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [place[value] for value in reached],
        "y": [swept.drawn(tops[value]) for value in reached],
        "line": {"color": "--mark"},
        "hoverinfo": "skip",
    }
    few = len(reached) == len(said)
    return Figure(
        label=f"{swept.metric} of every trial over {head}. The best of each value: {', '.join(said)}"
        f"{'.' if few else ', and so on.'}",
        caption=f"{swept.metric} of every trial{'; the line joins the best of each value' if few else ''}."
        f"{_legend(swept)}",
        data=[
            *([line] if few else []),
            _marks(swept, swept.judged, [place[trial.values[key]] for trial in swept.judged]),
        ],
        layout={
            "height": 360,
            "showlegend": False,
            "xaxis": _categories(head, values) if words else _numbers(head, values, _is_log(swept, key)),
            "yaxis": {"title": {"text": plain(swept.metric)}},
        },
    )


def _traffic(swept: _Swept, sent: Sequence[tuple[_Trial, int]]) -> Figure:
    """The metric over the bytes that were sent, for trials with their bytes, and those that none beats in both."""
    front: list[tuple[_Trial, int]] = []
    sign = {"min": 1, "max": -1}[swept.mode]
    for trial, count in sorted(sent, key=lambda pair: (pair[1], sign * pair[0].metric)):
        if not front or sign * trial.metric < sign * front[-1][0].metric:
            front.append((trial, count))
    counts = [count for _, count in sent]
    said = "; ".join(f"trial {trial.number}, {_megabytes(count)}: {_score(trial.metric)}" for trial, count in front)
    return Figure(
        label=f"{swept.metric} of every trial over the bytes sent. No trial does better with fewer bytes than {said}.",
        caption="What all clients sent and were sent over the whole run. The line joins the trials that no other "
        f"beats with as few bytes; their numbers stand beside them.{_legend(swept)}",
        data=[
            {
                "type": "scatter",
                "mode": "lines+text",
                "x": [count / 1e6 for _, count in front],
                "y": [swept.drawn(trial) for trial, _ in front],
                "text": [f"{trial.number}" for trial, _ in front],
                "textposition": "bottom left" if swept.mode == "min" else "top left",
                "line": {"color": "--mark", "shape": "hv"},
                "hoverinfo": "skip",
            },
            _marks(swept, [trial for trial, _ in sent], [count / 1e6 for count in counts]),
        ],
        layout={
            "height": 400,
            "showlegend": False,
            "xaxis": {
                "title": {"text": "sent up and down (MB)"},
                "type": "log" if 0 < 10 * min(counts) <= max(counts) else "linear",
                "tickformat": ",~r",
                "nticks": 6,
            },
            "yaxis": {"title": {"text": plain(swept.metric)}},
        },
    )


def _marks(swept: _Swept, trials: Sequence[_Trial], x: Sequence[Any]) -> dict[str, Any]:
    """A mark per trial at `x`."""
    edge = {"min": "triangle-up", "max": "triangle-down"}[swept.mode]
    shapes = [edge if swept.drawn(trial) != trial.metric else "circle" for trial in trials]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": [swept.drawn(trial) for trial in trials],
        "marker": {
            "color": "--accent",
            "size": 9,
            "symbol": [
                f"{shape}-open" if trial.status == "stopped" else shape
                for shape, trial in zip(shapes, trials, strict=True)
            ],
        },
        "hovertext": [swept.hover(trial) for trial in trials],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _legend(swept: _Swept) -> str:
    """What of the marks is out of the ordinary, in words."""
    beyond = sum(swept.drawn(trial) != trial.metric for trial in swept.judged)
    said = f" Triangles: {_count('trial', beyond)} beyond {_score(swept.shades[0])}." if beyond else ""
    return said + (" Hollow: stopped by the scheduler." if any(t.status == "stopped" for t in swept.judged) else "")


def _parallel(swept: _Swept) -> Figure:
    """A line per trial through all keys to the metric."""
    trials = swept.judged[::-1]  # plotly draws the last on top
    drawn = [swept.drawn(trial) for trial in trials]
    keys = [key for key in swept.heads if len(swept.values(key)) > 1]
    faint, strong = swept.shades
    top = swept.judged[0]
    beyond = sum(value != trial.metric for value, trial in zip(drawn, trials, strict=True))
    cut = f" Trials beyond {_score(faint)} ({beyond}) are drawn at its end." if beyond else ""
    return Figure(
        label=f"Parallel coordinates: a line per trial through {', '.join(swept.heads.values())} to {swept.metric}. "
        f"The best: {swept.said(top)}, {_score(top.metric)}. The table of trials holds the same numbers.",
        caption="A line per trial; the best are strong, and on top of the last axis. Drag along an axis to keep only "
        f"the lines that pass there, click it to have all again; drag an axis by its name to move it.{cut}",
        data=[
            {
                "type": "parcoords",
                "dimensions": [
                    *(_dimension(swept, key, trials) for key in keys),
                    {"label": plain(swept.metric), "values": drawn, "range": [faint, strong], "tickformat": ".4~g"},
                ],
                "line": {"color": drawn, "coloraxis": "coloraxis"},
            }
        ],
        layout={
            "height": 440,
            "margin": {"l": 80, "r": 80, "t": 80, "b": 30},
            "coloraxis": {**_coloraxis(faint, strong), "showscale": False},
        },
        width=200 + 110 * len(keys),
    )


def _dimension(swept: _Swept, key: str, trials: Sequence[_Trial]) -> dict[str, Any]:
    """One axis: categories by their place, numbers as they are or by their logarithm, with ticks that say the value."""
    values = swept.values(key)
    at: dict[Any, float]
    if any(isinstance(value, str) for value in values):
        at, ticks = {value: place for place, value in enumerate(values)}, values
    elif _is_log(swept, key):
        at = {value: math.log10(value) for value in values}
        ticks = values if len(values) <= _CATEGORIES else _decades(values[0], values[-1])
    else:
        at, ticks = {value: value for value in values}, values if len(values) <= _CATEGORIES else []
    found = {"label": plain(swept.heads[key]), "values": [at[trial.values[key]] for trial in trials]}
    found["range"] = [min(at.values()), max(at.values())]
    if ticks:
        found["tickvals"] = [at[tick] if tick in at else math.log10(tick) for tick in ticks]
        found["ticktext"] = [_short(tick) for tick in ticks]  # not `plain`: here plotly takes text as it is
    return found


def _shades(values: Sequence[float], mode: str) -> tuple[float, float]:
    """The metrics that get the faintest and the strongest colour.

    Strongest is the best.  Faintest is the worst, or what is four times as far from the best as the median: a trial
    that diverged would leave all others one colour.

    >>> _shades([2.0, 2.1, 2.5, 9.0, 50.0], "min")  # 2.0 + 4 (2.5 - 2.0)
    (4.0, 2.0)
    """
    best, worst = (min(values), max(values)) if mode == "min" else (max(values), min(values))
    if best == worst:
        return best + {"min": 1.0, "max": -1.0}[mode], best
    reach = abs(4 * (median(values) - best)) or abs(worst - best)
    return best + math.copysign(min(reach, abs(worst - best)), worst - best), best


def _coloraxis(faint: float, strong: float) -> dict[str, Any]:
    return {"cmin": min(faint, strong), "cmax": max(faint, strong), "reversescale": strong < faint}


def _is_log(swept: _Swept, key: str) -> bool:
    """Whether a key of numbers is read by its logarithm: drawn so, or over a decade wide and not drawn evenly."""
    low, high = swept.values(key)[0], swept.values(key)[-1]
    kind = swept.kinds.get(key)
    return bool(low > 0 and (kind == "loguniform" or (kind != "uniform" and high >= 10 * low)))


def _decades(low: float, high: float) -> list[float]:
    """The powers of ten within, and the ends where there are fewer than two.

    >>> _decades(2e-4, 0.05)
    [0.001, 0.01]
    """
    within = [float(f"1e{power}") for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return within if len(within) > 1 else [low, high]


def _categories(title: str, values: Sequence[Any]) -> dict[str, Any]:
    """An axis of values by their place, evenly spaced."""
    return {
        "title": {"text": plain(title)},
        "tickvals": list(range(len(values))),
        "ticktext": [plain(_short(value)) for value in values],
        "range": [-0.5, len(values) - 0.5],
        "zeroline": False,
    }


def _numbers(title: str, values: Sequence[Any], log: bool) -> dict[str, Any]:
    """An axis of numbers, with a tick at each value while they are few."""
    axis: dict[str, Any] = {"title": {"text": plain(title)}, "type": "log" if log else "linear"}
    ticks = values if len(values) <= _CATEGORIES else _decades(values[0], values[-1]) if log else []
    return axis | ({"tickvals": ticks, "ticktext": [worded(tick) for tick in ticks]} if ticks else {})


def _failures(swept: _Swept, failed: Sequence[_Trial]) -> Table:
    rows: list[list[Cell | str]] = [
        [Cell(f"{trial.number}", trial.number), swept.said(trial), trial.failure, trial.folder]
        for trial in sorted(failed, key=lambda trial: trial.number)
    ]
    return Table("Trials that failed, and why.", ["trial", "values", "cause", "run folder"], rows)


def _table(swept: _Swept, ranked: pd.DataFrame) -> Table:
    """Every trial and column of the table but sums and folders."""
    first = ["trial", *swept.heads, "status", "rounds", *([swept.metric] if swept.metric in ranked else [])]
    hidden = {"weights_sha256", "folder", "failure"}
    columns = [*first, *(name for name in ranked.columns if name not in {*first, *hidden})]
    heads = {**swept.heads, "uplink_bytes": "up (MB)", "downlink_bytes": "down (MB)"}
    rows = [[_cell(name, row[name]) for name in columns] for row in ranked.to_dict("records")]
    caption = "All trials, best first; their weights' sums and folders are in trials.parquet."
    return Table(caption, [heads.get(name, name) for name in columns], rows)


def _cell(column: str, value: Any) -> Cell | str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return Cell("-", None)
    if column.endswith("_bytes"):
        return Cell(f"{value / 1e6:,.2f}", value)
    # Metrics keep their digits, which tell trials apart; a key's values are few and round.
    metric = isinstance(value, float) and "." not in column
    return Cell(_score(value) if metric else worded(value), value if math.isfinite(value) else None)


def _score(value: float) -> str:
    """A metric to four digits after the point, or where that says nothing to four digits.

    >>> _score(2.73051), _score(0.00002), _score(123456.0)
    ('2.7305', '2e-5', '1.235e5')
    """
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e4 else worded(value)


def _short(value: object) -> str:
    """A value in a figure."""
    text = worded(value)
    return text if len(text) <= _WORD else f"{text[: _WORD - 1]}…"


def _count(noun: str, count: int) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
