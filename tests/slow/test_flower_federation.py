"""Real federations: a SuperLink, SuperNodes and exported apps, processes of Flower 1.42 over loopback, without Ray.

`make .venv-flower-app/.installed` makes the environment, by installing an exported app.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from rayfed_sub import load_config, run
from rayfed_sub.config.loading import yaml_text
from rayfed_sub.deployment import node
from rayfed_sub.export.flower import export_flower
from rayfed_sub.methods import build
from rayfed_sub.storage import checkpoints
from tests.deployment.test_federation import CONFIG
from tests.helpers.flower_federation import Federation

PROGRAMS = Path(__file__).parents[2] / ".venv-flower-app" / "bin"
METHODS = ("fedftg", "fedavg", "fedit", "ffa-lora", "flexlora", "flora", "fedsa-lora")
HEADER = 128  # bytes of numpy's header of an array

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        not (PROGRAMS / "flwr").exists(), reason="no .venv-flower-app: make .venv-flower-app/.installed"
    ),
]


def tree_of(method: str, **federation: object) -> dict[str, Any]:
    """Two clients of which both train, then three rounds in which client 0 takes part in two."""
    own: dict[str, object] = {"name": method} if method == "fedavg" else {"name": method, "rank": 2}
    if method == "flexlora":
        own["client_ranks"] = [2, 1]
    return {**CONFIG, "name": f"real-{method}", "method": own, "federation": {**CONFIG["federation"], **federation}}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    found = Federation(PROGRAMS, tmp_path_factory.mktemp("federation"))
    try:
        for client in range(3):
            found.add(client)
        yield found
    finally:
        found.close()


def app_of(tree: Mapping[str, Any], folder: Path) -> Path:
    (folder / "config_here.yaml").write_text(yaml_text(tree))
    export_flower(folder / "config_here.yaml", folder / "app")
    return folder / "app"


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "clients.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_the_simulation_s_and_the_bytes_those_that_are_counted(
    method: str, federation: Federation, tmp_path: Path
) -> None:
    tree = tree_of(method)
    run(load_config(tree), out=tmp_path / "simulation")
    output = federation.run(app_of(tree, tmp_path))
    simulated = json.loads((tmp_path / "simulation" / "summary.json").read_text())
    own = checkpoints.read(tmp_path / "simulation")
    assert own is not None
    server = load_file(output / "server.safetensors")
    assert server.keys() == own.server.keys()
    assert max(float((server[name].double() - own.server[name].double()).abs().max()) for name in server) < 1e-5
    if build(tree["method"]).personal:  # each node has its client's own part
        for client, n in own.state_files:
            mine = checkpoints.stored_state(tmp_path / "simulation", own, client)
            kept = node.stored_state(federation.folder_of(client, output.name), n - 1)
            assert kept is not None
            assert all(np.array_equal(kept.tensors[name], x) for name, x in mine.tensors.items())
    else:
        assert json.loads((output / "summary.json").read_text())["weights_sha256"] == simulated["weights_sha256"]
    counted = pd.read_parquet(tmp_path / "simulation" / "clients.parquet").set_index(["round", "client"])
    for row in rows_of(output):
        there = counted.loc[row["round"], row["client"]]
        assert (row["up_bytes"], row["down_bytes"]) == (there.uplink_bytes, there.downlink_bytes)
        assert row["up_counted"] == row["up_bytes"]
        assert row["down_counted"] == row["down_bytes"]
        for way in ("up", "down"):  # framing: headers of numpy, and names, metrics and a line of JSON
            framing = row[f"{way}_payload"] - row[f"{way}_bytes"]
            assert 0 < framing - HEADER * row[f"{way}_arrays"] < 400 + 150 * row[f"{way}_arrays"]
    print(table_row(method, rows_of(output)))


def table_row(method: str, rows: list[dict[str, Any]]) -> str:
    """The row of the documents' table: sums over the run."""
    cells = [
        sum(row[f"{way}_{what}"] for row in rows) for way in ("up", "down") for what in ("counted", "bytes", "payload")
    ]
    return f"| `{method}` | " + " | ".join(f"{cell:,}" for cell in cells) + " |"


def test_goes_on_from_a_simulation_s_checkpoint(federation: Federation, tmp_path: Path) -> None:
    """A simulation of three rounds, whose last one the app runs again."""
    tree = tree_of("fedftg")
    run(load_config(tree), out=tmp_path / "simulation")
    digest = json.loads((tmp_path / "simulation" / "summary.json").read_text())["weights_sha256"]
    checkpoints.go_back(tmp_path / "simulation")
    export_flower(tmp_path / "simulation", tmp_path / "app", checkpoint="last")
    for client in range(3):
        federation.kill(client)
        federation.add(client, f"checkpoint='{tmp_path / 'app' / 'checkpoint'}'")
    output = federation.run(tmp_path / "app")
    assert {row["round"] for row in rows_of(output)} == {2}
    assert json.loads((output / "summary.json").read_text())["weights_sha256"] == digest


def test_a_killed_node_a_late_client_and_a_nan_are_failed_clients(federation: Federation, tmp_path: Path) -> None:
    """Client 2's node is killed after the first round and comes back before the last, client 1 answers too late in the
    second, client 0 sends a NaN in the third."""
    tree = tree_of("fedftg", sampled=3, rounds=4, on_client_failure="skip")
    app = app_of(tree, tmp_path)
    script = (app / "flower_app" / "client_app.py").read_text()
    faults = """
    if (msg.metadata.group_id, client) == ("2", 1):
        __import__("time").sleep(150)
    if (msg.metadata.group_id, client) == ("3", 0):
        reply = __import__("dataclasses").replace(reply, update=__import__("dataclasses").replace(
            reply.update, tensors={k: v * float("nan") for k, v in reply.update.tensors.items()}))
"""
    (app / "flower_app" / "client_app.py").write_text(
        script.replace("    return Message(content=reply_record", f"{faults}    return Message(content=reply_record")
    )
    with federation.running(app, **{"round-timeout": 100.0, "node-timeout": 30.0}) as process:
        log = federation.output_of(process) / "clients.jsonl"
        wait_for_rounds(process, log, 1)
        federation.kill(2)
        wait_for_rounds(process, log, 3)
        federation.add(2)
        assert process.wait(600) == 0
    rows = {(row["round"], row["client"]): row for row in rows_of(log.parent)}
    failed = {key: row["failure"] for key, row in rows.items() if row["failure"] is not None}
    assert (1, 1) in failed
    assert failed[1, 1] == "no answer in time"
    assert "non-finite" in failed[2, 0]
    assert {key for key in failed if key[1] != 2} == {(1, 1), (2, 0)}
    server = load_file(log.parent / "server.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in server.values())
    assert rows[3, 2]["failure"] is None  # back with what it had: it receives the rounds since the first
    assert rows[3, 2]["down_bytes"] == rows[3, 2]["down_counted"] > 0


def wait_for_rounds(process: subprocess.Popen[bytes], log: Path, rounds: int, seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while (
        not log.exists() or max((json.loads(x)["round"] for x in log.read_text().splitlines()), default=-1) < rounds - 1
    ):
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < until, "the federation stands still"
        time.sleep(0.5)
