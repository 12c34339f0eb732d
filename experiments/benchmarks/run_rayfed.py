"""rayfed_sub, as a user runs it from Python.

python -m experiments.benchmarks.run_rayfed WORK OUT WORKERS
"""

from __future__ import annotations

from typing import Any

from experiments.benchmarks.cases import TRAIN
from experiments.benchmarks.marks import Marks, asked
from rayfed_sub import load_config, run
from rayfed_sub.storage import checkpoints
from rayfed_sub.telemetry.events import RoundDone, Started

case, work, out, _ = asked()
marks = Marks(case)


def listen(record: Any) -> None:
    """Marks the ends of rounds."""
    if isinstance(record, Started | RoundDone):
        marks.mark()


# The configuration names a pack size for earlier states of this project, which find none themselves.
found_by_itself = ["resources.pack_size=auto"] if case.does == TRAIN else []
run(load_config(work / "config.yaml", found_by_itself), out / "run", listen)
found = checkpoints.read(out / "run")
assert found is not None
weights = {name: x.numpy() for name, x in found.server.items() if name.endswith("/weight")}
marks.leave(out, {name.removesuffix("/weight"): weight for name, weight in weights.items()})
