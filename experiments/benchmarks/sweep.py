"""How long a sweep takes: several states of this project in turns.

`python -m experiments.benchmarks.sweep [SWEEP] [KEY=VALUE ...] [--before TREE] [--turns N]` prints, for this checkout
and another one, the seconds from the command to the prompt, and how far the trials' scores lie apart at most: between
turns of one state nothing may, between states a change of numbers does.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pandas as pd
import typer

from experiments.benchmarks.harness import ROOT, command_line, machine


def swept(tree: Path, words: Sequence[str], out: Path) -> tuple[float, pd.Series]:
    """Seconds of a sweep by the state in `tree`, and the score of every trial by its number.

    Raises RuntimeError where it fails.
    """
    began = time.monotonic()
    process = command_line(tree, ["sweep", *words, "--out", str(out)])
    output, _ = process.communicate()
    seconds = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"{tree} ended with {process.returncode}\n{output[-3000:]}")
    trials = pd.read_parquet(out / "trials.parquet").set_index("trial")
    return seconds, trials["held_out_loss"]


def main(
    sweep: Annotated[str, typer.Argument(help="relative to each state")] = "experiments/sweeps/tagg-rank-lr.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    before: Annotated[Path | None, typer.Option(help="a checkout of an earlier state")] = None,
    turns: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Print both states' medians, the ratio, and the distance of their scores."""
    trees = {"now": ROOT, **({} if before is None else {"before": before.absolute()})}
    found: dict[str, list[tuple[float, pd.Series]]] = {name: [] for name in trees}
    for turn in range(turns):
        for name, tree in trees.items():
            with TemporaryDirectory() as folder:
                found[name].append(swept(tree, [sweep, *(overrides or [])], Path(folder) / "sweep"))
            print(f"{name}, turn {turn + 1}: {found[name][-1][0]:.1f} s", flush=True)
    about = machine()
    print(f"{about['date']}, {about['commit']}, {about['cores']} cores")
    medians = {name: statistics.median(seconds for seconds, _ in ones) for name, ones in found.items()}
    ratio = f": {medians['now'] / medians['before']:.2f}x" if "before" in medians else ""
    print(", ".join(f"{name} {value:.1f} s" for name, value in medians.items()) + ratio)
    scores = [(name, trials) for name, ones in found.items() for _, trials in ones]
    for (one, left), (other, right) in itertools.pairwise(scores):
        print(f"scores of {len(left)} trials, {one} and {other}: at most {(left - right).abs().max():g} apart")


if __name__ == "__main__":
    typer.run(main)
