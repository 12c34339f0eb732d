"""The work of a case, written by rayfed_sub itself for all contestants: the initial weights and every batch, as files.

<folder>/case.json     the case
<folder>/config.yaml   the run as rayfed_sub is asked for it, and rows.parquet where it has rows of its own
<folder>/model/        the initial weights, for transformers' from_pretrained
<folder>/targets.npz   those of the trained layers alone, by name of the module, (m, n) float32
<folder>/batches.npz   input_ids and labels, int64 (rounds, clients, steps, batch, tokens), padding labelled -100
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from experiments.benchmarks.cases import BETAS, EPS, LR, TRAIN, Case
from rayfed_sub import load_config
from rayfed_sub.data.batching import IGNORED, ClientBatches
from rayfed_sub.data.objects import OwnBatch
from rayfed_sub.models.model_folder import write_folder
from rayfed_sub.models.weights import load_weights
from rayfed_sub.planning.job import Job, prepare

_FRAME = len("Q: \nA: ") + 2  # tokens of a byte-coded row besides its texts: the frame, its begin and its end
_ANSWER = 8
_SHARED = 100  # rows of a case that loads an engine, of which each client has one


def write_work(case: Case, folder: Path, workers: int) -> None:
    """Writes all of the case's files into a new folder."""
    write_run(case, folder, workers)
    job = prepare(load_config(folder / "config.yaml"))
    weights = load_weights(job.config.model, job.architecture, job.config.seed)
    write_folder(job.architecture, weights, {}, folder / "model")
    targets: dict[str, Any] = {t.name: weights[f"{t.name}.weight"] for t in job.architecture.shape.targets}
    np.savez(folder / "targets.npz", **targets)
    batches: dict[str, Any] = _batches(job, case)
    np.savez(folder / "batches.npz", **batches)


def write_run(case: Case, folder: Path, workers: int) -> None:
    """Writes case.json, config.yaml and the rows that it names, which is all that rayfed_sub reads, into a new
    folder."""
    folder.mkdir(parents=True)
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    if case.model is not None:
        (_rows(case) if case.does == TRAIN else _shared_rows()).to_parquet(folder / "rows.parquet")
    (folder / "config.yaml").write_text(yaml.safe_dump(_tree(case, folder, workers), sort_keys=False))


def _tree(case: Case, folder: Path, workers: int) -> dict[str, Any]:
    """rayfed_sub's configuration: only training, no looks at it, no checkpoint before the end."""
    task: dict[str, Any] = {"name": "python-docs", "max_length": case.tokens}
    partition: dict[str, Any] = {"kind": "column"}
    model: dict[str, Any] = {}
    if case.model is not None:
        task |= {"name": "table", "path": str(folder / "rows.parquet"), "prompt": "{question}", "answer": "answer"}
        model = {"path": "random", "random": {"type": "llama", **case.model}}
        own = {"kind": "column", "column": "client"}
        partition = own if case.does == TRAIN else {"kind": "resample", "rows_per_client": 1}
    return {
        "name": f"race-{case.name}",
        "model": model,
        "task": {**task, "mask_prompt": False, "test_share": 0.05},
        "federation": {
            "clients": case.clients,
            "rounds": case.rounds,
            "local_steps": case.steps,
            "batch_size": case.batch,
            "client_weighting": "uniform",
            "partition": partition,
        },
        "method": case.method,
        "optimizer": {"lr": LR, "betas": list(BETAS), "eps": EPS},
        "evaluation": {"every": case.rounds, "eval_rows": 1},
        "diagnostics": {"every": 0},
        "resources": {"workers": workers, "pack_size": case.pack_size},
        "checkpoint": {"every": 0},
    }


def _rows(case: Case) -> pd.DataFrame:
    """Random texts whose rows are `tokens` long each, enough of them that a client meets each batch in one epoch."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choices(string.ascii_letters, k=length))

    per_client = 2 * case.steps * case.batch
    rows = [
        {"client": f"{client:04d}", "question": text(case.tokens - _FRAME - _ANSWER), "answer": text(_ANSWER)}
        for client in range(case.clients)
        for _ in range(per_client)
    ]
    return pd.DataFrame(rows)


def _shared_rows() -> pd.DataFrame:
    texts = [f"{row:02d}" for row in range(_SHARED)]
    return pd.DataFrame({"question": texts, "answer": texts})


def _batches(job: Job, case: Case) -> dict[str, np.ndarray[Any, Any]]:
    """Every batch that rayfed_sub's clients draw, in its order."""
    shape = (case.rounds, case.clients, case.steps, case.batch, case.tokens)
    arrays = {"input_ids": np.full(shape, job.processor.pad), "labels": np.full(shape, IGNORED)}
    for n in range(case.rounds):
        for client in range(case.clients):
            rest = (job.config.seed, client, case.batch, n * case.steps, case.steps, False, job.processor.pad)
            how = job.config.federation.batching
            for step, batch in enumerate(ClientBatches(job.dataset.train, job.dataset.rows_of(client), *rest, how)):
                assert not isinstance(batch, OwnBatch)
                for name, array in arrays.items():
                    rows, tokens = batch[name].shape
                    array[n, client, step, :rows, :tokens] = batch[name].numpy()
    return arrays
