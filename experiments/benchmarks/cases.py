"""The race's cases: how many clients, which model, how much work a round.  Read by every contestant, so nothing heavy
is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass

RANK = 8
SCALE = 1.0
LR = 1e-3
BETAS = (0.9, 0.999)
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """clients all take part in every round, each with `steps` local steps of `batch` rows of `tokens` tokens.

    model: a Llama's numbers, random weights; None: SmolLM2-135M on Python's documentation, rows of up to `tokens`.
    pack_size: rayfed_sub's, as `rayfed-sub plan --probe` finds it.  rounds: the first, which is told apart, included.
    passes: how often everybody runs.
    """

    name: str
    told: str
    clients: int
    steps: int
    batch: int
    tokens: int
    pack_size: int
    rounds: int
    model: dict[str, int] | None = None
    rank: int = RANK
    passes: int = 1


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


CASES = {
    "A": Case("A", "200 clients, width 64", 200, 2, 1, 32, 50, 8, llama(64, 172, 5, 8, 512), passes=3),
    "B": Case("B", "32 clients, width 128", 32, 4, 4, 64, 8, 6, llama(128, 384, 4, 4, 512), passes=3),
    "C": Case("C", "16 clients, width 288", 16, 5, 2, 64, 4, 6, llama(288, 768, 6, 6, 8192), passes=3),
    "D": Case("D", "8 clients, SmolLM2-135M", 8, 2, 2, 128, 2, 3),
    "growth": Case("growth", "100 clients, width 64, 4 layers", 100, 1, 1, 32, 50, 40, llama(64, 172, 4, 8, 512)),
    "few": Case("few", "100 clients of A, for memory", 100, 2, 1, 32, 50, 4, llama(64, 172, 5, 8, 512)),
    "many": Case("many", "800 clients of A, for memory", 800, 2, 1, 32, 50, 4, llama(64, 172, 5, 8, 512)),
    "smoke": Case("smoke", "4 clients, width 32", 4, 2, 2, 32, 2, 3, llama(32, 96, 2, 2, 300)),
}
