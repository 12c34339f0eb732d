"""Ten million clients: what a data set of them holds, and what it takes to deal it out."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rayfed_sub import load_config
from rayfed_sub.data.dataset import load_dataset
from rayfed_sub.planning.job import kind_of, processor_of

TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
MB = 10**6
CLIENTS = 10_000_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_million_clients_take_their_row_numbers_and_little_more() -> None:
    """80 million row numbers of 4 bytes, 10 million offsets of 8; while they are dealt out besides those a draw of each
    client, 40 MB.  A list of arrays took 6.5 GB."""
    keys = [f"federation.clients={CLIENTS}", "federation.sampled=8"]
    config = load_config(TINY, [*keys, "federation.partition={kind: resample, rows_per_client: 8}"])
    processor = processor_of(config, kind_of(config))
    load_dataset(config.task, config.federation.model_copy(update={"clients": 8}), processor, config.seed)  # once read
    tracemalloc.start()
    try:
        dataset = load_dataset(config.task, config.federation, processor, config.seed)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert dataset.client_rows.nbytes + dataset.client_offsets.nbytes == 80 * 4 * MB + 80 * MB + 8
    assert held < 410 * MB
    assert most < 500 * MB
    assert len(dataset.client_names) == CLIENTS
    assert dataset.client_names[CLIENTS - 1] == "client 9999999"
    assert len(set(dataset.rows_of(CLIENTS - 1).tolist())) == 8
    assert all(np.all(np.diff(dataset.rows_of(client)) > 0) for client in range(0, CLIENTS, 1_234_567))
    counts = np.bincount(dataset.held_out_clients)
    assert counts.sum() == len(dataset.held_out)
