"""The benchmarks' cases: how many clients, which model, how much work a round.

Read by every contestant, so that nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RANK = 8
SCALE = 1.0
LR = 1e-3
BETAS = (0.9, 0.999)
EPS = 1e-6

TRAIN, LOW_RANK = "train", "train, send low-rank"
MOST, LEAST = "send the weights back", "send nothing back"
OURS, FLOWER = "rayfed_sub", "flower"


@dataclass(frozen=True)
class Case:
    """clients all take part in every round, each with `steps` local steps of `batch` rows of `tokens` tokens.

    model: a Llama's numbers, random weights; None: SmolLM2-135M on Python's documentation, rows of up to `tokens`.
    pack_size: rayfed_sub's where nothing is trained, and of states that find none themselves.  rounds: the first, which
    stands apart, included.
    does: a client's work.  With TRAIN it trains on batches of its own and sends what it learned; with the others, which
    load the engine alone, it has one of a few short rows.  passes: runs of each contestant.  contestants: by name; none
    for all.  look_every: seconds between two looks at the memory.
    """

    name: str
    title: str
    clients: int
    rounds: int
    model: dict[str, int] | None
    pack_size: int
    steps: int = 1
    batch: int = 1
    tokens: int = 32
    rank: int = RANK
    does: str = TRAIN
    passes: int = 1
    contestants: tuple[str, ...] = ()
    look_every: float = 5.0

    @property
    def method(self) -> dict[str, Any]:
        """rayfed_sub's method."""
        if self.does in (MOST, LEAST):
            return {"name": "experiments.benchmarks.idle:Idle"}
        return {"name": "fedftg", "rank": self.rank, "scale": SCALE, "optimizer_state": "reset"}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the weights that the server sends."""
        assert self.model is not None
        return [(self.model["intermediate_size"], self.model["hidden_size"])] * self.model["num_hidden_layers"]


def llama(width: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, int]:
    """A Llama's sizes by transformers' names."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
    }


SMALL = llama(64, 172, 5, 8, 512)
TINY = llama(16, 16, 1, 2, 300)
LARGE = llama(1024, 2560, 4, 8, 300)  # up_proj: 4 x 2560 x 1024 numbers, 41.9 MB


def load(part: str, engine: str, does: str, clients: int, rounds: int) -> Case:
    """A case that loads an engine without giving its clients anything to compute."""
    model, pack_size = (LARGE, 8) if part == "traffic" else (TINY, 100)
    look_every = 1.0 if part == "memory" else 5.0
    title = f"{clients:,} clients {does}"
    return Case(part, title, clients, rounds, model, pack_size, does=does, contestants=(engine,), look_every=look_every)


RACED = {
    "A": Case("A", "200 clients, width 64", 200, 8, SMALL, 50, steps=2, passes=3),
    "B": Case("B", "32 clients, width 128", 32, 6, llama(128, 384, 4, 4, 512), 8, 4, 4, 64, passes=3),
    "C": Case("C", "16 clients, width 288", 16, 6, llama(288, 768, 6, 6, 8192), 4, 5, 2, 64, passes=3),
    "D": Case("D", "8 clients, SmolLM2-135M", 8, 3, None, 2, 2, 2, 128),
    # A worker's memory has its height after some packs, so that fewer clients would seem to take more each.
    "few": Case("few", "800 clients of A, for memory", 800, 4, SMALL, 50, steps=2, look_every=0.5),
    "many": Case("many", "1,600 clients of A, for memory", 1600, 4, SMALL, 50, steps=2, look_every=0.5),
    "smoke": Case("smoke", "4 clients, width 32", 4, 3, llama(32, 96, 2, 2, 300), 2, 2, 2),
}
"""Training, by all contestants."""
LOADS = {
    "time": (load("time", OURS, LEAST, 1000, 8), load("time", FLOWER, MOST, 1000, 5)),
    "traffic": (
        load("traffic", OURS, LEAST, 48, 4),
        load("traffic", OURS, LOW_RANK, 48, 4),
        load("traffic", FLOWER, LEAST, 48, 4),
        load("traffic", FLOWER, MOST, 48, 4),
    ),
    "memory": (
        *(load("memory", OURS, LEAST, clients, 4) for clients in (100, 1000, 10_000)),
        *(load("memory", FLOWER, MOST, clients, 3) for clients in (100, 1000)),
    ),
    "load-smoke": (
        *(load("load-smoke", OURS, does, 4, 4) for does in (LEAST, LOW_RANK)),
        *(load("load-smoke", FLOWER, does, 4, 4) for does in (LEAST, MOST)),
    ),
}
"""The engines' own cost: time and traffic a client, and memory an added client."""
GROWTH = Case("growth", "100 clients, width 64, 4 layers", 100, 40, llama(64, 172, 4, 8, 512), 50)
