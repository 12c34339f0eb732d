"""Raw rows as CSV, tables as Markdown, and their places in README.md."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "theory"


def read(name: str) -> list[dict[str, Any]]:
    """The rows of NAME.csv, numbers as numbers; none where there is no file."""
    file = RESULTS / f"{name}.csv"
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return [{key: parsed(cell) for key, cell in row.items()} for row in csv.DictReader(lines)]


def parsed(cell: str) -> Any:
    """The value of a cell.

    >>> [parsed(cell) for cell in ("", "3", "0.25", "fedit")]
    [None, 3, 0.25, 'fedit']
    """
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None


def write(name: str, rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    """NAME.csv with these rows, sorted by the columns of `order`."""
    part, file = RESULTS / f"{name}.part", RESULTS / f"{name}.csv"
    with part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: tuple(row[key] for key in order)))
    part.replace(file)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the values of runs that did not diverge.

    >>> mean_and_spread([1.0, 3.0]), mean_and_spread([])
    ('2.0000 ± 1.4142', 'diverged')
    """
    if not values:
        return "diverged"
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def stand(tables: Mapping[str, str]) -> None:
    """Puts every table between its marks in README.md, `<!-- NAME -->` and `<!-- end -->`, and prints it."""
    file = HERE / "README.md"
    text = file.read_text(encoding="utf-8")
    for name, table in tables.items():
        print(f"{name}\n{table}\n")
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        if begin not in text:
            raise LookupError(f"README.md has no place for {name}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"
    file.write_text(text, encoding="utf-8")
