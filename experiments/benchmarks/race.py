"""The race: the same federated work by rayfed_sub, Flower, pfl and a bare loop, each in its own virtual environment.

    python -m experiments.benchmarks.race [CASE ...] [--flower PYTHON] [--pfl PYTHON] [--out FILE]

--flower, --pfl: the Python of an environment with Flower, or with pfl; without it, that contestant stays away.  A
machine's own speed changes from minute to minute, so all run in turns, several times (`Case.passes`).  Final weights
are compared with the bare loop's first; only where they agree are times told.  Steady rounds, the first round and the
start-up stand apart; a contestant's steady round is the median of all of its passes' rounds but each one's first and
last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from experiments.benchmarks.arithmetic import flops, rate
from experiments.benchmarks.cases import CASES, Case
from experiments.benchmarks.machine import told
from experiments.benchmarks.meter import metered
from experiments.benchmarks.work import write_work
from rayfed_sub.cli.run_view import print_table, size

ROOT = Path(__file__).parents[2]
WORKERS = 2
TOLERANCE = 1e-5
RACED = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Pass:
    """One run of one contestant: seconds until the first round begins, of the first round, of each steady one; bytes at
    most; the largest difference of a final weight from the bare loop's."""

    start: float
    first: float
    steady: tuple[float, ...]
    peak_pss: int
    away: float


@dataclass(frozen=True)
class Result:
    """One contestant in one case, all passes together.  start, first: medians; steady: the median of `rounds`, all
    steady ones in order; peak_pss, away: the largest; floor: seconds of a round, the median over the passes."""

    case: str
    contestant: str
    start: float
    first: float
    steady: float
    rounds: tuple[float, ...]
    peak_pss: int
    away: float
    floor: float


def commands(flower: str | None, pfl: str | None) -> dict[str, list[str]]:
    """Every contestant's command, less what all of them are told (`marks.asked`)."""
    script = {name: ["-m", f"experiments.benchmarks.run_{name}"] for name in ("bare", "rayfed", "flower", "pfl")}
    own = {"bare": [sys.executable, *script["bare"]], "rayfed_sub": [sys.executable, *script["rayfed"]]}
    if flower is not None:
        own["flower"] = [flower, *script["flower"]]
    if pfl is not None:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(WORKERS)]
        own |= {"pfl-1": [pfl, *script["pfl"]], "pfl-2": [pfl, *torchrun, *script["pfl"]]}
    return own


def race(case: Case, contestants: Mapping[str, Sequence[str]], folder: Path) -> list[Result]:
    """All contestants, one after the other, as often as the case asks for."""
    work = folder / "work"
    write_work(case, work, WORKERS)
    counted = flops(work) * case.steps * case.clients
    floors: list[float] = []
    found: dict[str, list[Pass]] = {name: [] for name in contestants}
    for n in range(case.passes):
        floors.append(counted / rate(WORKERS))
        for name, command in contestants.items():
            out = folder / f"{name}-{n}"
            out.mkdir()
            found[name].append(_run([*command, case.name, str(work), str(out), str(WORKERS)], folder / "bare-0", out))
            print(f"{case.name}, {name}: {np.median(found[name][-1].steady):.3f} s a round", flush=True)
    return [_together(case.name, name, own, float(np.median(floors))) for name, own in found.items()]


def _run(command: Sequence[str], bare: Path, out: Path) -> Pass:
    taken = metered(command, ROOT, out.with_suffix(".log"))
    marks: list[float] = json.loads((out / "marks.json").read_text())
    first, *steady, _ = np.diff(marks).tolist()
    return Pass(marks[0] - taken.began, first, tuple(steady), taken.peak_pss, _away(bare, out))


def _together(case: str, contestant: str, own: Sequence[Pass], floor: float) -> Result:
    rounds = tuple(seconds for one in own for seconds in one.steady)
    return Result(
        case=case,
        contestant=contestant,
        start=float(np.median([one.start for one in own])),
        first=float(np.median([one.first for one in own])),
        steady=float(np.median(rounds)),
        rounds=rounds,
        peak_pss=max(one.peak_pss for one in own),
        away=max(one.away for one in own),
        floor=floor,
    )


def _away(bare: Path, out: Path) -> float:
    """The largest absolute difference of a final weight.  Raises where it is beyond the tolerance."""
    theirs, ours = np.load(bare / "weights.npz"), np.load(out / "weights.npz")
    assert set(theirs) == set(ours), out
    away = max(float(np.abs(theirs[name] - ours[name]).max()) for name in theirs)
    if not away <= TOLERANCE:
        raise SystemExit(f"{out.name}: final weights are {away:.1e} away from the bare loop's, more than {TOLERANCE}")
    return away


def show(results: Sequence[Result]) -> None:
    """One table a case."""
    for name in dict.fromkeys(result.case for result in results):
        own = [result for result in results if result.case == name]
        ours = next(result for result in own if result.contestant == "rayfed_sub")
        rows = [
            (
                r.contestant,
                f"{r.steady:.3f}",
                f"{min(r.rounds):.2f} to {max(r.rounds):.2f}",
                f"{r.steady / ours.steady:.1f}x",
                f"{r.first:.2f}",
                f"{r.start:.1f}",
                size(r.peak_pss),
                f"{r.away:.0e}",
            )
            for r in own
        ]
        steady = ("s a round", "from, to", "against us")
        columns = ("contestant", *steady, "first round", "start-up, s", "peak memory", "weights")
        print(f"{name}: {CASES[name].told}; arithmetic floor {ours.floor:.3f} s a round")
        print_table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; {', '.join(RACED)} if none")
    parser.add_argument("--flower", metavar="PYTHON")
    parser.add_argument("--pfl", metavar="PYTHON")
    parser.add_argument("--out", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if unknown := set(asked.cases) - set(CASES):
        parser.error(f"no case {min(unknown)}; there are {', '.join(CASES)}")
    measured: dict[str, object] = dict(told())  # of when it begins
    results: list[Result] = []
    for name in asked.cases or RACED:
        with tempfile.TemporaryDirectory(prefix="race-") as folder:
            results += race(CASES[name], commands(asked.flower, asked.pfl), Path(folder))
        if asked.out is not None:  # after every case: the next one may fail
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            measured["results"] = [asdict(result) for result in results]
            asked.out.write_text(json.dumps(measured, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
