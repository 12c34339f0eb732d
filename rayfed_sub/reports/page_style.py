"""How a page looks: its colours, in light and in dark, and its style sheet."""

from __future__ import annotations

RUN_COLOURS = 6
"""So many colours tell runs apart, also for who sees red, green or blue less than others, since they differ in
lightness too.  Runs beyond repeat them with other dashes and marks."""

LIGHT = {
    **{"page": "#ffffff", "text": "#1a1d21", "dim": "#555d66", "line": "#d5dae0", "accent": "#175390"},
    **{"mark": "#b3470b", "faint": "#d5e3f0", "middle": "#3a7ab0", "strong": "#08306b"},
    **{"on-faint": "#000000", "on-strong": "#ffffff"},
    **{"run-0": "#175390", "run-1": "#d93608", "run-2": "#018372"},
    **{"run-3": "#8551ea", "run-4": "#9a0d04", "run-5": "#690441"},
}
DARK = {
    **{"page": "#14171a", "text": "#e8eaed", "dim": "#a5adb6", "line": "#3a4048", "accent": "#82b1d4"},
    **{"mark": "#f0a060", "faint": "#22364d", "middle": "#3a7ab0", "strong": "#d5e3f0"},
    **{"on-faint": "#ffffff", "on-strong": "#000000"},
    **{"run-0": "#82b1d4", "run-1": "#e4a320", "run-2": "#8cfdf6"},
    **{"run-3": "#6f71f4", "run-4": "#b1765c", "run-5": "#f4f131"},
}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}: {colour}; " for name, colour in colours.items())


_RULES = """
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; font-weight: 600; margin: 0.5rem 0 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0; padding: 0; list-style: none; }
.parts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0.5rem 2rem; }
.parts > :not(figure) { grid-column: 1 / -1; min-width: 0; }
p { margin: 0; max-width: 44rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: 0.25rem 1.25rem; margin: 0; }
dt { color: var(--dim); overflow-wrap: anywhere; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0.5rem 0; min-width: 0; }
figcaption, .caption, output { color: var(--dim); font-size: 0.9rem; }
.caption { padding: 0.25rem 0; }
details { border-left: 3px solid var(--line); padding-left: 0.75rem; margin: 0.25rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; padding: 0.25rem 0; }
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
input, .pages button, .legend button { font: inherit; color: inherit; background: transparent;
  border: 1px solid var(--dim); border-radius: 4px; padding: 0.1rem 0.4rem; margin-bottom: 0.25rem; }
input { min-width: 0; max-width: 100%; box-sizing: border-box; }
.pages { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.5rem; padding-top: 0.5rem; }
.pages button, .legend button { cursor: pointer; min-height: 2rem; }
.pages button:disabled { opacity: 0.5; cursor: default; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 0.5rem; max-height: 10rem; overflow-y: auto; padding: 3px; }
.legend button { display: flex; align-items: center; gap: 0.4rem; overflow-wrap: anywhere; text-align: left; }
.legend svg { flex: none; }
.legend button[aria-pressed=false] { text-decoration: line-through; border-style: dashed; }
.legend button[aria-pressed=false] svg { visibility: hidden; }
.parcoords .axis path { stroke: var(--dim) !important; }
:focus-visible, th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.printing main { width: 44rem; padding: 0; }
.printing .parts { grid-template-columns: 1fr 1fr; }
@media print {
  nav, .pages button, label, .modebar { display: none !important; }
  .scroll, .table .scroll, .legend { overflow: visible; max-height: none; }
  figure, tr { break-inside: avoid; }
}
"""

STYLE = (
    f":root {{ {_variables(LIGHT)}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)}}} }}{_RULES}"
)
