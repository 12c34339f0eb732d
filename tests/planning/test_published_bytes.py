"""Bytes of runs whose figures others have published: FlowerTune's leaderboard."""

from __future__ import annotations

from typing import Any

import pytest

from rayfed_sub.config.schema import Config, Model
from rayfed_sub.methods import build
from rayfed_sub.models.architecture import architecture
from rayfed_sub.planning.traffic import traffic

MISTRAL_7B = {
    "type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
}
LLAMA_3B = {
    "type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
GIB = 2**30
ROUNDS, SAMPLED, RANK = 200, 2, 32


@pytest.mark.parametrize(
    ("numbers", "layers", "q", "v", "counted", "ours"),
    [
        pytest.param(
            MISTRAL_7B, 32, (4096, 4096), (1024, 4096), "40.6", "40.5", id="mistral-7b", marks=pytest.mark.slow
        ),
        pytest.param(LLAMA_3B, 28, (3072, 3072), (1024, 3072), "27.3", "27.3", id="llama-3.2-3b"),
    ],
)
def test_bytes_of_flowertune(
    numbers: dict[str, Any], layers: int, q: tuple[int, int], v: tuple[int, int], counted: str, ours: str
) -> None:
    """FlowerTune's defaults: LoRA of rank 32 on q and v, 2 of 20 clients in each of 200 rounds, float32 both ways.

    r (m + n) numbers a layer: 32 * 32 * (8192 + 5120) * 4 bytes each way and client for Mistral, 52 MiB.  Its board
    (40.7 and 27.4 GiB) counts the first download; by our rule round 0 costs none.  The rounds after the second are as
    the second is, which the walk of three shows, so 200 are not walked.
    """
    shape = architecture(Model(path="random", random=numbers, targets="peft"), "causal-lm").shape
    assert sorted((layer.m, layer.n) for layer in shape.targets) == sorted([q] * layers + [v] * layers)
    each = 4 * RANK * layers * (sum(q) + sum(v))
    method = build({"name": "fedit", "rank": RANK, "alpha": 64.0})
    found = traffic(method, shape, Config(), [[0, 1], [0, 2], [3, 1]], lambda client: 10)
    first, second, third = ([(c.up, c.down, c.down_counted) for c in walked.values()] for walked in found.rounds)
    assert first == [(each, 0, each)] * SAMPLED
    assert second == third == [(each, each, each)] * SAMPLED
    by_rule = sum(up + down for up, down, _ in first) + (ROUNDS - 1) * sum(up + down for up, down, _ in second)
    whole = ROUNDS * sum(up + down for up, _, down in second)
    assert (f"{whole / GIB:.1f}", f"{by_rule / GIB:.1f}") == (counted, ours)
