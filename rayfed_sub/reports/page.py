"""A self-contained HTML document of text, tables and plotly figures, for a browser without a network.

It is readable on a phone, follows the reader's choice of light or dark, and describes its figures in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from rayfed_sub.core.text import number

RUN_COLOURS = 6
"""Number of colours `run-0`, `run-1`, ... of assets/report.css; more runs repeat them with other dashes and marks."""
_LONG = 10
"""Most rows of a table without a filter box."""
_WRAPPED = 60
"""Length from which a table's cell is folded."""
_DASHES = {"solid": "", "dash": "9 5", "dot": "2 4", "dashdot": "9 4 2 4", "longdash": "15 5"}
"""Plotly's dashes, and the same for SVG."""
_MARKS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "square": "M-4 -4H4V4H-4z",
    "diamond": "M0 -5L5 0L0 5L-5 0z",
    "triangle-up": "M0 -5L5 4H-5z",
    "cross": "M-1.5 -5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5z",
    "triangle-down": "M0 5L5 -4H-5z",
    "star": "M0 -6L1.8 -1.9L5.7 -1.9L2.6 0.9L3.5 4.9L0 2.6L-3.5 4.9L-2.6 0.9L-5.7 -1.9L-1.8 -1.9z",
}
"""Plotly's symbols, and the same for SVG."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names with their values, one line each."""

    pairs: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """Text of a table's cell, and the number to sort it by; cells without one come last."""

    text: str
    value: float | None


@dataclass(frozen=True)
class Marked:
    """Text of a table's cell, sorted as text, with marked parts: beginnings and ends in characters, in order."""

    text: str
    marks: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Table:
    """A table, sortable by its column heads; a string is a cell sorted as text.  plain: most rows that are shown at
    once; of more, stored as columns, pages are."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | Marked | str]]
    plain: int = 200


@dataclass(frozen=True)
class Figure:
    """A figure for plotly.js: traces and layout, both of JSON types without NaN.

    label: description of its content, for readers who cannot see it.  caption: explanation.  width: in pixels; a
    narrower screen scrolls.  title: a heading above it, if any.  A property "color", or one that ends so, may name one
    of the page's colours, which follow light and dark: "--text", "--dim", "--accent", "--mark", "--run-0" ...
    `layout.coloraxis` runs from faint to strong; text on its lower half is legible in "--on-faint", on its upper half
    in "--on-strong".  A trace whose "meta" is a number belongs to that place in the page's legend.  Text that may hold
    "<" goes through `plain`.
    """

    label: str
    caption: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    width: int = 0
    title: str = ""


@dataclass(frozen=True)
class Legend:
    """Legend of the page's figures: names with line and mark (see `line_style`); a press on one hides it in all figures
    or shows it again."""

    names: Sequence[str]


@dataclass(frozen=True)
class Details:
    """Parts that a click on a line unfolds."""

    title: str
    parts: Sequence[Text | Facts | Table | Figure]
    opened: bool = False


Part = Text | Facts | Table | Figure | Legend | Details


@dataclass(frozen=True)
class Section:
    """A heading and its parts; figures stand side by side where there is room."""

    title: str
    parts: Sequence[Part]


def page(title: str, sections: Sequence[Section]) -> str:
    """The HTML document, with plotly.js (4.8 MB) if it has a figure."""
    parts = [part for section in sections for part in section.parts]
    inner = [inside for part in parts if isinstance(part, Details) for inside in part.parts]
    figures = any(isinstance(part, Figure) for part in [*parts, *inner])
    links = "".join(f"<li><a href='#s{at}'>{escape(section.title)}</a></li>" for at, section in enumerate(sections))
    return _DOCUMENT.format(
        title=escape(title),
        policy=_POLICY,
        style=_asset("report.css"),
        links=links,
        body="\n".join(_section(at, section) for at, section in enumerate(sections)),
        scripts=f"{f'<script>{_plotly()}</script>' if figures else ''}\n<script>{_asset('report.js')}</script>",
    )


def line_style(at: int) -> dict[str, dict[str, str]]:
    """Style of the legend's `at`-th name, as a trace's `line` and `marker`: by colour, dash and mark, of which
    colours repeat after six, dashes after five and marks after seven.

    >>> line_style(7)
    {'line': {'color': '--run-1', 'dash': 'dot'}, 'marker': {'color': '--run-1', 'symbol': 'circle'}}
    """
    colour = f"--run-{at % RUN_COLOURS}"
    return {
        "line": {"color": colour, "dash": list(_DASHES)[at % len(_DASHES)]},
        "marker": {"color": colour, "symbol": list(_MARKS)[at % len(_MARKS)]},
    }


def plain(text: str) -> str:
    """Text for a figure, where plotly would take <b> and the like for markup.

    >>> plain("a <b> & c")
    'a &lt;b&gt; &amp; c'
    """
    return escape(text, quote=False)


def _section(at: int, section: Section) -> str:
    return f"<section id='s{at}'>\n<h2>{escape(section.title)}</h2>\n{_parts(section.parts)}\n</section>"


def _parts(parts: Sequence[Part]) -> str:
    return f"<div class='parts'>{''.join(map(_part, parts))}</div>"


def _part(part: Part) -> str:
    match part:
        case Text():
            return f"<p>{escape(part.text)}</p>\n"
        case Facts():
            pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in part.pairs.items())
            return f"<dl>{pairs}</dl>\n"
        case Table():
            return _table(part)
        case Figure():
            return _figure(part)
        case Legend():
            return _legend(part)
        case Details():
            opened = " open" if part.opened else ""
            return f"<details{opened}><summary>{escape(part.title)}</summary>{_parts(part.parts)}</details>\n"


def _table(table: Table) -> str:
    heads = "".join(
        f"<th scope='col' aria-sort='none'><button type='button'>{escape(column)}</button></th>"
        for column in table.columns
    )
    large, box, after = len(table.rows) > table.plain, "", ""
    if len(table.rows) > _LONG:
        more = f" (also, as {escape(table.columns[0])} &gt; 5; commas join several)" if large else ""
        box = f"<label>Show only rows with <input type='search'>{more}</label> <output></output>"
    if large:
        buttons = "".join(f"<button type='button'>{name}</button>" for name in ("first", "previous", "next", "last"))
        after = (
            f"<div class='pages' role='group' aria-label='Pages of the table'>{buttons}<output></output></div>"
            f"<script type='application/json'>{_json(_columns(table))}</script>"
        )
    rows = "" if large else "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    # A region that scrolls must be reachable by keyboard, and then has to have a name.
    return (
        f"<div class='table'>{box}<p class='caption'>{escape(table.caption)}</p>"
        f"<div class='scroll' role='region' tabindex='0' aria-label='{escape(table.caption)}'>"
        f"<table aria-label='{escape(table.caption)}'>"
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{after}</div>\n"
    )


def _columns(table: Table) -> list[dict[str, Any]]:
    """The cells by column: texts, and values if there are any, or `true` where every value equals its text."""
    columns = []
    for cells in zip(*table.rows, strict=True):
        column: dict[str, Any] = {"texts": [cell if isinstance(cell, str) else cell.text for cell in cells]}
        if any(isinstance(cell, Marked) for cell in cells):
            column["marks"] = [cell.marks if isinstance(cell, Marked) else [] for cell in cells]
        values = [cell.value if isinstance(cell, Cell) else None for cell in cells]
        if any(isinstance(cell, Cell) for cell in cells):
            column["values"] = values if values != list(map(_number_in, column["texts"])) else True
        columns.append(column)
    return columns


def _number_in(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _cell(cell: Cell | Marked | str) -> str:
    if isinstance(cell, Marked):
        return f"<td{_folded(cell.text)}>{_with_marks(cell)}</td>"
    if isinstance(cell, str):
        return f"<td{_folded(cell)}>{escape(cell)}</td>"
    return f"<td data-value='{'' if cell.value is None else repr(cell.value)}'>{escape(cell.text)}</td>"


def _folded(text: str) -> str:
    return " class=long" if len(text) > _WRAPPED else ""


def _with_marks(cell: Marked) -> str:
    parts, at = [], 0
    for begin, end in cell.marks:
        parts += [escape(cell.text[at:begin]), f"<mark>{escape(cell.text[begin:end])}</mark>"]
        at = end
    return "".join([*parts, escape(cell.text[at:])])


def _figure(figure: Figure) -> str:
    title = f"<h3>{escape(figure.title)}</h3>" if figure.title else ""
    # In its final height, so that the content below does not move when it is drawn.
    size = f"min-height:{figure.layout.get('height', 450)}px" + (f";min-width:{figure.width}px" if figure.width else "")
    return (
        f"<figure aria-label='{escape(figure.label)}'>{title}<div class='scroll'><div class='plot' style='{size}'>"
        f"</div><script type='application/json'>{_json({'data': figure.data, 'layout': figure.layout})}</script></div>"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
    )


def _json(found: object) -> str:
    """JSON for a <script> element: escapes only text that could end it."""
    return json.dumps(found, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _legend(legend: Legend) -> str:
    buttons = "".join(
        f"<button type='button' aria-pressed='true' data-at='{at}'>{_swatch(at)}{escape(name)}</button>"
        for at, name in enumerate(legend.names)
    )
    return f"<div class='legend' role='group' aria-label='Runs in the figures: press to hide or show'>{buttons}</div>\n"


def _swatch(at: int) -> str:
    style = line_style(at)
    colour, dashes = style["line"]["color"], _DASHES[style["line"]["dash"]]
    return (
        f"<svg width='44' height='14' viewBox='-22 -7 44 14' aria-hidden='true'>"
        f"<path d='M-22 0H22' stroke='var({colour})' stroke-width='2' stroke-dasharray='{dashes}'/>"
        f"<path d='{_MARKS[style['marker']['symbol']]}' fill='var({colour})'/></svg>"
    )


def _asset(name: str) -> str:
    return (files("rayfed_sub.reports") / "assets" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<nav aria-label="Sections"><ul>{links}</ul></nav>
{body}
</main>
{scripts}
</body>
</html>
"""

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'"
)
"""Policy with which the browser blocks all loading and sending.  Parallel coordinates need WebGL code that plotly.js
evaluates."""


def cell(value: float | None) -> Cell:
    """Cell of a number."""
    return Cell("-", None) if value is None or not math.isfinite(value) else Cell(number(value), float(value))
