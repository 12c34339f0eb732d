"""Growth of rayfed_sub's cost: seconds of a steady round and peak memory, one number varied at a time.

    python -m experiments.benchmarks.growth [clients|rank|steps|layers|workers ...] [--out CSV] [--show]

Measures the named variables, all of them where none is named, writes their rows into the CSV and leaves the others',
then draws all rows beside it and prints two tables.  --show: measures nothing.  Every point is a process of
its own around the case `growth`, all of whose clients take part in every round, in packs of 50 whatever is varied: up
to 50 clients, one of the two workers has all the work.

A steady round is the median of all but the first and the last.  An exponent is the slope of a straight line through
the logarithms of the values as they are: constant parts, such as the memory of Ray's own processes, are not taken off.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from experiments.benchmarks.cases import GROWTH, OURS
from experiments.benchmarks.harness import RESULTS, WORKERS, contestants, machine, measured
from experiments.benchmarks.work import write_run
from rayfed_sub.cli.run_view import print_table, size

VALUES = {
    "clients": (10, 30, 100, 300, 1_000, 3_000, 10_000),
    "rank": (1, 2, 4, 8, 16, 32, 64),
    "steps": (1, 2, 4, 8, 16, 32),
    "layers": (2, 4, 8, 16),
    "workers": (1, 2),
}
NAMES = {
    "clients": "clients a round",
    "rank": "rank",
    "steps": "local steps, T_agg",
    "layers": "layers of the model",
    "workers": "workers",
}
SIZED = (3, 80, 48_000)
"""Rounds: at least, at most, and times clients, layers and (steps + 2), by which a round grows: together longer than
the five seconds from one look at the memory to the next."""

mpl.use("Agg")


def point(variable: str, value: int) -> tuple[int, int, int, int, int]:
    """Clients, rank, steps, layers, workers: the base, with one of them replaced."""
    assert GROWTH.model is not None
    base = (GROWTH.clients, GROWTH.rank, GROWTH.steps, GROWTH.model["num_hidden_layers"], WORKERS)
    clients, rank, steps, layers, workers = (
        value if name == variable else number for name, number in zip(VALUES, base, strict=True)
    )
    return clients, rank, steps, layers, workers


@cache
def row_of(clients: int, rank: int, steps: int, layers: int, workers: int) -> dict[str, Any]:
    """One run's row, less the name of what it varies.  start: seconds until the first round; first, steady: of a round;
    peak_pss: bytes, the largest of the sums that were seen."""
    least, most, work = SIZED
    rounds = min(max(work // (clients * layers * (steps + 2)), least), most)
    model = {**(GROWTH.model or {}), "num_hidden_layers": layers}
    case = replace(GROWTH, clients=clients, rank=rank, steps=steps, rounds=rounds, model=model)
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        folder = Path(name) / "work"
        write_run(case, folder, workers)
        found = measured(contestants()[OURS], folder, Path(name) / "out", case.look_every, workers)
    return {
        "clients": clients,
        "rank": rank,
        "steps": steps,
        "layers": layers,
        "workers": workers,
        "pack_size": case.pack_size,
        "rounds": rounds,
        "start": round(found.start, 2),
        "first": round(found.rounds[0], 4),
        "steady": round(float(np.median(found.steady)), 4),
        "peak_pss": found.peak_pss,
        **machine(),
    }


def measure(variable: str, values: Sequence[int], file: Path) -> None:
    """Puts the rows of these values into the file, each as soon as it is known, in place of older ones."""
    for value in values:
        row = {"variable": variable, "value": value, **row_of(*point(variable, value))}
        print(f"{variable} {value:,}: {row['steady']:.3f} s a round, {size(row['peak_pss'])}", flush=True)
        before = [read(file)] if file.exists() else []
        rows = pd.concat([*before, pd.DataFrame([row])]).drop_duplicates(["variable", "value"], keep="last")
        order = rows["variable"].map(list(VALUES).index)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.assign(order=order).sort_values(["order", "value"]).drop(columns="order").to_csv(file, index=False)


def read(file: Path) -> pd.DataFrame:
    """The rows of the file; `gpu` may be "none"."""
    return pd.read_csv(file, keep_default_na=False)


def slope(x_P: ArrayLike, y_P: ArrayLike) -> float:
    """Slope of log y over log x, by least squares.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 9)
    2.0
    """
    return float(np.polyfit(np.log(x_P), np.log(y_P), 1)[0])


def upper(rows: pd.DataFrame) -> pd.DataFrame:
    """The points from the middle one on, to which the drawn lines are fitted."""
    return rows.iloc[(len(rows) - 1) // 2 :]


def varied(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every variable with two points or more, and these in order."""
    for variable in VALUES:
        own = rows[rows["variable"] == variable]
        if len(own) > 1:
            yield variable, own


def show(rows: pd.DataFrame) -> None:
    """The points, and their exponents."""
    columns = ("varied", "value", "rounds", "start-up, s", "first round", "s a round", "peak memory")
    cells = rows[["variable", "value", "rounds", "start", "first", "steady", "peak_pss"]]
    points = [
        (variable, f"{value:,}", rounds, f"{start:.0f}", f"{first:.2f}", f"{steady:.3f}", f"{peak / 1e6:,.0f} MB")
        for variable, value, rounds, start, first, steady, peak in cells.itertuples(index=False, name=None)
    ]
    print_table(columns, points)
    table = []
    for variable, own in varied(rows):
        for name, key in (("time", "steady"), ("memory", "peak_pss")):
            slopes = [slope(part["value"], part[key]) for part in (own, upper(own), own.tail(2))]
            span = f"{own['value'].iloc[0]:,} to {own['value'].iloc[-1]:,}"
            table.append((name, NAMES[variable], span, *(f"{p:+.2f}" for p in slopes), more(own, key)))
    print_table(("exponent of", "over", "from", "all points", "upper half", "last two", "one more, last two"), table)


def more(rows: pd.DataFrame, key: str) -> str:
    """Cost of one more, between the two largest values."""
    (x, y), (x_last, y_last) = rows[["value", key]].tail(2).to_numpy(dtype=float)
    added = (y_last - y) / (x_last - x)
    if key == "steady":
        return f"{added * 1e3:+.2f} ms"
    return f"{'-' if added < 0 else '+'}{size(abs(added))}"


def draw(rows: pd.DataFrame, file: Path) -> None:
    """A column a variable, time above memory, all of a row over one scale; dashed: the fit to the upper half."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    found = list(varied(rows))
    style: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(
            2, len(found), figsize=(9, 4.6), layout="constrained", sharey="row", sharex="col", squeeze=False
        )
        for (variable, own), column in zip(found, axes.T, strict=True):
            for axis, key, unit, colour in zip(column, ("steady", "peak_pss"), (1, 1e9), ("C0", "C1"), strict=True):
                axis.loglog(own["value"], own[key] / unit, "o-", color=colour, markersize=3.5, linewidth=1.2)
                half = np.log(upper(own)[["value", key]].to_numpy(float))
                x, y = half.mean(axis=0)
                power = slope(*np.exp(half.T))
                line = np.exp(y + power * (half[:, 0] - x)) / unit
                axis.loglog(np.exp(half[:, 0]), line, "--", color="black", linewidth=0.9)
                axis.set_title(f"slope ${power:+.2f}$", fontsize=8)
                axis.grid(alpha=0.25, linewidth=0.6)
            ticks = own["value"] if len(own) < 7 else own["value"].iloc[::2]
            column[1].set_xticks(list(ticks), [_short(x) for x in ticks])
            column[1].xaxis.set_minor_locator(NullLocator())
            column[1].set_xlabel(NAMES[variable].replace("T_agg", "$T_{agg}$"))
        for axis, marked in zip(axes[:, 0], ((1.0,), (1.0, 2.0, 4.0)), strict=True):
            axis.yaxis.set_major_locator(LogLocator(subs=marked))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes[1, 0].get_ylim()
        axes[1, 0].set_ylim(min(low, 1.0), max(high, 4.0))  # or less than a percent would fill the height
        axes[0, 0].set_ylabel("seconds, a steady round")
        axes[1, 0].set_ylabel("peak memory (PSS), GB")
        figure.savefig(file, dpi=200)
        pyplot.close(figure)


def _short(count: float) -> str:
    return f"{count / 1000:g}k" if count >= 1000 else f"{count:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variables", nargs="*", metavar="VARIABLE", help=", ".join(VALUES))
    file = RESULTS / f"growth-{date.today()}.csv"
    parser.add_argument("--out", type=Path, metavar="CSV", default=file)
    parser.add_argument("--show", action="store_true", help="measure nothing: picture and tables of what is there")
    asked = parser.parse_args()
    unknown = [name for name in asked.variables if name not in VALUES]
    if unknown:  # argparse's `choices` would refuse to be given none
        parser.error(f"{unknown[0]} is none of {', '.join(VALUES)}")
    if asked.show and not asked.out.exists():
        parser.error(f"nothing to show: there is no {asked.out}; name a table with --out")
    for variable in () if asked.show else asked.variables or VALUES:
        measure(variable, VALUES[variable], asked.out)
    rows = read(asked.out)
    draw(rows, asked.out.with_suffix(".png"))
    show(rows)


if __name__ == "__main__":
    main()
