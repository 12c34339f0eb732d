"""Flower 1.41 on Ray under a load: a message with the weights to every client, and from it, two client actors.

python -m experiments.benchmarks.run_flower_load LOAD OUT WORKERS
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.benchmarks.loads import Load
from experiments.benchmarks.readings import Readings

load, out = Load(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
readings = Readings()

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """What came goes back, or only a number."""
    metrics = MetricRecord({"num-examples": 1})
    content = {"arrays": message.content["arrays"], "metrics": metrics} if load.answers else {"metrics": metrics}
    return Message(content=RecordDict(content), reply_to=message)


class Watched(FedAvg):  # type: ignore[misc]
    """FedAvg with a reading after every round; where clients send no weights, those of the round before stand."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = arrays
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = super().aggregate_train(server_round, replies) if load.answers else (self._sent, None)
        readings.take()
        return found


@server_app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    strategy = Watched(fraction_evaluate=0.0, min_train_nodes=load.clients, min_available_nodes=load.clients)
    readings.take()
    arrays = ArrayRecord([np.zeros(shape, np.float32) for shape in load.shapes])
    strategy.start(grid, arrays, num_rounds=load.rounds, train_config=ConfigRecord())


os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
run_simulation(
    server_app,
    client_app,
    num_supernodes=load.clients,
    backend_config={
        "init_args": {"num_cpus": int(sys.argv[3]), "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    },
)
readings.leave(out)
