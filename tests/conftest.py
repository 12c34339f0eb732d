"""One Ray session for the whole test run: 4 CPUs and 1 GPU as counters, so that placement can be tested anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# The tests' matrices are tiny: more threads only wait for each other.  Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=1_000_000_000,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()
