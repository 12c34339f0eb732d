"""Facts of the paper and of its released code, each with its arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rayfed_sub.config.schema import Federation, Partition, Task
from rayfed_sub.data.dataset import load_pairs
from rayfed_sub.diagnostics.server_change import change_rank


def test_rank_inflation() -> None:
    """N = 4 changes of rank r = 3 on 40 x 30: rank(sum p_k B_k A_k) = min(40, 30, 4 * 3) = 12; with N = 11, 30."""
    rng = torch.Generator().manual_seed(0)

    def mean(clients: int) -> torch.Tensor:
        products = [
            torch.randn(40, 3, generator=rng, dtype=torch.float64)
            @ torch.randn(3, 30, generator=rng, dtype=torch.float64)
            for _ in range(clients)
        ]
        return torch.stack(products).mean(0)

    assert torch.linalg.matrix_rank(mean(4)) == 12
    assert torch.linalg.matrix_rank(mean(11)) == 30
    assert change_rank(torch.zeros(40, 30), mean(4).float()) == 12  # our own rank, in stored float32 weights


@pytest.mark.skipif("DOLLY_PARQUET" not in os.environ, reason="set DOLLY_PARQUET to the release's split of Dolly-15k")
def test_released_code_splits_dolly_in_four() -> None:
    """15,011 rows = 4 * 3,752 + 3 without a client; read as a run reads them, less repeats."""
    import pandas as pd

    path = Path(os.environ["DOLLY_PARQUET"])
    clients = pd.read_parquet(path).fedftg_client
    assert len(clients) == 15_011
    assert clients.value_counts().tolist() == [3752] * 4
    assert clients.isna().sum() == 3
    task = Task(name="table", path=str(path), prompt="{instruction}\n{context}", answer="response")
    pairs = load_pairs(task, Federation(clients=4, partition=Partition(kind="column", column="fedftg_client")))
    assert len(set(pairs.keys)) == 4
    assert 15_008 - 100 < len(pairs.keys) <= 15_008
