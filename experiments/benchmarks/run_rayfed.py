"""rayfed_sub, with a reading between rounds, in two processes as `rayfed-sub run` has them.

python -m experiments.benchmarks.run_rayfed WORK OUT WORKERS
"""

from __future__ import annotations

import sys
from typing import Any

from rayfed_sub.runtime.front import drive, front_of_this_process


def main() -> None:
    """Runs what lies in WORK; leaves readings and weights in OUT."""
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


if __name__ == "__main__":
    front = front_of_this_process()
    if front is None and (code := drive(__file__, sys.argv)) is not None:
        sys.exit(code)
    main()
    if front is not None:
        front.ended(0)
