"""Ways of packing clients that must not change a run's bits: caps of the packs, with workers, deaths and resumptions.

About thirty runs cover all pairs of values of the factors; each has the hash of the same job without Ray in packs of
three."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations, product
from pathlib import Path

from rayfed_sub import run
from rayfed_sub.telemetry.events import PackDone, Summary
from tests.helpers import chaos

Case = Mapping[str, str]
"""A value of each factor."""

FACTORS = {
    "method": (
        "{name: fedftg, rank: 4, refresh_every: 6}",
        "{name: hetlora, rank: 4, client_ranks: [2, 3, 4], dropout: 0.2}",
        "{name: flora, rank: 4}",
        "{name: fedsa-lora, rank: 4}",
        "{name: fedavg}",
    ),
    "most": ("1", "2", "3", "8", "100", "auto"),
    "steps": ("4", "[4, 2, 3]"),
    "clip": ("null", "0.1"),
    "dtype": ("float32", "bfloat16"),
    "workers": ("1", "2", "4"),
    "trouble": ("none", "worker killed", "resumed with another size"),
}


def cases() -> list[Case]:
    """Cases in which every two values of different factors meet, chosen greedily: the one with the most new pairs."""
    every = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    open_pairs = set().union(*(_pairs(case) for case in every))
    found: list[Case] = []
    while open_pairs:
        best = max(every, key=lambda case: len(_pairs(case) & open_pairs))
        found.append(best)
        open_pairs -= _pairs(best)
    return found


def _pairs(case: Case) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in combinations(case.items(), 2)}


def job_of(case: Case, workers: str, most: str) -> list[str]:
    """The overrides of a case's job."""
    return [
        *(f"resources.workers={workers}", f"resources.pack_size={most}", f"model.dtype={case['dtype']}"),
        *(f"method={case['method']}", f"federation.local_steps={case['steps']}"),
        *(f"optimizer.clip_norm={case['clip']}", "federation.rounds=3", "server.optimizer=plain"),
    ]


def quiet(case: Case, folder: Path) -> Summary:
    """The case's job without Ray, in packs of three."""
    return run(chaos.job(0, *job_of(case, "0", "3")), folder)


def packed(case: Case, folder: Path) -> Summary:
    """The case itself, in the Ray session of this process."""
    config = chaos.job(int(case["workers"]), *job_of(case, case["workers"], case["most"]))
    if case["trouble"] == "none":
        return run(config, folder)
    if case["trouble"] == "worker killed":
        return run(config, folder, chaos.in_the_middle(lambda: chaos.kill_one("ray::Worker")))

    def interrupt(record: object) -> None:
        if isinstance(record, PackDone) and record.round == 1:
            raise KeyboardInterrupt

    try:
        run(config, folder, interrupt)
    except KeyboardInterrupt:
        other = "3" if case["most"] != "3" else "2"
        again = chaos.job(int(case["workers"]), *job_of(case, case["workers"], other))
        return run(again, folder, resume=True)
    raise AssertionError("the run was not interrupted")


def table(root: Path) -> Iterator[tuple[Case, bool]]:
    """Each case, and whether it has the quiet job's hash."""
    known: dict[tuple[str, ...], str] = {}
    for number, case in enumerate(cases()):
        key = tuple(case[name] for name in ("method", "steps", "clip", "dtype"))
        if key not in known:
            known[key] = quiet(case, root / f"quiet-{number}").weights_sha256
        yield case, packed(case, root / f"packed-{number}").weights_sha256 == known[key]
