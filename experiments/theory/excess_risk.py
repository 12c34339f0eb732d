"""The paper's two bounds on the excess risk beside the excess risk on a convex problem.  Writes excess_risk.csv,
reach.csv, excess_risk.svg and its tables in README.md.

    python -m experiments.theory.excess_risk [--jobs N] [--show]

Goes on where it was stopped; --show runs nothing.  Learning rates are tuned first, with a partition that no other run
has, and then fixed, as the theory has them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.theory.commands import parallel, processes
from experiments.theory.exponents import exponent
from experiments.theory.federation import as_array, changes, dealt, rounds, weight_of
from experiments.theory.pictures import lines, picture
from experiments.theory.problem import Classifier, Floats, digits
from experiments.theory.sheets import markdown, mean_and_spread, read, stand, write
from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Layer
from rayfed_sub.methods import build
from rayfed_sub.methods.lora import lora_right

RANK, ALPHA, SEEDS, TUNING_SEED = 4, 0.1, range(5), 100
CLIENTS, STEPS, ROUNDS, TOTAL = 8, 8, 16, 512
"""The reference: clients, local steps and rounds where another of them varies; local steps in all."""
SLICES = (
    f"t_agg, S = {ROUNDS}",
    f"S, t_agg = {STEPS}",
    f"N, S = {ROUNDS}, t_agg = {STEPS}",
    f"t_agg, S t_agg = {TOTAL}",
)
LORA = {"rank": RANK, "alpha": float(RANK)}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {},
    "fedftg": {"rank": RANK, "refresh_every": 10},
    "ffa-lora": LORA,
    "fedit": LORA,
    "flexlora": LORA,
}
RATES = {
    "fedavg": (0.025, 0.05, 0.1, 0.2, 0.4),
    "fedftg": (0.025, 0.05, 0.1, 0.2, 0.4),
    "ffa-lora": (0.25, 0.5, 1.0, 2.0),
    "fedit": (0.015625, 0.03125, 0.0625, 0.125),
    "flexlora": (0.03125, 0.0625, 0.125, 0.25),
}
ADAMW_RATES = (0.0001, 0.001, 0.01, 0.1)
T_AGG = (1, 2, 4, 8, 16, 32, 64)
COUNTS = (2, 4, 16, 32)
ADAMW = ("fedavg", "fedftg", "ffa-lora")
FIGURES = ("excess", "moved", "drift", "missed", "slope")
Row = Mapping[str, Any]
KEYS = ("sweep", "optimizer", "method", "lr", "seed", "clients", "t_agg")


@dataclass(frozen=True, order=True)
class Run:
    """One federated run.  sweep: its purpose; rounds: their number; the rest as in the engine's configuration."""

    sweep: str
    optimizer: str
    method: str
    lr: float
    seed: int
    clients: int
    t_agg: int
    rounds: int


def carry_out(run: Run) -> list[dict[str, Any]]:
    """A row after each power of two of rounds; one without figures for the last round where it diverged.

    excess: F(W) - F(W*).  moved: ||W||, which begins at zero.  drift: sqrt(sum p_k ||D_k - D||^2) of the round's own
    changes D_k and their mean D; missed: ||W' - W - D|| / ||D||, what averaging factors or truncating loses.
    slope: the largest ||grad F_k(W)|| with which the round began.
    """
    import torch

    torch.set_num_threads(1)
    problem, method = digits(), build({"name": run.method, **METHODS[run.method]})
    parts = dealt(problem, run.clients, ALPHA, run.seed)
    own = [problem.of_rows(rows) for rows in parts]
    share_N = np.array([len(rows) for rows in parts]) / len(problem.y_R)
    optimizer = Optimizer(name="sgd" if run.optimizer == "sgd" else "adamw", lr=run.lr)
    model = Classifier(problem)
    shape, steps = model.shape, [run.t_agg] * run.clients
    going = rounds(model, shape, problem, method, parts, steps, optimizer, seed=run.seed)
    own_keys = asdict(run)
    W_mn: Floats = 0 * problem.optimum
    rows: list[dict[str, Any]] = []
    for number in range(1, run.rounds + 1):
        try:
            done = next(going)
        except ArithmeticError:
            return [*rows, {**own_keys, **dict.fromkeys(FIGURES)}]
        before, W_mn = W_mn, weight_of(method, done.server, shape)
        if number & (number - 1) and number != run.rounds:
            continue
        D_Nmn = np.stack(changes(done))
        D_mn = np.tensordot(share_N, D_Nmn, 1)
        figures = (
            problem.excess(W_mn),
            np.linalg.norm(W_mn),
            np.sqrt(share_N @ ((D_Nmn - D_mn) ** 2).sum((1, 2))),
            np.linalg.norm(W_mn - before - D_mn) / np.linalg.norm(D_mn),
            max(np.linalg.norm(one.gradient(before)) for one in own),
        )
        values = (float(f"{figure:.6g}") for figure in figures)
        rows.append({**own_keys, "rounds": number, **dict(zip(FIGURES, values, strict=True))})
    return rows


def tuning(methods: Sequence[str]) -> Iterator[Run]:
    """The runs that choose the learning rates, on a partition of their own."""
    for name in methods:
        for lr in RATES[name]:
            yield Run("tuning", "sgd", name, lr, TUNING_SEED, CLIENTS, STEPS, TOTAL // STEPS)
    for name in ADAMW:
        for lr in ADAMW_RATES:
            yield Run("tuning", "adamw", name, lr, TUNING_SEED, CLIENTS, STEPS, TOTAL // STEPS // 2)


def chosen(rows: Sequence[Row], optimizer: str, method: str) -> float:
    """The learning rate with the lowest excess risk at the end of its tuning run; one that diverged is out.

    Raises LookupError where nothing was tuned."""
    own = [r for r in rows if (r["sweep"], r["optimizer"], r["method"]) == ("tuning", optimizer, method)]
    if not own:
        raise LookupError("no tuned learning rates: run excess_risk.py first")
    last = max(row["rounds"] for row in own)
    ends = {row["lr"]: row["excess"] for row in own if row["rounds"] == last and row["excess"] is not None}
    return float(min(ends, key=lambda lr: ends[lr]))


def counted(rows: Sequence[Row]) -> Iterator[Run]:
    """The runs that count, seed by seed."""
    rate = {name: chosen(rows, "sgd", name) for name in METHODS}
    for seed in SEEDS:
        for name, lr in rate.items():
            for t in T_AGG:
                yield Run("t_agg", "sgd", name, lr, seed, CLIENTS, t, TOTAL // t)
            for clients in COUNTS:
                yield Run("clients", "sgd", name, lr, seed, clients, STEPS, ROUNDS)
            for shrink in (1e-1, 1e-2, 1e-3):
                yield Run("small", "sgd", name, float(f"{lr * shrink:g}"), seed, CLIENTS, 1, 1)
    for seed in SEEDS[:3]:
        for name in ADAMW:
            for t in (1, 4, 16, 64):
                yield Run("t_agg", "adamw", name, chosen(rows, "adamw", name), seed, CLIENTS, t, TOTAL // 2 // t)


def carry_out_all(todo: Sequence[Run], pool: ProcessPoolExecutor, rows: list[dict[str, Any]]) -> None:
    """Carries out the runs without rows and writes the table after each."""
    there = {tuple(row[key] for key in KEYS) for row in rows}
    left = {pool.submit(carry_out, run): run for run in todo if tuple(asdict(run)[key] for key in KEYS) not in there}
    for done in as_completed(left):
        rows += done.result()
        write("excess_risk", rows, (*KEYS, "rounds"))
        print(*asdict(left[done]).values(), rows[-1]["excess"], flush=True)


def write_reach() -> None:
    """reach.csv: the excess risk of zero, the lowest found for rank RANK by start, and that of each seed's frozen A."""
    problem, shape = digits(), (10, 64)
    rows = [{"what": "zero", "which": 0, "excess": problem.excess(np.zeros(shape))}]
    for k, end in enumerate(problem.ends_of_rank(RANK, 4)):
        rows.append({"what": "rank", "which": k, "excess": end})
    for seed in (*SEEDS, TUNING_SEED):
        right = as_array(lora_right(Layer("layer", *shape), RANK, seed))
        rows.append({"what": "frozen A", "which": seed, "excess": problem.best_within(right)})
    write("reach", [{**row, "excess": float(f"{row['excess']:.6g}")} for row in rows], ("what", "which"))


def reached(name: str, seed: int) -> float:
    """The lowest excess risk of a method: 0, or that of its rank, or of its frozen A."""
    limits = {"ffa-lora": ("frozen A", seed), "fedit": ("rank", None), "flexlora": ("rank", None)}
    if name not in limits:
        return 0.0
    what, which = limits[name]
    return min(float(row["excess"]) for row in read("reach") if row["what"] == what and which in (None, row["which"]))


def of(rows: Sequence[Row], name: str, optimizer: str = "sgd", sweep: str = "t_agg") -> list[Row]:
    """A method's rows of one sweep that did not diverge."""
    own = (row for row in rows if (row["sweep"], row["optimizer"], row["method"]) == (sweep, optimizer, name))
    return [row for row in own if row["excess"] is not None]


def slices(rows: Sequence[Row], name: str) -> list[list[tuple[int, float, Row]]]:
    """(seed, x, row) of the four slices, in the order of SLICES; x is what varies."""
    own = of(rows, name)
    many = [*of(rows, name, sweep="clients"), *own]
    return [
        [(row["seed"], row["t_agg"], row) for row in own if row["rounds"] == ROUNDS],
        [(row["seed"], row["rounds"], row) for row in own if row["t_agg"] == STEPS],
        [(row["seed"], row["clients"], row) for row in many if (row["t_agg"], row["rounds"]) == (STEPS, ROUNDS)],
        [(row["seed"], row["t_agg"], row) for row in own if row["t_agg"] * row["rounds"] == TOTAL],
    ]


def exponents_table(rows: Sequence[Row]) -> str:
    """Exponents of the excess risk, whole and above the method's own limit, and of the part that t_agg adds."""
    table = []
    for above in (False, True):
        for name in METHODS:
            reach = {seed: reached(name, seed) if above else 0.0 for seed in SEEDS}
            if above and not reach[0]:
                continue
            own = [[(seed, x, row["excess"] - reach[seed]) for seed, x, row in one] for one in slices(rows, name)]
            least = {seed: y for seed, x, y in own[-1] if x == 1}
            added = [(seed, x, y - least[seed]) for seed, x, y in own[-1] if x > 1]
            table.append([name + ", above its reach" * above, *map(_exponent, own), "" if above else _exponent(added)])
    table.append(["bound of GaLore and averaging", "+1", "+1", "0", "0", ""])
    table.append(["bound of FFA-LoRA", "+2", "+2", "+2", "0", ""])
    return markdown(["excess risk over", *SLICES, "the same, less that of t_agg = 1"], table)


def _exponent(points: Sequence[tuple[int, float, float]]) -> str:
    return str(exponent(points)) if min(y for _, _, y in points) > 0 else "not always above 0"


def equal_table(rows: Sequence[Row]) -> str:
    """Excess risk after equally many local steps."""
    table, shown = [], (1, 4, 16, 64)
    for optimizer, names, total in (("sgd", METHODS, TOTAL), ("adamw", ADAMW, TOTAL // 2)):
        for name in names:
            own = [row for row in of(rows, name, optimizer) if row["t_agg"] * row["rounds"] == total]
            lr = f"{own[0]['lr']:g}{_edge(name, optimizer, own[0]['lr'])}"
            reach = mean_and_spread([reached(name, seed) for seed in SEEDS]) if reached(name, 0) else "0"
            cells = [mean_and_spread([row["excess"] for row in own if row["t_agg"] == t]) for t in shown]
            table.append([name, optimizer, lr, total, reach, *cells])
    columns = ["method", "optimizer", "lr", "S t_agg", "can reach"]
    return markdown([*columns, *(f"t_agg = {t}" for t in shown)], table)


def drift_table(rows: Sequence[Row]) -> str:
    """Distance between clients in the first round, and of the global model from its beginning."""
    table = []
    for name in METHODS:
        own = of(rows, name)
        first = [(row["seed"], row["t_agg"], row["drift"]) for row in own if row["rounds"] == 1]
        moved = [(row["seed"], row["rounds"] * row["t_agg"], row["moved"]) for row in own]
        early = [point for point in moved if point[1] <= 16]
        missed = [row["missed"] for row in own if (row["t_agg"], row["rounds"]) == (STEPS, ROUNDS)]
        table.append([name, exponent(first), exponent(early), exponent(moved), f"{statistics.fmean(missed):.2g}"])
    columns = ("method", "drift of round 1 over t_agg", "norm of W over S t_agg, to 16", f"... to {TOTAL}")
    return markdown([*columns, f"missed, S = {ROUNDS}, t_agg = {STEPS}"], table)


def bounds_table(rows: Sequence[Row]) -> str:
    """The bounds without the terms of unknown constants, D the largest client gradient of the runs.

    Thm 2: alpha D^2 S t_agg (+ c).  Thm 1: alpha D S t_agg ||W*||^2 (+ c alpha D^2 N^2 S^2 t_agg^2).
    """
    square, table = float((digits().optimum ** 2).sum()), []
    for name, theorem in (("fedavg", 2), ("fedftg", 2), ("ffa-lora", 1)):
        own = [*of(rows, name), *of(rows, name, sweep="clients"), *of(rows, name, sweep="small")]
        rates = sorted({row["lr"] for row in own}, reverse=True)
        for lr in rates:
            group = [row for row in own if row["lr"] == lr]
            D = max(row["slope"] for row in group)
            ratios, missing = [], []
            for row in group:
                way = lr * D * row["rounds"] * row["t_agg"]
                bound = way * (D if theorem == 2 else square)
                unit = 1.0 if theorem == 2 else way * D * row["clients"] ** 2 * row["rounds"] * row["t_agg"]
                ratios.append(bound / row["excess"])
                missing.append(max(row["excess"] - bound, 0) / unit)
            what = "all" if lr == rates[0] else "S = t_agg = 1"
            above = f"{sum(gap > 0 for gap in missing)} of {len(group)}"
            figures = (f"{x:.3g}" for x in (lr, D, min(ratios), max(ratios), max(missing)))
            alpha, *rest = figures
            table.append([name, f"Thm {theorem}", alpha, what, *rest, above])
    columns = ("method", "bound", "alpha", "states", "D", "least bound / excess", "largest", "c that it takes")
    return markdown([*columns, "states above it with c = 0"], table)


def _edge(name: str, optimizer: str, lr: float) -> str:
    """A mark for a rate at the edge of its grid."""
    grid = RATES[name] if optimizer == "sgd" else ADAMW_RATES
    return " (edge)" if lr in (grid[0], grid[-1]) else ""


def tables() -> dict[str, str]:
    """All tables of README.md, from the CSV files."""
    rows = read("excess_risk")
    return {
        "excess-exponents": exponents_table(rows),
        "excess-equal-steps": equal_table(rows),
        "excess-drift": drift_table(rows),
        "excess-bounds": bounds_table(rows),
    }


def draw() -> None:
    """excess_risk.svg: the four slices, the seeds' mean and range, and how the bounds grow."""
    rows = read("excess_risk")
    with picture("excess_risk", 2, 2) as axes:
        for number, (axis, title) in enumerate(zip(axes.flat, SLICES, strict=True)):
            for name in METHODS:
                own = slices(rows, name)[number]
                lines(axis, [(x, row["excess"]) for _, x, row in own], name)
            axis.set(xscale="log", yscale="log", xlabel=title, ylabel="excess risk")
            axis.set_xscale("log", base=2)
        for axis, powers in zip(axes.flat, ((1, 2), (1, 2), (2,), ()), strict=True):
            low, high = (2, 16) if axis is not axes.flat[2] else (4, 16)
            for power in powers:
                style = {1: "--", 2: ":"}[power]
                axis.plot(
                    [low, high], [0.02, 0.02 * (high / low) ** power], style, color="black", label=f"slope {power}"
                )
        axes.flat[2].legend(fontsize=7, ncols=2, loc="center right")


if __name__ == "__main__":
    given = parallel(__doc__).parse_args()
    if not given.show:
        if not read("reach"):
            write_reach()
        found = read("excess_risk")
        with processes(given.jobs) as workers:
            carry_out_all([*tuning(list(METHODS))], workers, found)
            carry_out_all([*counted(found)], workers, found)
    draw()
    stand(tables())
