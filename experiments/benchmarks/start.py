"""How long a person waits, and what memory a small run takes: several states of this project in turns.

`python -m experiments.benchmarks.start [CONFIG] [KEY=VALUE ...] [--before TREE] [--turns N]` prints, for this checkout
and another one, the seconds from the command to its first round and from its last round to the prompt, and the largest
sum of the proportional memory of all its processes, Ray's included.

`--rows N`: of a configuration for text, with a file of N rows of random words, some 258 bytes each, from 200 sources,
which are the clients, of whom 8 take part in a round.  The first start, with an empty cache, stands apart.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import psutil
import typer

from experiments.benchmarks.harness import ROOT, command_line, machine, total_memory

_SOURCES = 200


@dataclass(frozen=True)
class Waited:
    """Seconds to the first round and from the last one to the end; bytes of all processes at most."""

    first: float
    end: float
    peak: int


def waited(tree: Path, words: Sequence[str], every: float, more: Mapping[str, str]) -> Waited:
    """One run by the state in `tree`; words: configuration and overrides; memory is looked at `every`
    so many seconds, 0: not at all; more: environment variables.

    Raises RuntimeError where it fails.
    """
    with TemporaryDirectory() as folder:
        began = time.monotonic()
        process = command_line(tree, ["run", *words, "--out", str(Path(folder) / "run")], more)
        assert process.stdout is not None
        peak, over = [0], threading.Event()
        looking = threading.Thread(target=_look, args=(process.pid, peak, over, every), daemon=True)
        looking.start()
        first = last = 0.0
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "local steps" in line and not first:
                first = time.monotonic()
            if line.split()[:1] and "/" in line.split()[0] and line.split()[0].replace("/", "").isdigit():
                last = time.monotonic()
        code, end = process.wait(), time.monotonic()
        over.set()
        looking.join()
        if code or not first or not last:
            raise RuntimeError(f"{tree} ended with {code}\n{''.join(lines[-20:])}")
        return Waited(first - began, end - last, peak[0])


def _look(pid: int, peak: list[int], over: threading.Event, every: float) -> None:
    while every and not over.wait(every):
        peak[0] = max(peak[0], total_memory(pid))


def write_rows(count: int, path: Path) -> list[str]:
    """Writes a file of so many questions and answers; returns the overrides that read it."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = range(len(letters), 0, -1)
    known = ["".join(draw.choices(letters, weights, k=draw.randint(2, 9))) for _ in range(5000)]
    with path.open("w") as file:
        for _ in range(count):
            question, answer = (" ".join(draw.choices(known, k=draw.randint(5, most))) for most in (25, 30))
            source = f"s{draw.randrange(_SOURCES)}"
            file.write(json.dumps({"question": f"{question}?", "answer": answer, "source": source}) + "\n")
    task = f"{{name: table, path: {path}, prompt: '{{question}}', answer: answer, max_length: 128}}"
    partition = "{kind: column, column: source}"
    held = [f"federation.clients={_SOURCES}", "federation.sampled=8", f"federation.partition={partition}"]
    return [f"task={task}", *held]


def main(
    config: Annotated[str, typer.Argument(help="relative to each state")] = "experiments/tiny.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    before: Annotated[Path | None, typer.Option(help="a checkout of an earlier state")] = None,
    turns: Annotated[int, typer.Option(min=1)] = 3,
    rows: Annotated[int, typer.Option(help="of a large file; 0: those of CONFIG", min=0)] = 0,
) -> None:
    """Print both states' medians, and the ratio."""
    with TemporaryDirectory() as folder:
        trees = {"now": ROOT, **({} if before is None else {"before": before.absolute()})}
        words, more = [config, *(overrides or [])], dict[str, str]()
        if rows:
            words += write_rows(rows, Path(folder) / "rows.jsonl")
            more = {"RAYFED_SUB_CACHE": str(Path(folder) / "cache")}
            for name, tree in trees.items():
                one = waited(tree, words, 1.0, more)
                print(f"{name}, first start: {one.first:.2f} s, peak {one.peak / 1e9:.2f} GB", flush=True)
        _turns(trees, words, turns, more)


def _turns(trees: Mapping[str, Path], words: Sequence[str], turns: int, more: Mapping[str, str]) -> None:
    found: dict[str, list[Waited]] = {name: [] for name in trees}
    peaks: dict[str, int] = {}
    for _ in range(turns):
        for name, tree in trees.items():
            found[name].append(waited(tree, words, 0.0, more))
            one = found[name][-1]
            print(f"{name}: {one.first:.2f} s to the first round, {one.end:.2f} s after the last", flush=True)
    for name, tree in trees.items():  # looking takes time of its own
        peaks[name] = waited(tree, words, 0.5, more).peak
    firsts = {name: statistics.median(one.first for one in ones) for name, ones in found.items()}
    ends = {name: statistics.median(one.end for one in ones) for name, ones in found.items()}
    about = machine()
    print(f"{about['date']}, {about['commit']}, {about['cores']} cores, {psutil.virtual_memory().total / 1e9:.0f} GB")
    for title, values, unit in (("to the first round", firsts, "s"), ("after the last", ends, "s")):
        shown = ", ".join(f"{name} {value:.2f} {unit}" for name, value in values.items())
        ratio = f": {values['now'] / values['before']:.2f}x" if "before" in trees else ""
        print(f"{title}: {shown}{ratio}")
    shown = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in peaks.items())
    print(f"peak memory, Ray included: {shown}")


if __name__ == "__main__":
    typer.run(main)
