"""The paper's second open question: GaLore's memory beside LoRA's, over ranks and numbers of clients.  Writes
memory.csv, memory.svg and its tables in README.md.

    python -m experiments.theory.memory [--show]

All bytes are the engine's plan's (`rayfed-sub plan`) for the paper's three models; nothing is trained.  Each
stands beside its formula.  Legend: m, n layer sizes, r rank, N clients, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from experiments.theory.commands import command
from experiments.theory.pictures import picture
from experiments.theory.sheets import markdown, read, stand, write
from rayfed_sub.config.schema import Config
from rayfed_sub.core.types import Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.planning.traffic import traffic

MODELS = {"gemma-2b": (18, 16384, 2048), "tinyllama": (22, 5632, 2048), "siglip": (27, 4304, 1152)}
"""Target layers, their m and n."""
RANKS, COUNTS, COUNTED = (4, 16, 64), (1, 4, 16, 64, 128), ("tinyllama", 16)
METHODS = ("fedavg", "fedftg", "fedit", "ffa-lora")
KEYS = ("model", "rank", "clients", "method")


def formulas(name: str, m: int, n: int, r: int, clients: int) -> Mapping[str, int]:
    """Bytes a layer, m >= n, AdamW, one projector period in a round.

    kept: a client's between rounds; training: its own tensors, moments and gradients while it trains, besides the
    shared frozen weight; up, down: a round's, from the second on; server: what it holds.
    """
    found = {
        "fedavg": (2 * m * n, 4 * m * n, m * n, m * n, m * n),
        "fedftg": (r * (2 * m + n), r * (4 * m + n), r * (m + n), min(m * n, clients * r * (m + n)), m * n),
        "fedit": (2 * r * (m + n), 4 * r * (m + n), r * (m + n), r * (m + n), r * (m + n)),
        "ffa-lora": (2 * r * m, r * (4 * m + n), r * m, r * m, r * (m + n)),
    }[name]
    return {key: 4 * numbers for key, numbers in zip(("kept", "training", "up", "down", "server"), found, strict=True)}


def row(model: str, rank: int, clients: int, name: str) -> dict[str, Any]:
    """The plan's bytes of one of so many clients in the second round, and which of the formulas they equal."""
    layers, m, n = MODELS[model]
    shape = ModelShape(tuple(Layer(f"layers.{i}", m, n) for i in range(layers)))
    method = build({"name": name, **({} if name == "fedavg" else {"rank": rank})})
    found = traffic(method, shape, Config(), [range(clients)] * 2, lambda client: 10)
    one = found.rounds[1][0]
    keys = {"model": model, "rank": rank, "clients": clients, "method": name}
    history = 8 * layers if name == "fedftg" else 0  # the ranks of its blocks, by round and layer
    planned = {"kept": one.state, "training": one.resident, "up": one.up, "down": one.down}
    planned["server"] = found.server[1] - history
    expected = {key: layers * size for key, size in formulas(name, m, n, rank, clients).items()}
    off = [key for key, size in planned.items() if size != expected[key]]
    return {**keys, **planned, "broadcast": found.broadcast, "off": " ".join(off)}


def tables() -> dict[str, str]:
    """All tables of README.md, from the CSV file."""
    rows = read("memory")
    at = {tuple(row[key] for key in KEYS): row for row in rows}
    clients, cohort = [], []
    for model in MODELS:
        for rank in RANKS:
            galore, lora, ffa = (at[model, rank, 1, name] for name in METHODS[1:])
            cells = [f"{_mb(one['kept'])} / {_mb(one['training'])}" for one in (galore, lora, ffa)]
            ratios = [f"{galore[key] / lora[key]:.3f}" for key in ("kept", "training")]
            clients.append([model, rank, *cells, *ratios, f"{100 * galore['training'] / _dense(at, model):.2g} %"])
    model, rank = COUNTED
    for N in COUNTS:
        for name in METHODS[1:]:
            one = at[model, rank, N, name]
            figures = (one["up"], one["down"], N * one["kept"], one["server"], one["broadcast"])
            cohort.append([N, name, *map(_mb, figures), one["off"] or "none"])
    columns = ("model", "r", "GaLore, kept / training", "LoRA (A and B)", "FFA-LoRA (B)")
    shares = ("GaLore / LoRA, kept", "training", "GaLore / dense AdamW, training")
    sums = ("up, a client", "down, a client", "kept by all clients", "server", "broadcast", "off the formulas")
    return {
        "memory-client": markdown([*columns, *shares], clients),
        "memory-cohort": markdown(["N", "method", *sums], cohort),
    }


def _dense(at: Mapping[tuple[Any, ...], Mapping[str, Any]], model: str) -> int:
    return int(at[model, RANKS[0], 1, "fedavg"]["training"])


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def draw() -> None:
    """memory.svg: memory of training over rank, TinyLlama, and a client's download over N, both by the formulas,
    with the plan's bytes as dots."""
    rows, (model, rank) = read("memory"), COUNTED
    layers, m, n = MODELS[model]
    with picture("memory", 1, 2) as axes:
        left, right = axes.flat
        for name in METHODS:
            ranks, counts = range(4, 129, 4), range(1, 129)
            training = [formulas(name, m, n, r, 1)["training"] for r in ranks]
            down = [formulas(name, m, n, rank, N)["down"] for N in counts]
            style = "--" if name == "ffa-lora" else "-"  # in training it takes what FedFTG takes
            (line,) = left.plot(ranks, layers / 1e6 * np.array(training), style, label=name)
            right.plot(counts, layers / 1e6 * np.array(down), style, label=name)
            own = [row for row in rows if (row["model"], row["method"]) == (model, name)]
            lone = [(row["rank"], row["training"] / 1e6) for row in own if row["clients"] == 1]
            many = [(row["clients"], row["down"] / 1e6) for row in own if row["rank"] == rank]
            for axis, points in ((left, lone), (right, many)):
                if points:
                    axis.plot(*zip(*points, strict=True), "o", color=line.get_color())
        left.set(xlabel="rank", ylabel="a client in training, MB", yscale="log", title=model)
        right.set(
            xlabel="N", ylabel="download of a client and round, MB", title=f"rank {rank}", xscale="log", yscale="log"
        )
        left.legend(fontsize=7)


if __name__ == "__main__":
    if not command(__doc__).parse_args().show:
        torch.set_num_threads(1)
        rows = read("memory")
        there = {tuple(row[key] for key in KEYS) for row in rows}
        points = [(model, rank, 1, name) for model in MODELS for rank in RANKS for name in METHODS]
        points += [(*COUNTED, clients, name) for clients in COUNTS for name in METHODS]
        for point in dict.fromkeys(points):
            if point not in there and (point[3] != "fedavg" or point[1:3] == (RANKS[0], 1)):  # it knows no rank
                rows.append(row(*point))
                write("memory", rows, KEYS)
                print(*rows[-1].values(), flush=True)
    draw()
    stand(tables())
