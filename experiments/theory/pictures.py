"""Pictures of the tables, as SVG on white."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np

from experiments.theory.sheets import RESULTS

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "rayfed_sub"  # equal rows, equal bytes


@contextmanager
def picture(name: str, down: int, across: int) -> Iterator[Any]:
    """The axes (down, across) of NAME.svg, which is written at the end."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        down, across, figsize=(4.5 * across, 3.4 * down), layout="constrained", squeeze=False
    )
    yield axes
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def lines(axis: Any, points: Sequence[tuple[float, float]], label: str) -> None:
    """The mean of y at every x, and a band from the least to the most."""
    at = defaultdict(list)
    for x, y in points:
        at[x].append(y)
    x_P = sorted(at)
    (line,) = axis.plot(x_P, [np.mean(at[x]) for x in x_P], marker=".", label=label)
    axis.fill_between(x_P, [min(at[x]) for x in x_P], [max(at[x]) for x in x_P], alpha=0.2, color=line.get_color())
