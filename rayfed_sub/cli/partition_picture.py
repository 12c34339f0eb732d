"""A partition as a picture file: clients by classes or keys, and the clients' sizes beside them.

Slow imports happen only when it draws, so that a path is checked at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayfed_sub.core.errors import UserError

if TYPE_CHECKING:
    from rayfed_sub.data.partition_stats import PartitionStats

SUFFIXES = (".png", ".svg", ".pdf")
_LINES = 40
"""Most clients to draw one by one; more are drawn in as many bands."""


def check_path(path: Path) -> None:
    """UserError (--out) where no picture can be written to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        allowed = f"a file ending in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError("--out", str(path), allowed, "e.g. --out partition.png")
    if not path.resolve().parent.is_dir() or path.is_dir():
        raise UserError("--out", str(path), "a file in a folder that exists", "make the folder or change --out")


def draw(stats: PartitionStats, path: Path) -> None:
    """Writes the picture; a cell's shade is the share of the client's rows that are of the class or key.

    Raises UserError (--out) where it cannot be written.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    from rayfed_sub.cli.data_view import cut, group_labels, title

    groups, values = stats.groups(_LINES), [cut(name, 28) for name in stats.shown()]
    counts_GS = stats.table(groups)
    shares_GS = counts_GS / counts_GS.sum(axis=1, keepdims=True)
    banded = len(groups) < len(stats.clients)
    width, height = max(4.0, 0.62 * len(values)), max(1.6, 0.3 * len(groups))
    figure = Figure(figsize=(width + 5.2, height + 2.2), layout="constrained")
    # The heat map, and in narrower panels that share its lines the sizes and how unlike all clients each is.
    cells, sizes, skews = figure.subplots(1, 3, sharey=True, width_ratios=(width, 1.6, 1.0))

    # Light to dark in one hue: in grey print it is the same picture.  The root lets small shares show.
    image = cells.imshow(shares_GS, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    slanted = max(map(len, values)) > 7
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    cells.set_xticks(range(len(values)), values, parse_math=False, **turned)
    cells.set_yticks(range(len(groups)), group_labels(stats, groups, 28), parse_math=False)
    cells.set_ylabel("clients by size" if banded else "")
    cells.set_xlabel(
        f"{stats.counted}: {stats.value_column}" if stats.value_column else "no label and no key",
        parse_math=False,
    )
    for edge in cells.spines.values():
        edge.set_visible(False)
    cells.tick_params(length=0)
    cells.set_xticks([column - 0.5 for column in range(1, len(values))], minor=True)
    cells.set_yticks([line - 0.5 for line in range(1, len(groups))], minor=True)
    cells.grid(which="minor", color="white", linewidth=1)
    cells.tick_params(which="minor", length=0)
    if counts_GS.max() < 100_000:
        for line, (counts_S, shares_S) in enumerate(zip(counts_GS.tolist(), shares_GS.tolist(), strict=True)):
            for column, (count, share) in enumerate(zip(counts_S, shares_S, strict=True)):
                if count:
                    colour = "white" if share > 0.45 else "#1a1a1a"
                    cells.text(column, line, f"{count}", ha="center", va="center", fontsize=7.5, color=colour)
    figure.colorbar(image, ax=skews, label=f"share of the {'band' if banded else 'client'}'s rows", aspect=30)

    rows = counts_GS.sum(axis=1).tolist()
    sizes.barh(range(len(groups)), rows, color="#6b7a8f", height=0.7)
    sizes.set_xlabel("rows")
    sizes.set_xlim(0, max(rows) * 1.35)
    for line, count in enumerate(rows):
        sizes.text(count, line, f" {count:,}", va="center", fontsize=7.5)
    skews.plot(stats.distances(groups), range(len(groups)), "o", color="#6b7a8f", markersize=4)
    skews.set_xlim(-0.05, 1.05)
    skews.set_xlabel("skew")
    for panel in (sizes, skews):
        panel.tick_params(axis="y", which="both", length=0)
        for name in ("top", "right", "left"):
            panel.spines[name].set_visible(False)
    skew = f"\nskew {stats.skew:.3f} of {stats.counted}" if stats.value_column else ""
    figure.suptitle(f"{title(stats)}{skew}", fontsize=11, parse_math=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError("--out", str(path), "a file that can be written", str(error.strerror)) from None
