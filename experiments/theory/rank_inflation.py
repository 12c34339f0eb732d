"""The paper's first open question: growth of the mean change's rank with the number of clients, from all but IID to
very uneven data.  Writes rank_inflation.csv, rank_inflation.svg and its tables in README.md.

    python -m experiments.theory.rank_inflation [--show]

Digits through fixed random features, 64 to 256, into a target layer (128, 256), so that N r stays below min(m, n) up
to N = 32 at rank 4.  The figures are the engine's own diagnostics of all clients.  Goes on where it was stopped.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.theory.commands import command
from experiments.theory.exponents import exponent
from experiments.theory.federation import rounds
from experiments.theory.pictures import lines, picture
from experiments.theory.problem import Logits, Problem, digits
from experiments.theory.sheets import markdown, read, stand, write
from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.lowrank import spectrum
from rayfed_sub.core.rng import stream
from rayfed_sub.core.schemas import CohortLayer
from rayfed_sub.core.types import Layer, ModelShape
from rayfed_sub.data import partitions
from rayfed_sub.data.rows import Ints
from rayfed_sub.diagnostics.client_change import client_change
from rayfed_sub.diagnostics.cohort import diagnose
from rayfed_sub.methods import build

RANK, STEPS, ROUNDS, BATCH, SEEDS = 4, 8, 4, 32, range(5)
ALPHAS, COUNTS = (0.05, 0.1, 0.5, 1.0, 10.0, 100.0), (2, 4, 8, 16, 32, 64)
METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedftg": {"rank": RANK, "refresh_every": STEPS},  # a new basis at the beginning of every round
    "fedit": {"rank": RANK, "alpha": 2.0 * RANK},
}
RATE = 0.003
KEYS = ("method", "alpha", "clients", "seed")
FIGURES = ("rank_sum", "rank", "effective_rank", "stable_rank", "truncated", "overlap", "agreement", "drift")


class Features(nn.Module):
    """Fixed random features (256), the target `layer` (128, 256), a fixed random readout; ReLU between."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.shape = ModelShape((Layer("layer", 128, 256),))
        self.features, self.layer, self.readout = (_drawn(*size) for size in ((256, 64), (128, 256), (10, 128)))

    def forward(self, pixels: Tensor) -> Logits:
        return Logits(self.readout(functional.relu(self.layer(functional.relu(self.features(pixels))))))


def _drawn(m: int, n: int) -> nn.Linear:
    linear = nn.Linear(n, m, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.from_numpy(stream(0, "features", m, n).standard_normal((m, n)) * (2 / n) ** 0.5))
    return linear


def dealt(problem: Problem, clients: int, alpha: float, seed: int) -> list[Ints]:
    """Each client's rows, of the clients that get any.  Of 64 clients at alpha 0.05 many get none, and the engine
    would refuse the partition: hence its inner draw."""
    return [rows for rows in partitions.dirichlet([str(y) for y in problem.y_R], clients, alpha, seed) if len(rows)]


def carry_out(problem: Problem, name: str, alpha: float, clients: int, seed: int) -> list[dict[str, Any]]:
    """A row for the first round and one for the last.

    present: clients with rows.  after_rank, after_effective_rank: of W - W_0 after the round.
    """
    parts, method, model = dealt(problem, clients, alpha, seed), build({"name": name, **METHODS[name]}), Features()
    (layer,) = model.shape.targets
    begun = model.layer.weight.clone()
    steps, optimizer = [STEPS] * len(parts), Optimizer(lr=RATE)
    going = rounds(model, model.shape, problem, method, parts, steps, optimizer, seed=seed, batch_size=BATCH)
    found = []
    for number, done in enumerate(islice(going, ROUNDS), 1):
        if number not in (1, ROUNDS):
            continue
        moved = [client_change(layer, start, result) for start, result in zip(done.starts, done.results, strict=True)]
        watched = [(k, float(len(rows)), own) for k, (rows, own) in enumerate(zip(parts, moved, strict=True)) if own]
        cohort: CohortLayer = diagnose(number, layer, watched)[1]
        W_mn = method.model(done.server, model.shape)["layer"].apply(begun)
        after = spectrum(torch.linalg.svdvals((W_mn - begun).double()), max(layer.m, layer.n))
        row = {"method": name, "alpha": alpha, "clients": clients, "seed": seed, "present": len(parts), "round": number}
        row |= {key: getattr(cohort, key) for key in FIGURES}
        row |= {"after_rank": after.rank, "after_effective_rank": after.effective_rank}
        found.append({key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in row.items()})
    return found


def todo(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, int, int]]:
    """The runs without rows, seed by seed."""
    there = {tuple(row[key] for key in KEYS) for row in rows}
    for seed in SEEDS:
        for name in METHODS:
            for alpha in ALPHAS:
                for clients in COUNTS:
                    if (name, alpha, clients, seed) not in there:
                        yield name, alpha, clients, seed


def tables() -> dict[str, str]:
    """All tables of README.md, from the CSV file."""
    rows = read("rank_inflation")
    first = [row for row in rows if row["round"] == 1]
    numeric, effective = [], []
    for name in METHODS:
        for alpha in ALPHAS:
            own = [row for row in first if (row["method"], row["alpha"]) == (name, alpha)]
            at = {N: [row for row in own if row["clients"] == N] for N in COUNTS}
            cells = [f"{_mean(r, 'rank')} of {_mean(r, 'rank_sum')}" for r in at.values()]
            numeric.append([name, f"{alpha:g}", *cells, _mean(at[64], "present")])
            growth = exponent([(row["seed"], row["present"], row["effective_rank"]) for row in own])
            effective.append([name, f"{alpha:g}", *(_mean(r, "effective_rank", 1) for r in at.values()), growth])
    counts = [f"N = {N}" for N in COUNTS]
    return {
        "rank-numerical": markdown(["method", "alpha", *counts, "with rows, of 64"], numeric),
        "rank-effective": markdown(["method", "alpha", *counts, "exponent over clients with rows"], effective),
        "rank-cohort": _cohorts(rows),
    }


def _cohorts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The engine's other diagnostics of 16 clients, first round and last."""
    table = []
    for name in METHODS:
        for alpha in ALPHAS:
            group = (name, alpha, 16)
            own = [row for row in rows if (row["method"], row["alpha"], row["clients"]) == group]
            for number in (1, ROUNDS):
                at = [row for row in own if row["round"] == number]
                figures = [_mean(at, key, 2) for key in ("overlap", "agreement", "drift", "truncated", "stable_rank")]
                after = (_mean(at, "after_rank"), _mean(at, "after_effective_rank", 1))
                table.append([name, f"{alpha:g}", number, *figures, *after])
    columns = ("method", "alpha", "round", "overlap", "agreement", "drift", "truncated", "stable rank")
    return markdown([*columns, "rank of W - W0", "its effective rank"], table)


def _mean(rows: Sequence[Mapping[str, Any]], key: str, digits_after: int = 0) -> str:
    return f"{statistics.fmean(row[key] for row in rows):.{digits_after}f}"


def draw() -> None:
    """rank_inflation.svg: effective and numerical rank of the first round's mean change over N, a line an alpha."""
    first = [row for row in read("rank_inflation") if row["round"] == 1]
    with picture("rank_inflation", 2, len(METHODS)) as axes:
        for down, key in enumerate(("effective_rank", "rank")):
            for axis, name in zip(axes[down], METHODS, strict=True):
                for alpha in ALPHAS:
                    own = [row for row in first if (row["method"], row["alpha"]) == (name, alpha)]
                    lines(axis, [(row["clients"], row[key]) for row in own], f"alpha {alpha:g}")
                axis.plot(COUNTS, [min(128, RANK * N) for N in COUNTS], "k:", label="min(128, N r)")
                axis.set(yscale="log", xlabel="N", ylabel=key.replace("_", " "), title=name)
                axis.set_xscale("log", base=2)
        axes[0, 0].legend(fontsize=7)


if __name__ == "__main__":
    if not command(__doc__).parse_args().show:
        torch.set_num_threads(1)
        rows, problem = read("rank_inflation"), digits()
        for point in [*todo(rows)]:
            rows += carry_out(problem, *point)
            write("rank_inflation", rows, (*KEYS, "round"))
            print(*point, rows[-1]["rank"], rows[-1]["effective_rank"], flush=True)
    draw()
    stand(tables())
