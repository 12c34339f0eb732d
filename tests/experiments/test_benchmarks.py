"""The race's smallest case: rayfed_sub and the bare loop do the same work, whatever the time they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_race_ends_with_the_same_weights(tmp_path: Path) -> None:
    out = tmp_path / "race.json"
    command = [sys.executable, "-m", "experiments.benchmarks.race", "smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    bare, ours = record["results"]
    assert (bare["contestant"], ours["contestant"]) == ("bare", "rayfed_sub")
    # Three rounds move weights by about 3 x 2 steps x lr = 6e-3; what is compared is rounding.
    assert ours["away"] < 1e-5
    assert 0 < ours["floor"] < ours["steady"]
    assert record["cores"] == os.cpu_count()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_engine_alone_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    command, began = (
        [sys.executable, "-m", "experiments.benchmarks.overhead", "smoke", "--out", str(out)],
        time.monotonic(),
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    passed = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())["rows"]
    # Idle clients: what the store gets in a round is the broadcast, at least 16 x 16 float32.
    assert row["clients"] * row["stored"] >= 16 * 16 * 4
    assert row["seconds"] < passed


def test_a_galore_step_ends_where_galore_torchs_does(tmp_path: Path) -> None:
    out = tmp_path / "galore.csv"
    command = [sys.executable, "-m", "experiments.benchmarks.galore", "24x16", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(out.read_text().splitlines()) > 1


@pytest.mark.parametrize("asked", ["race Z", "overhead Z", "growth Z", "growth --show --out Z"])
def test_a_wrong_name_is_refused_in_a_line(asked: str) -> None:
    name, *arguments = asked.split()
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Z" in done.stderr.splitlines()[-1]
