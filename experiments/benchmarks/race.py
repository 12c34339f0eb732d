"""The same federated work by rayfed_sub, Flower, pfl and a bare loop, and the engines' own cost where there is none.

    python -m experiments.benchmarks.race [CASE ...] [--flower PYTHON ...] [--pfl PYTHON] [--before TREE]

--flower, --pfl: the Python of an environment with Flower (several versions: the option again), or with pfl; --before: a
checkout of an earlier state of this project.  Without them these contestants stay away.  --only: these, and the bare
loop once, for its weights.  --passes: runs of each contestant, instead of the case's own number.

A, B, C, D, few, many, smoke: training, by all contestants.  A machine's own speed changes from minute to minute, so all
run in turns, several times (`Case.passes`).  Final weights are compared with the bare loop's first; only where they
agree do times count.  Steady rounds, the first round and the start-up stand apart; a contestant's steady round is the
median of all of its passes' rounds but each one's first and last.

time, traffic, memory: clients that have nothing to compute, by rayfed_sub and Flower.  time: 1,000 clients of a tiny
model, packs of 100.  traffic: a model whose trained weights take 41.9 MB, 48 clients.  memory: how the peak grows with
every added client of the tiny model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from experiments.benchmarks.arithmetic import flops, rate
from experiments.benchmarks.cases import FLOWER, LEAST, LOADS, MOST, OURS, RACED, Case
from experiments.benchmarks.harness import WORKERS, Contestant, Pass, contestants, machine, measured
from experiments.benchmarks.work import write_run, write_work
from rayfed_sub.cli.run_view import print_table, size

TOLERANCE = 1e-5
DEFAULT = ("A", "B", "C", "D", "time", "traffic", "memory")


@dataclass(frozen=True)
class Result:
    """One contestant in one case, all passes together.  start, first: medians, seconds; steady: the median of `rounds`,
    all steady ones in order; stored, loopback: bytes a client and round, medians over steady rounds (None: not
    counted); peak_pss: bytes, the largest; away: the largest difference of a final weight from the bare loop's, and
    floor: seconds of a round's arithmetic, the median over the passes (None: nothing is trained)."""

    case: str
    contestant: str
    does: str
    clients: int
    start: float
    first: float
    steady: float
    rounds: tuple[float, ...]
    stored: float | None
    loopback: float | None
    peak_pss: int
    away: float | None = None
    floor: float | None = None


def race(case: Case, there: Mapping[str, Contestant], folder: Path, once: Sequence[str] = ()) -> list[Result]:
    """All contestants on a case that trains, one after the other, as often as the case asks for; `once`: in the first
    pass alone."""
    work = folder / "work"
    write_work(case, work, WORKERS)
    counted = flops(work) * case.steps * case.clients
    floors: list[float] = []
    found: dict[str, list[Pass]] = {name: [] for name in there}
    away: dict[str, float] = dict.fromkeys(there, 0.0)
    for n in range(case.passes):
        floors.append(counted / rate(WORKERS))
        for name, one in there.items():
            if n and name in once:
                continue
            out = folder / f"{name}-{n}"
            found[name].append(measured(one, work, out, case.look_every))
            away[name] = max(away[name], _away(folder / "bare-0", out))
            print(f"{case.name}, {name}: {np.median(found[name][-1].steady):.3f} s a round", flush=True)
    floor = float(np.median(floors))
    return [together(case, name, own, away[name], floor) for name, own in found.items()]


def loaded(cases: Sequence[Case], there: Mapping[str, Contestant], folder: Path) -> list[Result]:
    """Each case that trains nothing, by the contestant that it is for."""
    results = []
    for number, case in enumerate(cases):
        (wanted,) = case.contestants
        name = next((name for name in there if name.startswith(wanted)), None)
        if name is not None:
            work = folder / f"work-{number}"
            write_run(case, work, WORKERS)
            one = measured(there[name], work, folder / f"out-{number}", case.look_every)
            results.append(together(case, name, [one]))
            found = f"{results[-1].steady:.3f} s a round, {size(one.peak_pss)}"
            print(f"{case.name}, {name}, {case.title}: {found}", flush=True)
    return results


def together(
    case: Case, contestant: str, own: Sequence[Pass], away: float | None = None, floor: float | None = None
) -> Result:
    """The result of a contestant's passes.

    >>> one = Pass(2.0, (9.0, 1.0, 3.0, 7.0), (80.0, 8.0, 16.0, 80.0), (0.0, 4.0, 4.0, 0.0), 100)
    >>> found = together(LOADS["time"][0], "rayfed_sub", [one])
    >>> found.first, found.steady, found.stored, found.loopback  # of 1,000 clients
    (9.0, 2.0, 0.012, 0.004)
    """

    def per_client(rounds: tuple[float, ...]) -> float | None:
        return float(np.median(rounds[1:-1])) / case.clients if rounds else None

    rounds = tuple(seconds for one in own for seconds in one.steady)
    return Result(
        case=case.name,
        contestant=contestant,
        does=case.does,
        clients=case.clients,
        start=float(np.median([one.start for one in own])),
        first=float(np.median([one.rounds[0] for one in own])),
        steady=float(np.median(rounds)),
        rounds=rounds,
        stored=per_client(own[0].stored),
        loopback=per_client(own[0].loopback),
        peak_pss=max(one.peak_pss for one in own),
        away=away,
        floor=floor,
    )


def _away(bare: Path, out: Path) -> float:
    """The largest absolute difference of a final weight.  Raises SystemExit where it is beyond the tolerance."""
    theirs, ours = np.load(bare / "weights.npz"), np.load(out / "weights.npz")
    assert set(theirs) == set(ours), out
    away = max(float(np.abs(theirs[name] - ours[name]).max()) for name in theirs)
    if not away <= TOLERANCE:
        raise SystemExit(f"{out.name}: final weights are {away:.1e} away from the bare loop's, more than {TOLERANCE}")
    return away


def show_race(own: Sequence[Result]) -> None:
    """Times, memory and distance of every contestant."""
    ours = next(result for result in own if result.contestant == OURS)
    print(f"{ours.case}: {RACED[ours.case].title}; arithmetic floor {ours.floor:.3f} s a round")
    columns = (
        "contestant",
        "s a round",
        "from, to",
        "against us",
        "first round",
        "start-up, s",
        "peak memory",
        "weights",
    )
    rows = [
        (
            *(r.contestant, f"{r.steady:.3f}", f"{min(r.rounds):.2f} to {max(r.rounds):.2f}"),
            *(f"{r.steady / ours.steady:.1f}x", f"{r.first:.2f}", f"{r.start:.1f}"),
            *(size(r.peak_pss), f"{r.away:.0e}"),
        )
        for r in own
    ]
    print_table(columns, rows)


def show_load(own: Sequence[Result]) -> None:
    """Time and traffic a client, how much less traffic that is than Flower's, and memory, also of an added client."""
    theirs = {r.does: _traffic(r) for r in own if r.contestant.startswith(FLOWER)}
    ways = [does for does in (LEAST, MOST) if does in theirs]
    rows = []
    for before, r in zip([None, *own], own, strict=False):
        grown = "" if before is None or before.contestant != r.contestant else _added(before, r)
        against = (f"{theirs[does] / _traffic(r):.1f}x" for does in ways)
        traffic = (size(r.stored or 0), size(r.loopback or 0))
        seconds = (f"{r.steady:.3f}", f"{1000 * r.steady / r.clients:.2f}")
        rows.append(
            (f"{r.contestant}: {r.clients:,} clients {r.does}", *seconds, *traffic, *against, size(r.peak_pss), grown)
        )
    less = [f"less than flower, {does}" for does in ways]
    columns = (own[0].case, "s a round", "ms a client", "object store, a client", "sockets, a client")
    print_table((*columns, *less, "peak memory", "an added client"), rows)


def _traffic(result: Result) -> float:
    return (result.stored or 0) + (result.loopback or 0)


def _added(before: Result, row: Result) -> str:
    if row.clients == before.clients:
        return ""
    return f"{(row.peak_pss - before.peak_pss) / (row.clients - before.clients) / 1000:.1f} kB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*RACED, *LOADS]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(known)}; {', '.join(DEFAULT)} if none")
    parser.add_argument("--flower", metavar="PYTHON", action="append", default=[])
    parser.add_argument("--pfl", metavar="PYTHON")
    parser.add_argument("--before", type=Path, metavar="TREE")
    parser.add_argument("--only", metavar="NAME", action="append", default=[])
    parser.add_argument("--passes", type=int, metavar="NUMBER")
    parser.add_argument("--out", type=Path, metavar="FILE")
    given = parser.parse_args()
    if unknown := set(given.cases) - set(known):
        parser.error(f"no case {min(unknown)}; there are {', '.join(known)}")
    when, results = machine(), list[Result]()  # the machine as it begins
    there = contestants(given.flower, given.pfl, given.before)
    if unknown := set(given.only) - set(there):
        parser.error(f"no contestant {min(unknown)}; there are {', '.join(there)}")
    if given.only:
        there = {name: one for name, one in there.items() if name in {"bare", *given.only}}
    for name in given.cases or DEFAULT:
        with tempfile.TemporaryDirectory(prefix="race-") as folder:
            if name in RACED:
                case, once = RACED[name], ("bare",) if given.only else ()
                results += race(replace(case, passes=given.passes or case.passes), there, Path(folder), once)
            else:
                results += loaded(LOADS[name], there, Path(folder))
        if given.out is not None:  # after every case: the next one may fail
            given.out.parent.mkdir(parents=True, exist_ok=True)
            record = {**when, "results": [asdict(result) for result in results]}
            given.out.write_text(json.dumps(record, indent=1) + "\n")
    for name in dict.fromkeys(result.case for result in results):
        own = [result for result in results if result.case == name]
        (show_race if name in RACED else show_load)(own)


if __name__ == "__main__":
    main()
