"""Cost of projecting onto r directions, with similar and with different clients: FedFTG on the convex problem.
Writes projection.csv, projection.svg and its table in README.md.

    python -m experiments.theory.projection [--jobs N] [--show]

The gradient of ten classes has rank 9, so that r = 9 projects nothing away.  Learning rate and rounds are those of
`uneven_clients.py`.  Goes on where it was stopped.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.theory.commands import carry_on, parallel
from experiments.theory.excess_risk import CLIENTS, SEEDS, STEPS, chosen
from experiments.theory.federation import changes, dealt, rounds, weight_of
from experiments.theory.pictures import lines, picture
from experiments.theory.problem import Classifier, digits
from experiments.theory.sheets import markdown, mean_and_spread, read, stand
from experiments.theory.uneven_clients import ALPHAS, ROUNDS
from rayfed_sub.config.schema import Optimizer
from rayfed_sub.methods import build

RANKS = (1, 2, 4, 9)
KEYS = ("alpha", "rank", "seed")


@dataclass(frozen=True)
class Run:
    alpha: float
    rank: int
    seed: int
    lr: float


def carry_out(run: Run) -> dict[str, Any]:
    """Its row.  excess: F(W) - F(W*) at the end.  beyond: share of ||D||^2 of the first round's mean change D that lies
    beyond its r largest singular values, which no single client's change has."""
    import torch

    torch.set_num_threads(1)
    problem, method = digits(), build({"name": "fedftg", "rank": run.rank, "refresh_every": 10})
    parts = dealt(problem, CLIENTS, run.alpha, run.seed)
    share_N = np.array([len(rows) for rows in parts]) / len(problem.y_R)
    model = Classifier(problem)
    shape, optimizer = model.shape, Optimizer(name="sgd", lr=run.lr)
    going = rounds(model, shape, problem, method, parts, [STEPS] * CLIENTS, optimizer, seed=run.seed)
    done = next(going)
    squares = np.linalg.svd(np.tensordot(share_N, np.stack(changes(done)), 1), compute_uv=False) ** 2
    for _ in range(ROUNDS - 1):
        done = next(going)
    figures = {
        "excess": problem.excess(weight_of(method, done.server, shape)),
        "beyond": squares[run.rank :].sum() / squares.sum(),
    }
    return {**asdict(run), **{key: float(f"{value:.6g}") for key, value in figures.items()}}


def todo(rows: Sequence[Mapping[str, Any]]) -> Iterator[Run]:
    """The runs without a row, seed by seed."""
    there, lr = {tuple(row[key] for key in KEYS) for row in rows}, chosen(read("excess_risk"), "sgd", "fedftg")
    points = ((alpha, rank, seed) for seed in SEEDS for alpha in ALPHAS for rank in RANKS)
    return (Run(*point, lr) for point in points if point not in there)


def tables() -> dict[str, str]:
    """The table of README.md, from the CSV file."""
    rows, table = read("projection"), []
    for alpha in ALPHAS:
        groups = [[row for row in rows if (row["alpha"], row["rank"]) == (alpha, rank)] for rank in RANKS]
        excess = [mean_and_spread([row["excess"] for row in group]) for group in groups]
        beyond = [f"{100 * statistics.fmean(row['beyond'] for row in group):.2g} %" for group in groups[:-1]]
        table.append([f"{alpha:g}", *excess, *beyond])
    columns = [*(f"r = {rank}" for rank in RANKS), *(f"beyond r = {rank}" for rank in RANKS[:-1])]
    return {"projection": markdown(["alpha", *columns], table)}


def draw() -> None:
    """projection.svg: excess risk over rank, a line an alpha."""
    rows = read("projection")
    with picture("projection", 1, 1) as axes:
        axis = axes[0, 0]
        for alpha in ALPHAS:
            lines(axis, [(row["rank"], row["excess"]) for row in rows if row["alpha"] == alpha], f"alpha {alpha:g}")
        axis.set(yscale="log", xlabel="rank", ylabel="excess risk", xticks=RANKS)
        axis.legend(fontsize=7)


if __name__ == "__main__":
    given = parallel(__doc__).parse_args()
    if not given.show:
        carry_on("projection", KEYS, todo, carry_out, given.jobs)
    draw()
    stand(tables())
