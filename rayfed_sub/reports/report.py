"""Runs as one HTML file: symptoms, overview, curves, answers, layers, clients, workers, failures."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rayfed_sub.core.errors import UserError
from rayfed_sub.reports.answers import answers
from rayfed_sub.reports.clients import clients
from rayfed_sub.reports.curves import quality, traffic
from rayfed_sub.reports.failures import failures, symptoms
from rayfed_sub.reports.layer_metrics import layers
from rayfed_sub.reports.overview import differences, environment, results
from rayfed_sub.reports.page import Section, page
from rayfed_sub.reports.run_reader import Run, Runs, named, read_run
from rayfed_sub.reports.simulated_time import simulated_time
from rayfed_sub.reports.timeline import memory, timeline
from rayfed_sub.storage.remote import Place
from rayfed_sub.telemetry.events import Notice

_TITLED = 4
"""Most runs to name in the title."""


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Writes the page about the runs, one at least, to `path`: 5 MB, nearly all of it plotly.js, and up to 1 MB for a
    run of 10,000 clients.

    The file appears whole or not at all.  Raises UserError where it cannot be written.
    """
    known = named(runs)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page(_title(known), sections(known)), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError("--out", str(path), "a file that can be written", error.strerror or str(error)) from None


def report_run(place: Place, notify: Callable[[Notice], None]) -> None:
    """Writes report.html into the folder of a finished run where there is none.  The run counts as finished without it,
    so a failure becomes a notice with the command that tries again."""
    path = place.path / "report.html"
    if path.exists():
        return
    try:
        write_report([read_run(place.path, place.display_name())], path)
    except Exception as error:
        again = f"rayfed-sub report {shlex.quote(place.display_name())}"
        notify(Notice(f"no report: {type(error).__name__}: {error}; {again} tries again"))


def sections(runs: Runs) -> list[Section]:
    """Sections of the report; those without data are left out."""
    found = [
        symptoms(runs),
        results(runs),
        differences(runs),
        quality(runs),
        traffic(runs),
        simulated_time(runs),
        answers(runs),
        layers(runs),
        clients(runs),
        timeline(runs),
        memory(runs),
        failures(runs),
        environment(runs),
    ]
    return [section for section in found if section is not None]


def _title(runs: Runs) -> str:
    if len(runs) == 1:
        ((name, run),) = runs.items()
        return f"{name}: {run.method}"
    common = {run.config.name for run in runs.values()}
    what = f"{common.pop()}: " if len(common) == 1 else ""
    return f"{what}{len(runs)} runs" + (f", {', '.join(runs)}" if len(runs) <= _TITLED else "")
