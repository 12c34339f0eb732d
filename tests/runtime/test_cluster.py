"""Several nodes: what fits them, what an autoscaler may add, and the same bits on two nodes as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from rayfed_sub.cli import main
from rayfed_sub.planning.machines import Node, most_workers
from rayfed_sub.runtime import cluster
from rayfed_sub.runtime.cluster import grown_by

TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
SMALL = ("federation.rounds=2", "federation.local_steps=2", "evaluation.eval_rows=16", "resources.workers=2")
# A head and a worker node with one CPU each, so that two workers of one CPU are on two nodes.
TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_cluster_can_grow_to_the_limits_of_its_file() -> None:
    kinds = {
        "head": {"resources": {"CPU": 2}},  # not more than the existing one
        "spot": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3},
        "on_demand": {"resources": {"CPU": 8, "GPU": 1}},  # as many as the cluster can have
    }
    grown = grown_by({"max_workers": 4, "head_node_type": "head", "available_node_types": kinds})
    assert grown == [{"CPU": 8, "GPU": 1}] * 4


@pytest.mark.parametrize(
    ("there", "kinds", "sizes"),
    [
        # A head, and three machines of one's own, whose sizes are not in Ray's file.
        ([0, 8, 8, 8], {"local.cluster.node": {"resources": {}, "max_workers": 3}}, [0, 8, 8, 8]),
        # A head alone, and spot nodes that may be added.
        ([0], {"spot": {"resources": {"CPU": 8}, "max_workers": 2}}, [0, 8, 8]),
        # One of them exists already.
        ([0, 8], {"spot": {"resources": {"CPU": 8}, "max_workers": 2}}, [0, 8, 8]),
    ],
)
def test_nodes_of_a_cluster(
    there: list[int], kinds: dict[str, Any], sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in there]
    alive[0]["Resources"][cluster.HEAD] = 1.0  # type: ignore[index]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    file = tmp_path / "bootstrap.yaml"
    file.write_text(yaml.safe_dump({"max_workers": 3, "available_node_types": kinds}))
    monkeypatch.setattr(cluster, "_BOOTSTRAP", file)
    assert [node.cpus for node in cluster.nodes()] == sizes


def test_workers_of_one_shape_on_unlike_nodes() -> None:
    # 8 // 3 + 4 // 3 + 2 // 3, and not 14 // 3 = 4.
    assert most_workers([Node(8), Node(4), Node(2)], 3, 0) == 3
    # Four quarters of a GPU on the first, none on the second.
    assert most_workers([Node(8, 1), Node(8)], 1, 0.25) == 4


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of two nodes, in a separate process: the Ray session of this one is unchanged."""
    log = (tmp_path / "cluster.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate("", timeout=60)


def done(command: str, out: Path, *overrides: str, address: str | None = None) -> None:
    """Run a small run or sweep to its end, in a separate process, as a user starts it."""
    words = [sys.executable, "-m", main.__name__, command, str(TINY), *SMALL, *overrides, "--out", str(out)]
    own = {"RAY_ADDRESS": address} if address else {}
    process = subprocess.run(words, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def weights(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["weights_sha256"])


@pytest.mark.slow
def test_two_nodes_give_the_bits_of_one(two_nodes: str, tmp_path: Path) -> None:
    done("run", tmp_path / "apart", address=two_nodes)
    done("run", tmp_path / "together")
    assert weights(tmp_path / "apart") == weights(tmp_path / "together")
    # A trial, whose placement group spans both nodes; 4 is the rank in the file.
    done("sweep", tmp_path / "sweep", "sweep.space={method.rank: {grid: [4]}}", address=two_nodes)
    assert weights(tmp_path / "sweep/trials/00000") == weights(tmp_path / "together")


@pytest.mark.slow
def test_more_workers_than_a_cluster_holds_are_refused(two_nodes: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", main.__name__, "run", str(TINY), "resources.workers=3"]
    process = subprocess.run(
        [*command, "--address", two_nodes, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert "resources.workers: got 3; allowed: 1 to 2 with cpus_per_worker=1 on 1 + 1 CPUs" in process.stderr
    assert not (tmp_path / "run").exists()
