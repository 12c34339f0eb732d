"""The dashboard: it shows every exported gauge, and nothing else."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

from rayfed_sub.runtime.live import gauge_of
from rayfed_sub.telemetry.metrics import FIGURES, SCORES

BOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "experiments" / "clusters" / "grafana.json").read_text(encoding="utf-8")
)
PANELS: list[dict[str, Any]] = BOARD["panels"]
VARIABLES: dict[str, dict[str, Any]] = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAGS = {"run", "method", "folder"}  # of every gauge; scores have `score` too

# One gauge of one or more runs: max by (LABELS) (NAME{run=~"$run", method=~"$method", MORE})
EXPRESSION = re.compile(
    r'max by \(([\w, ]+)\) \((\w+)\{run=~"\$run", method=~"\$method"(?:, (score)!?[=~]+"[^"]+")?\}\)'
)


def exported() -> set[str]:
    """Names on the Prometheus endpoint, where Ray prepends ray_."""
    return {"ray_" + gauge_of(tag)[0] for tag in (*FIGURES, f"{SCORES}/accuracy")}


def targets() -> list[dict[str, Any]]:
    return [target for panel in PANELS for target in panel["targets"]]


def test_panels_show_exactly_the_exported_gauges() -> None:
    shown = set()
    for target in targets():
        found = EXPRESSION.fullmatch(target["expr"])
        assert found, target["expr"]
        labels, name, score = found.groups()
        own = {"score"} if name == "ray_rayfed_sub_scores" else set()
        assert set(labels.split(", ")) == TAGS | own, "runs or scores would be merged"
        assert {score} - {None} <= own
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= TAGS | own
        shown.add(name)
    assert shown == exported()


def test_runs_and_methods_are_chosen_among_existing_ones() -> None:
    assert list(VARIABLES) == ["datasource", "run", "method"]
    assert (VARIABLES["datasource"]["type"], VARIABLES["datasource"]["query"]) == ("datasource", "prometheus")
    for name in ("run", "method"):
        query = VARIABLES[name]["query"]["query"]
        found = re.fullmatch(r"label_values\((\w+)(?:\{run=~\"\$run\"\})?, (\w+)\)", query)
        assert found, query
        assert found[1] in exported()
        assert found[2] == name
        assert VARIABLES[name]["definition"] == query
    sources = [variable["datasource"] for variable in list(VARIABLES.values())[1:]]
    assert all(source == SOURCE for source in [*sources, *(one["datasource"] for one in (*PANELS, *targets()))])


def test_panels_have_distinct_ids_and_positions() -> None:
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    assert all(at["x"] >= 0 and at["y"] >= 0 and at["w"] > 0 and at["h"] > 0 for at in places)
    assert all(at["x"] + at["w"] <= 24 for at in places)  # Grafana's columns
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
