"""A round's work at the server besides training: the updates of many clients added up, and the ranks of the change.

    python -m experiments.benchmarks.server [--before TREE] [--clients N] [--method NAME] [--turns N]

The layers have TinyLlama-1.1B's shapes: 22 of 5,632 x 2,048; every client sends factors of rank 8.

--before: a checkout of an earlier state, which takes turns with this one, each turn in a process of its own.

fold    seconds of `accumulate` for all clients and of `aggregate`
ranks   seconds of the ranks of all layers' changes, as diagnosed in a round
peak    memory of the process; 1 GB are pretrained weights, and as much the server's
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS, M, N, RANK = 22, 5632, 2048, 8


def measured(method_name: str, clients: int) -> dict[str, float]:
    """One round in this process, by the package that it finds."""
    import torch

    from rayfed_sub.core.types import Layer, ModelShape, Update
    from rayfed_sub.diagnostics import server_change
    from rayfed_sub.methods import build

    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    shape = ModelShape(tuple(Layer(f"model.layers.{i}.mlp.up_proj", M, N) for i in range(LAYERS)))
    weights = {f"{layer.name}/weight": torch.randn(M, N, generator=draw).mul_(0.02) for layer in shape.targets}
    method = build({"name": method_name, "rank": RANK})
    server = method.init_server(weights, shape, 0)
    total, fold = method.accumulator(server, shape), 0.0
    for client in range(clients):
        tensors = {}
        for layer in shape.targets:
            tensors[f"{layer.name}/left"] = torch.randn(M, RANK, generator=draw).mul_(1e-3)
            tensors[f"{layer.name}/right"] = torch.randn(RANK, N, generator=draw).mul_(N**-0.5)
        began = time.perf_counter()
        total = method.accumulate(total, Update(client, 1.0, tensors, {}), shape)
        fold += time.perf_counter() - began
    began = time.perf_counter()
    after = method.aggregate(server, total, shape)
    folded = time.perf_counter()
    fold += folded - began
    ranks = {layer.name: clients * RANK for layer in shape.targets}
    old, new = method.model(server, shape), method.model(after, shape)
    if hasattr(server_change, "server_changes"):
        server_change.server_changes(old, new, lambda name: weights[f"{name}/weight"], ranks, dense=True, sums=True)
    else:  # before 2026-11-30: one layer after the other
        for name, rank in ranks.items():
            server_change.server_change(old[name], new[name], weights[f"{name}/weight"], rank, dense=True)
    return {
        "fold": fold,
        "ranks": time.perf_counter() - folded,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="TREE")
    parser.add_argument("--clients", type=int, default=100, metavar="N")
    parser.add_argument("--method", default="fedftg", metavar="NAME")
    parser.add_argument("--turns", type=int, default=3, metavar="N")
    parser.add_argument("--once", action="store_true", help="measure here and print the figures as JSON")
    given = parser.parse_args()
    if given.once:
        print(json.dumps(measured(given.method, given.clients)))
        return
    trees = {"now": ROOT} | ({"before": given.before.absolute()} if given.before is not None else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(given.turns):
        for name, tree in trees.items():
            command = [sys.executable, __file__, "--once", "--method", given.method, "--clients", str(given.clients)]
            there = {**os.environ, "PYTHONPATH": str(tree)}
            answer = subprocess.run(command, cwd=tree, env=there, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[name].append(json.loads(answer.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    for figure in ("fold", "ranks", "peak"):
        medians = {name: statistics.median(one[figure] for one in own) for name, own in found.items()}
        ratio = f", {medians['before'] / medians['now']:.2f}x" if "before" in medians else ""
        print(figure, {name: f"{value:.4g}" for name, value in medians.items()}, ratio)


if __name__ == "__main__":
    main()
