"""The scripts as commands: options, and runs side by side."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from experiments.theory.sheets import read, write

Rows = list[dict[str, Any]]


def command(doc: str | None) -> argparse.ArgumentParser:
    """A script's options; doc: its module's docstring, for --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="run nothing: tables and pictures of what is there")
    return parser


def parallel(doc: str | None) -> argparse.ArgumentParser:
    """Options of a script that uses processes."""
    parser = command(doc)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    return parser


def processes(jobs: int) -> ProcessPoolExecutor:
    """A pool of fresh processes: forked ones would inherit torch's threads."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def carry_on(
    name: str,
    keys: Sequence[str],
    todo: Callable[[Rows], Iterable[Any]],
    carry_out: Callable[[Any], dict[str, Any]],
    jobs: int,
) -> None:
    """Carries out the runs that NAME.csv lacks, and writes the file after each."""
    rows = read(name)
    with processes(jobs) as pool:
        for done in as_completed([pool.submit(carry_out, run) for run in todo(rows)]):
            rows.append(done.result())
            write(name, rows, keys)
            print(*rows[-1].values(), flush=True)
