"""Flower's apps for the race: its FedAvg, a message of the trained weights alone to and from every client.

Clients that train have a model that each process loads once; others return the weights as they came, or only a number.
Both ways of running them (`run_flower.py`, `run_flower_app.py`) say by `marks.ASKED` what is asked, also to processes
that they do not start themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from experiments.benchmarks.cases import LEAST, MOST, TRAIN
from experiments.benchmarks.marks import Marks, asked

case, work, out, _ = asked()
marks = Marks(case)

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    content = {"metrics": MetricRecord({"num-examples": 1})}
    if case.does == TRAIN:
        from experiments.benchmarks.local import loaded  # imports torch, which other cases' clients do without

        local = loaded(work)
        local.set_weights(message.content["arrays"].to_numpy_ndarrays())
        local.train(int(message.content["config"]["server-round"]) - 1, int(context.node_config["partition-id"]))
        content["arrays"] = ArrayRecord(local.weights())
    if case.does == MOST:
        content["arrays"] = message.content["arrays"]
    return Message(content=RecordDict(content), reply_to=message)


class Marked(FedAvg):  # type: ignore[misc]
    """FedAvg that marks the ends of rounds; where clients send no weights, those of the round before stand."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = arrays
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = (self._sent, None) if case.does == LEAST else super().aggregate_train(server_round, replies)
        marks.mark()
        return found


@server_app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    if case.does == TRAIN:
        stored: dict[str, Any] = dict(np.load(work / "targets.npz"))
    else:
        stored = {f"{number}": np.zeros(shape, np.float32) for number, shape in enumerate(case.shapes)}
    names, begin = list(stored), list(stored.values())
    strategy = Marked(fraction_evaluate=0.0, min_train_nodes=case.clients, min_available_nodes=case.clients)
    marks.mark()
    found = strategy.start(grid, ArrayRecord(begin), num_rounds=case.rounds, train_config=ConfigRecord())
    marks.leave(out, dict(zip(names, found.arrays.to_numpy_ndarrays(), strict=True)))
