"""One self-contained HTML document of text, tables and plotly figures, for a browser without a network.

It is readable on a phone, follows the reader's choice of light or dark, and says in words what its figures show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_LONG = 10
"""A table with more rows gets a box that filters them."""
_WRAPPED = 60
"""Characters from which a table's cell is folded."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what they stand for, one line each."""

    pairs: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """What a table shows, and the number that it is sorted by; a cell without one comes last."""

    text: str
    value: float | None


@dataclass(frozen=True)
class Table:
    """Rows under columns, sorted by clicking or pressing a column's head; a string is a cell sorted as text."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]


@dataclass(frozen=True)
class Figure:
    """A figure as plotly.js takes it: traces and layout, both only of what JSON knows, without NaN.

    label: what it shows, in words, for who cannot see it.  caption: how to read it.  width: in pixels; a narrower
    screen scrolls.  A property "color" may name one of the page's own colours, which follow light and dark: "--text",
    "--dim", "--accent", "--mark".  `layout.coloraxis` runs from faint to strong; text on its lower half is legible in
    "--on-faint", on its upper half in "--on-strong".  Text that may hold "<" goes through `plain`.
    """

    label: str
    caption: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    width: int = 0


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; figures stand side by side where there is room."""

    title: str
    parts: Sequence[Text | Facts | Table | Figure]


def page(title: str, sections: Sequence[Section]) -> str:
    """The document; plotly.js, 4.8 MB, is in it once if there is a figure."""
    figures = any(isinstance(part, Figure) for section in sections for part in section.parts)
    return _DOCUMENT.format(
        title=escape(title),
        policy=_POLICY,
        style=_STYLE,
        body="\n".join(map(_section, sections)),
        scripts=f"<script>{_plotly()}</script>\n<script>{_SCRIPT}</script>"
        if figures
        else f"<script>{_SCRIPT}</script>",
    )


def plain(text: str) -> str:
    """Text for a figure, where plotly would take <b> and the like for markup.

    >>> plain("a <b> & c")
    'a &lt;b&gt; &amp; c'
    """
    return escape(text, quote=False)


def _section(section: Section) -> str:
    parts = [_part(part) for part in section.parts]
    return f"<section>\n<h2>{escape(section.title)}</h2>\n<div class='parts'>{''.join(parts)}</div>\n</section>"


def _part(part: Text | Facts | Table | Figure) -> str:
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


def _table(table: Table) -> str:
    heads = "".join(
        f"<th scope='col' aria-sort='none'><button type='button'>{escape(column)}</button></th>"
        for column in table.columns
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    box = (
        "<label>Show only rows with <input type='search'></label> <output></output>" if len(table.rows) > _LONG else ""
    )
    # A region that scrolls must be reachable by keyboard, and then has to have a name.
    return (
        f"<div class='table'>{box if len(table.rows) > _LONG else ''}"
        f"<div class='scroll' role='region' tabindex='0' aria-label='{escape(table.caption)}'>"
        f"<table><caption>{escape(table.caption)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></div>\n"
    )


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f"<td{' class=long' if len(cell) > _WRAPPED else ''}>{escape(cell)}</td>"
    return f"<td data-value='{'' if cell.value is None else repr(cell.value)}'>{escape(cell.text)}</td>"


def _figure(figure: Figure) -> str:
    # Within <script> nothing is escaped but what could end it.
    drawn = json.dumps({"data": figure.data, "layout": figure.layout}, allow_nan=False, separators=(",", ":"))
    drawn = drawn.replace("<", "\\u003c")
    width = f" style='min-width:{figure.width}px'" if figure.width else ""
    return (
        f"<figure aria-label='{escape(figure.label)}'><div class='scroll'><div class='plot'{width}></div>"
        f"<script type='application/json'>{drawn}</script></div>"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
    )


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
"""The browser itself sees to it that the page neither loads nor sends anything.  Parallel coordinates are drawn by
WebGL code that plotly.js evaluates."""

_STYLE = """
:root { --page: #ffffff; --text: #1a1d21; --dim: #555d66; --line: #d5dae0; --accent: #175390; --mark: #b3470b;
  --faint: #d5e3f0; --middle: #3a7ab0; --strong: #08306b; --on-faint: #000000; --on-strong: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --text: #e8eaed; --dim: #a5adb6; --line: #3a4048; --accent: #82b1d4; --mark: #f0a060;
    --faint: #22364d; --middle: #3a7ab0; --strong: #d5e3f0; --on-faint: #ffffff; --on-strong: #000000; } }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
.parts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0.5rem 2rem; }
.parts > :not(figure) { grid-column: 1 / -1; min-width: 0; }
p { margin: 0; max-width: 44rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: 0.25rem 1.25rem; margin: 0; }
dt { color: var(--dim); overflow-wrap: anywhere; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0.5rem 0; min-width: 0; }
figcaption, caption, output { color: var(--dim); font-size: 0.9rem; }
caption { text-align: left; padding: 0.25rem 0; max-width: calc(100vw - 3rem); }
.scroll { overflow-x: auto; }
.table .scroll { max-height: 40rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
td[data-value] { text-align: right; }
td.long { min-width: 22rem; white-space: normal; overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: var(--page); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button::after { content: " \\2195"; color: var(--dim); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--accent); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--accent); }
input { font: inherit; color: inherit; background: transparent; border: 1px solid var(--dim); border-radius: 4px;
  padding: 0.1rem 0.4rem; margin-bottom: 0.25rem; }
.parcoords .axis path { stroke: var(--dim) !important; }
:focus-visible, th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
"""

_SCRIPT = """
"use strict";
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// On a touch screen a finger on a figure has to scroll the page.
const coarse = matchMedia("(pointer: coarse)").matches;

function template() {
  const axis = {gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true,
    title: {standoff: 12}};
  const font = {color: colour("--text"), size: 13, family: "system-ui, sans-serif"};
  const colorscale = [[0, colour("--faint")], [0.5, colour("--middle")], [1, colour("--strong")]];
  return {layout: {
    font, colorway: [colour("--accent"), colour("--mark"), colour("--dim")],
    paper_bgcolor: colour("--page"), plot_bgcolor: colour("--page"), xaxis: axis, yaxis: axis,
    coloraxis: {colorscale, colorbar: {thickness: 12, outlinewidth: 0}},
    hoverlabel: {align: "left", bgcolor: colour("--page"), bordercolor: colour("--dim"), font},
    margin: {l: 60, r: 20, t: 30, b: 50}, dragmode: coarse ? false : "zoom",
  }};
}

function draw() {
  for (const plot of document.querySelectorAll(".plot")) {
    const own = (key, value) => key === "color" && String(value).startsWith("--") ? colour(value) : value;
    const {data, layout} = JSON.parse(plot.nextElementSibling.textContent, own);
    Plotly.react(plot, data, {...layout, template: template()},
      {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
       // Its button would send the figure's data to a server.
       showSendToCloud: false, plotlyServerURL: ""});
    // The figure's label says it; a drawing's loose words do not.
    for (const drawing of plot.querySelectorAll("svg.main-svg")) drawing.setAttribute("aria-hidden", "true");
  }
}

function order(table, head) {
  const at = [...head.parentNode.children].indexOf(head), up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => {
    const cell = row.children[at], number = cell.dataset.value;
    return number === undefined ? cell.textContent : number === "" ? null : Number(number);
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const less = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return up ? less : -less;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b))));
}

for (const part of document.querySelectorAll(".table")) {
  const table = part.querySelector("table"), rows = [...table.tBodies[0].rows];
  for (const head of table.tHead.rows[0].cells)
    head.firstChild.addEventListener("click", () => order(table, head));
  part.querySelector("input")?.addEventListener("input", event => {
    const wanted = event.target.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    part.querySelector("output").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} rows`;
  });
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""
