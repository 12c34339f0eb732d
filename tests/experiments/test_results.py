"""Generated results are separate from their sources."""

from __future__ import annotations

from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
GENERATED = {".csv", ".svg", ".png", ".json", ".parquet"}
SOURCES = {EXPERIMENTS / "clusters" / "grafana.json"}


def test_generated_files_are_in_results_only() -> None:
    results = EXPERIMENTS / "results"
    found = {path for path in EXPERIMENTS.rglob("*") if path.suffix in GENERATED}
    assert {path for path in found if results not in path.parents} == SOURCES
    assert {path for path in results.rglob("*") if path.is_file()} <= found
