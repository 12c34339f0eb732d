"""What every contestant leaves: when its rounds began and ended, and the weights that it ended with."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.cases import CASES, Case


def asked() -> tuple[Case, Path, Path]:
    """The command line of every contestant: case, folder of the work, folder for what it leaves; the number of workers
    comes last, for those that are not told otherwise."""
    name, work, out = sys.argv[1:4]
    return CASES[name], Path(work), Path(out)


class Marks:
    """Seconds since 1970: when the first round began, then the end of each."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def mark(self) -> None:
        """Now."""
        self.times.append(time.time())

    def leave(self, out: Path, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Writes marks.json and weights.npz: by name of the module, (m, n) float32."""
        arrays: dict[str, Any] = dict(weights)
        np.savez(out / "weights.npz", **arrays)
        (out / "marks.json").write_text(json.dumps(self.times))
