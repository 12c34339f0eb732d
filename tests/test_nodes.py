"""Several nodes: what fits them, what an autoscaler may add, and the same bits on two nodes as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayfed_sub import cli
from rayfed_sub.engine.nodes import Node, grown_by, most_workers

TINY = Path(__file__).parents[1] / "experiments" / "tiny.yaml"
SMALL = ("federation.rounds=2", "federation.local_steps=2", "evaluation.examples=16", "resources.workers=2")
# A head and a worker node with one CPU each, so that two workers of one CPU lie on two nodes.
TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_a_cluster_may_grow_to_its_files_limits() -> None:
    kinds = {
        "head": {"resources": {"CPU": 2}},  # never more than the one that is there
        "spot": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3},
        "on_demand": {"resources": {"CPU": 8, "GPU": 1}},  # as many as the cluster may have
    }
    grown = grown_by({"max_workers": 4, "head_node_type": "head", "available_node_types": kinds})
    assert grown == [{"CPU": 8, "GPU": 1}] * 4


def test_workers_of_one_shape_on_unlike_nodes() -> None:
    # 8 // 3 + 4 // 3 + 2 // 3, and not 14 // 3 = 4.
    assert most_workers([Node(8), Node(4), Node(2)], 3, 0) == 3
    # Four quarters of a GPU on the first, none on the second.
    assert most_workers([Node(8, 1), Node(8)], 1, 0.25) == 4


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of two nodes, in a process of its own: this one's Ray session stays what it is."""
    log = (tmp_path / "cluster.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate("", timeout=60)


def ran(out: Path, *overrides: str, address: str | None = None) -> dict[str, str]:
    """A small run's summary; in a process of its own, as a person starts it."""
    command = [sys.executable, "-m", cli.__name__, "run", str(TINY), *SMALL, *overrides, "--out", str(out)]
    own = {"RAY_ADDRESS": address} if address else {}
    told = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    summary: dict[str, str] = json.loads((out / "summary.json").read_text())
    return summary


@pytest.mark.slow
def test_two_nodes_give_the_bits_of_one(two_nodes: str, tmp_path: Path) -> None:
    apart = ran(tmp_path / "apart", address=two_nodes)
    together = ran(tmp_path / "together")
    assert apart["weights_sha256"] == together["weights_sha256"]


@pytest.mark.slow
def test_more_workers_than_a_cluster_holds_are_refused(two_nodes: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", cli.__name__, "run", str(TINY), "resources.workers=3"]
    told = subprocess.run(
        [*command, "--address", two_nodes, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "resources.workers: got 3; allowed: 1 to 2 with cpus_per_worker=1 on 1 + 1 CPUs" in told.stderr
    assert not (tmp_path / "run").exists()


def test_no_cluster_at_an_address(tmp_path: Path) -> None:
    command = [sys.executable, "-m", cli.__name__, "run", str(TINY), "--out", str(tmp_path / "run")]
    told = subprocess.run([*command, "--address", "ray://127.0.0.1:1"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith("rayfed-sub: --address: got 'ray://127.0.0.1:1'; allowed: auto, or HOST:PORT")
