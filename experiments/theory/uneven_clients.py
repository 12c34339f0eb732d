"""The paper's third open question: heterogeneous data and compute at once.  Writes uneven_clients.csv,
uneven_clients.svg and its tables in README.md.

    python -m experiments.theory.uneven_clients [--jobs N] [--show]

The convex problem of `excess_risk.py`, whose learning rates it takes: partitions from all but IID to very uneven ones,
local steps from equal to 15 times as many, always 8 on average, with and without FedNova
(`federation.normalise_steps`).  Goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.theory.commands import carry_on, parallel
from experiments.theory.excess_risk import CLIENTS, METHODS, SEEDS, chosen
from experiments.theory.federation import dealt, rounds, weight_of
from experiments.theory.pictures import lines, picture
from experiments.theory.problem import Classifier, digits
from experiments.theory.sheets import markdown, mean_and_spread, read, stand
from rayfed_sub.config.schema import Optimizer
from rayfed_sub.methods import build

ALPHAS, ROUNDS = (0.1, 1.0, 100.0), 48
SPREADS: Mapping[str, tuple[int, ...]] = {"equal": (8,), "1 and 15": (1, 15)}
"""federation.local_steps: client i has entry i modulo the length."""
COMPARED = ("fedavg", "fedftg", "fedit")
KEYS = ("method", "alpha", "spread", "normalised", "seed")


@dataclass(frozen=True)
class Run:
    method: str
    alpha: float
    spread: str
    normalised: int
    seed: int
    lr: float


def carry_out(run: Run) -> dict[str, Any]:
    """Its row.  excess: F(W) - F(W*) at the end.  tilted: the same for the objective that weighs clients by rows and
    steps, F_t = sum_k p_k tau_k F_k / sum_k p_k tau_k, at the same W: towards its optimum uneven steps pull.
    pull: F(W_t*) - F(W*), the excess risk of that optimum.  distance: ||W - W*||_F."""
    import torch

    torch.set_num_threads(1)
    problem, method = digits(), build({"name": run.method, **METHODS[run.method]})
    parts = dealt(problem, CLIENTS, run.alpha, run.seed)
    entries = SPREADS[run.spread]
    steps = [entries[k % len(entries)] for k in range(CLIENTS)]
    model = Classifier(problem)
    shape, optimizer = model.shape, Optimizer(name="sgd", lr=run.lr)
    going = rounds(
        model, shape, problem, method, parts, steps, optimizer, seed=run.seed, normalise_steps=bool(run.normalised)
    )
    try:
        for _ in range(ROUNDS):
            last = next(going)
    except ArithmeticError:
        return {**asdict(run), "excess": None, "distance": None, "tilted": None, "pull": None}
    W_mn = weight_of(method, last.server, shape)
    tilted = problem.weighed(parts, steps)
    figures = {
        "excess": problem.excess(W_mn),
        "distance": float(np.linalg.norm(W_mn - problem.optimum)),
        "tilted": tilted.excess(W_mn),
        "pull": problem.excess(tilted.optimum),
    }
    return {**asdict(run), **{key: float(f"{value:.6g}") for key, value in figures.items()}}


def todo(rows: Sequence[Mapping[str, Any]]) -> Iterator[Run]:
    """The runs without a row, seed by seed; equal steps need no FedNova."""
    there, tuned = {tuple(row[key] for key in KEYS) for row in rows}, read("excess_risk")
    for seed in SEEDS:
        for name in COMPARED:
            lr = chosen(tuned, "sgd", name)
            for alpha in ALPHAS:
                for spread in SPREADS:
                    for normalised in (0, 1) if len(SPREADS[spread]) > 1 else (0,):
                        if (name, alpha, spread, normalised, seed) not in there:
                            yield Run(name, alpha, spread, normalised, seed, lr)


def tables() -> dict[str, str]:
    """The table of README.md, from the CSV file."""
    rows, table = read("uneven_clients"), []
    for name in COMPARED:
        for alpha in ALPHAS:
            own = [row for row in rows if (row["method"], row["alpha"]) == (name, alpha)]
            even, plain, nova = (
                [row for row in own if (row["spread"], row["normalised"]) == point and row["excess"] is not None]
                for point in (("equal", 0), ("1 and 15", 0), ("1 and 15", 1))
            )
            figures = ((even, "excess"), (plain, "excess"), (nova, "excess"), (plain, "tilted"), (plain, "pull"))
            cells = [mean_and_spread([row[key] for row in group]) for group, key in figures]
            table.append([name, f"{alpha:g}", *cells])
    columns = ("equal steps", "1 and 15", "1 and 15, FedNova", "1 and 15, of the tilted F", "F at the tilted optimum")
    return {"uneven-clients": markdown(["method", "alpha", *columns], table)}


def draw() -> None:
    """uneven_clients.svg: excess risk over alpha, a panel a method."""
    rows = read("uneven_clients")
    with picture("uneven_clients", 1, len(COMPARED)) as axes:
        for axis, name in zip(axes.flat, COMPARED, strict=True):
            for spread in SPREADS:
                for normalised in (0, 1) if spread != "equal" else (0,):
                    own = [row for row in rows if row["method"] == name and row["spread"] == spread]
                    own = [row for row in own if row["normalised"] == normalised and row["excess"] is not None]
                    lines(axis, [(row["alpha"], row["excess"]) for row in own], spread + ", FedNova" * normalised)
            axis.set(xscale="log", yscale="log", xlabel="alpha", ylabel="excess risk", title=name)
        axes.flat[0].legend(fontsize=7)


if __name__ == "__main__":
    given = parallel(__doc__).parse_args()
    if not given.show:
        carry_on("uneven_clients", KEYS, todo, carry_out, given.jobs)
    draw()
    stand(tables())
