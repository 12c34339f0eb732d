"""The bare loop: one process, one model, the clients in turn, no engine.

python -m experiments.benchmarks.run_bare WORK OUT WORKERS
"""

from __future__ import annotations

import numpy as np

from experiments.benchmarks.local import Local
from experiments.benchmarks.marks import Marks, asked

case, work, out, _ = asked()
local, marks = Local(case, work), Marks(case)
weights = local.weights()
marks.mark()
for n in range(case.rounds):
    sums = [np.zeros_like(weight) for weight in weights]
    for client in range(case.clients):
        local.set_weights(weights)
        local.train(n, client)
        sums = [total + weight for total, weight in zip(sums, local.weights(), strict=True)]
    weights = [total / case.clients for total in sums]
    marks.mark()
marks.leave(out, local.named(weights))
