"""Generated results lie apart from the sources that they come from."""

from __future__ import annotations

from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
GENERATED = {".csv", ".svg", ".png", ".json", ".parquet"}
SOURCES = {EXPERIMENTS / "clusters" / "grafana.json"}


def test_generated_files_lie_in_results_and_nowhere_else() -> None:
    results = EXPERIMENTS / "results"
    found = {path for path in EXPERIMENTS.rglob("*") if path.suffix in GENERATED}
    assert {path for path in found if results not in path.parents} == SOURCES
    assert {path for path in results.rglob("*") if path.is_file()} <= found
