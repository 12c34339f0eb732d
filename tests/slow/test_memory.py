"""Memory of runs side by side on one node: one more run costs its own tensors and never the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayfed_sub import load_config
from rayfed_sub.planning.job import prepare
from rayfed_sub.planning.needs import DRIVER, HOLES, RAY, need
from rayfed_sub.planning.plan import job_parts
from rayfed_sub.planning.worker_memory import KERNELS
from tests.helpers.measured_trials import QUICKSTART, SMALL

MB = 10**6


def measured(folder: Path, count: int, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.helpers.measured_trials", str(folder), str(count), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=550, cwd=QUICKSTART.parents[1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("every", [0, 1], ids=["without diagnostics", "with diagnostics"])
def test_run_costs_two_copies_of_the_target_weights(every: int, tmp_path: Path) -> None:
    """SmolLM2-135M in bfloat16 under FedFTG, two runs side by side, a coordinator and a worker each: the planned memory
    of a run besides the backbone and the rows.  Of the targets' weights there are two copies, the server, which is the
    broadcast, and the sum of its clients, and never a third; diagnostics take some layers at a time besides.  All of
    the model would be 2.5 copies more."""
    diagnostics = f"diagnostics.every={every}"
    job = prepare(load_config(QUICKSTART, [*SMALL, diagnostics]))
    planned = need(job_parts(job))
    # 30 layers, query and output 576 x 576, key and value 192 x 576, 4 bytes a number
    targets = 30 * 4 * (2 * 576 * 576 + 2 * 192 * 576)
    assert targets == sum(4 * layer.m * layer.n for layer in job.architecture.shape.targets)
    alone = (
        planned.node(2, planned.worker(2).process) - planned.backbone - planned.data - DRIVER - RAY - planned.libraries
    )
    two = measured(tmp_path, 2, diagnostics)
    print(f"a run of two: {two['both'] / 2 / MB:.0f} MB, planned {alone / MB:.0f} MB")
    assert two["both"] <= 2 * alone
    looked = round(HOLES * (planned.looked + planned.compared))
    assert two["coordinators"] <= 2 * (planned.bare[1] + KERNELS + 2 * targets + looked)
    assert two["store"] <= 2 * 2 * targets  # the frozen weights are there once, from before the runs
    assert len(set(two["sha256"])) == 1  # side-by-side runs change no bits
