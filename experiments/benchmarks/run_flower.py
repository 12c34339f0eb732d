"""Flower 1.41 on Ray: its FedAvg, a message of the trained weights alone to and from every client, and in each of two
client actors a model that is loaded once.

    python -m experiments.benchmarks.run_flower CASE WORK OUT WORKERS
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.benchmarks.marks import Marks, asked

case, work, out = asked()
workers = int(sys.argv[4])
marks = Marks()
final: dict[str, np.ndarray[Any, Any]] = {}

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    from experiments.benchmarks.local import loaded

    local = loaded(case.name, work)
    local.set_weights(message.content["arrays"].to_numpy_ndarrays())
    local.train(int(message.content["config"]["server-round"]) - 1, int(context.node_config["partition-id"]))
    content = {"arrays": ArrayRecord(local.weights()), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)


class Timed(FedAvg):  # type: ignore[misc]
    """FedAvg that notes when rounds end."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = super().aggregate_train(server_round, replies)
        marks.mark()
        return found


@server_app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    begin = dict(np.load(work / "targets.npz"))
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=case.clients, min_available_nodes=case.clients)
    marks.mark()
    arrays = ArrayRecord(list(begin.values()))
    found = strategy.start(grid, arrays, num_rounds=case.rounds, train_config=ConfigRecord())
    final.update(zip(begin, found.arrays.to_numpy_ndarrays(), strict=True))


os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
run_simulation(
    server_app,
    client_app,
    num_supernodes=case.clients,
    backend_config={
        "init_args": {"num_cpus": workers, "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    },
)
marks.leave(out, final)
