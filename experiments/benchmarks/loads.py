"""What the engines are loaded with where it is their own cost that is measured: many clients with nothing to compute.
Read by both, so nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.benchmarks.cases import RANK, SCALE, llama

TINY = llama(16, 16, 1, 2, 300)
LARGE = llama(1024, 2560, 4, 8, 300)  # up_proj: 4 x 2560 x 1024 numbers, 41.9 MB

IDLE = {"name": "experiments.benchmarks.idle:Idle"}
FEDFTG = {"name": "fedftg", "rank": RANK, "scale": SCALE, "optimizer_state": "reset"}


@dataclass(frozen=True)
class Load:
    """clients all take part in each of `rounds` rounds.  model: a Llama's numbers; its up_proj weights are what the
    server sends.  method, pack_size: rayfed_sub's.  answers: whether Flower's clients send the weights back."""

    clients: int
    rounds: int
    model: dict[str, int]
    method: dict[str, Any]
    pack_size: int = 100
    answers: bool = True

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the weights that the server sends."""
        return [(self.model["intermediate_size"], self.model["hidden_size"])] * self.model["num_hidden_layers"]
