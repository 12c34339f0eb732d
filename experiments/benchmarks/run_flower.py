"""Flower's simulation in this process, on Ray, with two client actors: `run_simulation`, which Flower 1.42 deprecates.

python -m experiments.benchmarks.run_flower WORK OUT WORKERS
"""

from __future__ import annotations

import os

from flwr.simulation import run_simulation

from experiments.benchmarks.flower_app import case, client_app, server_app
from experiments.benchmarks.marks import asked

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
run_simulation(
    server_app,
    client_app,
    num_supernodes=case.clients,
    backend_config={
        "init_args": {"num_cpus": asked()[3], "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    },
)
