"""Memory: planned, and measured."""

from __future__ import annotations

from rayfed_sub.core.text import number
from rayfed_sub.reports.curves import legend
from rayfed_sub.reports.lines import FROM_ZERO, ROUNDS, Curve, overlay
from rayfed_sub.reports.page import Cell, Figure, Section, Table, cell
from rayfed_sub.reports.run_reader import Run, Runs


def memory(runs: Runs) -> Section | None:
    """What all processes of a run had, over rounds, beside what was planned."""
    rows: list[list[Cell | str]] = []
    for name, run in runs.items():
        planned, peak = run.summary.get("planned_memory_bytes"), _peak(run)
        if peak:
            share = cell(100 * peak / planned if planned else None)
            rows.append([name, cell(planned / 1e6 if planned else None), cell(peak / 1e6), share])
    if not rows:
        return None
    figures = _over_rounds(runs)
    caption = "All processes of a run together, the highest since it was last begun; planned: by rayfed-sub plan."
    table = Table(caption, ["run", "planned (MB)", "peak (MB)", "peak / planned (%)"], rows)
    return Section("Memory", [*(legend(runs) if figures else []), *figures, table])


def _peak(run: Run) -> float:
    measured = run.rounds["memory_bytes"].dropna()
    return max(float(run.summary.get("peak_memory_bytes") or 0), float(measured.max()) if len(measured) else 0.0)


def _over_rounds(runs: Runs) -> list[Figure]:
    curves = []
    for at, (name, run) in enumerate(runs.items()):
        rows = run.rounds[run.rounds["memory_bytes"].notna()]
        if rows.empty:
            continue
        x, y = (rows["round"] + 1).tolist(), (rows["memory_bytes"].astype("float64") / 1e6).tolist()
        planned = run.summary.get("planned_memory_bytes")
        beside = f" of {number(planned / 1e6)} planned" if planned else ""
        curves.append(Curve(at, name, x, y, f"at most {number(max(y))} MB{beside}"))
        if planned and len(runs) == 1:
            curves.append(Curve(1, "planned", [x[0], x[-1]], [planned / 1e6] * 2))
    caption = "At each round's end."
    if any(curve.name == "planned" for curve in curves):
        caption += " The dashed line: what was planned at most, with Ray and the command's own process."
    return [overlay("Memory of coordinator and workers (MB)", ROUNDS, curves, caption, FROM_ZERO)] if curves else []
