"""rayfed_sub under a load.

python -m experiments.benchmarks.run_rayfed_load LOAD OUT WORKERS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.benchmarks.loads import Load
from experiments.benchmarks.readings import Readings
from rayfed_sub import load_config, run
from rayfed_sub.telemetry.events import RoundDone, Started

_ROWS = 100  # of which each client has one

load, out = Load(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
readings = Readings()


def listen(record: Any) -> None:
    """The journal, as it comes."""
    if isinstance(record, Started | RoundDone):
        readings.take()


texts = [f"{row:02d}" for row in range(_ROWS)]
pd.DataFrame({"question": texts, "answer": texts}).to_parquet(out / "rows.parquet")
tree = {
    "name": "load",
    "model": {"path": "random", "random": {"type": "llama", **load.model}},
    "task": {"name": "table", "path": str(out / "rows.parquet"), "prompt": "{question}", "answer": "answer"},
    "federation": {
        "clients": load.clients,
        "rounds": load.rounds,
        "local_steps": 1,
        "batch_size": 1,
        "partition": {"kind": "resample", "rows_per_client": 1},
    },
    "method": load.method,
    "evaluation": {"every": load.rounds, "eval_rows": 1},
    "diagnostics": {"every": 0},
    "resources": {"workers": int(sys.argv[3]), "pack_size": load.pack_size},
    "checkpoint": {"every": 0},
}
run(load_config(tree), out / "run", listen)
readings.leave(out)
