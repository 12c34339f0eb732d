"""A partition in the terminal: its clients as a table, and a picture of clients by classes or keys, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from string import ascii_letters

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayfed_sub.data.partition_stats import PartitionStats
from rayfed_sub.data.rows import Ints

_LISTED = 24
"""Most clients to list one by one; of more, some of the largest and smallest are listed."""
_ENDS = 5
_BLOCKS = "░▒▓█"
_RAMP = ("#eef3f9", "#d5e3f0", "#b0cde4", "#82b1d4", "#5392c2", "#2f72ac", "#175390", "#08306b")
"""Light to dark, readable in grey too."""


def show(stats: PartitionStats, console: Console | None = None) -> None:
    """Prints table, picture and row counts."""
    console = console or Console()
    console.print(_clients(stats, console.width))
    console.print()
    for picture in _picture(stats, console):
        console.print(picture)
    console.print()
    console.print(_rows(stats))
    console.print()
    for note in notes(stats):
        for line in textwrap.wrap(note, 78, initial_indent="- ", subsequent_indent="  "):
            console.print(Text(line, "dim"))


def title(stats: PartitionStats) -> str:
    """Title: "tiny: 8 clients, kind column, by module"."""
    by = f", by {stats.column}" if stats.column else ""
    count = len(stats.clients)
    return f"{stats.name}: {count:,} client{'s' if count != 1 else ''}, {stats.kind}{by}"


def counted(stats: PartitionStats) -> str:
    """The name of the counted values: the label's classes, or the partition's keys."""
    if stats.problem == "regression":
        return f"Classes: quantile bins of the label, column {stats.value_column}."
    if stats.problem == "multi-label":
        return f"Classes: the labels, {stats.value_column}; a row counts once for each that it has."
    if stats.counted == "classes":
        return f"Classes: the values of the label, column {stats.value_column}."
    each = " Each client has one of them, so their sizes alone give the skew." if stats.kind == "column" else ""
    return f"Keys: the values of the column {stats.value_column}, since the task has no label.{each}"


def notes(stats: PartitionStats) -> Iterable[str]:
    """Lines with the skew, the dropped rows, and the messages logged while rows were read."""
    if stats.value_column is None:
        yield "The rows have neither a label nor a key, so nothing is counted; federation.partition.column names one."
    else:
        yield counted(stats)
        yield (
            f"Skew {stats.skew:.3f}: the share of its rows that a client would have to change for other "
            f"{stats.counted} to look like all clients together (total-variation distance), over clients by their "
            f"rows."
        )
    row_counts = stats.row_counts
    if row_counts.chunks:
        texts = row_counts.train + row_counts.validation + row_counts.held_out + row_counts.repeated
        yield f"Rows of clients are chunks: {row_counts.chunks:,} of {texts:,} texts, which the splits count."
    if stats.kind == "resample" and not row_counts.chunks:
        yield f"Clients overlap: {int(stats.rows_C.sum()):,} rows were drawn from {row_counts.train:,}."
    if row_counts.capped:
        yield f"{row_counts.capped:,} of {row_counts.read:,} rows were left out by task.max_rows."
    if row_counts.shared:
        yield f"{row_counts.shared:,} rows of official splits ask what stands in another split too; they stay."
    if row_counts.strange:
        yield f"{row_counts.strange:,} rows were left out: their {stats.column} is not among the clients'."
    yield from stats.notes


def _clients(stats: PartitionStats, across: int) -> Table:
    one = "class" if stats.counted == "classes" else "key"
    heads = ("client", "rows", "share", "tokens", stats.counted, f"largest {one}", "skew", stats.judged)
    total = int(stats.rows_C.sum())
    lines = [_line(stats, client, total) for client in _listed(stats)]
    many = len(stats.clients) > _LISTED
    middle = "" if stats.tokens_C is None else f"{np.median(stats.tokens_C):,.0f}"
    held, judged = str(len(stats.values)), f"{int(stats.judged_C.sum()):,}"
    summary = ("all", f"{total:,}", "100.0%", middle, held, "", f"{stats.skew:.3f}", judged)
    quartiles = [("1st quartile", 25), ("median", 50), ("3rd quartile", 75)] if many else []
    # What is too wide is taken from the names of classes or keys, before Rich would take it from the numbers.
    fixed = [max(len(line[i]) for line in [heads, summary, *lines]) for i in range(len(heads)) if i != 5]
    most = max(len(heads[5]), across - sum(fixed) - 2 * len(heads))
    table = _plain(title(stats))
    for head in heads:
        table.add_column(head, justify="left" if head in (heads[0], heads[5]) else "right", no_wrap=True)
    for number, line in enumerate(lines):
        if many and number == _ENDS:
            table.add_row(*["…"] * len(heads), style="dim")
        table.add_row(*map(Text, (*line[:5], cut(line[5], most), *line[6:])))
    table.add_row()
    for label, percent in quartiles:
        rows = float(np.percentile(stats.rows_C, percent))
        table.add_row(label, f"{rows:,.0f}", _share(rows / total), style="dim")
    table.add_row(*summary, style="bold")
    return table


def _listed(stats: PartitionStats) -> list[int]:
    """The clients to list: all, or the largest and the smallest of many."""
    if len(stats.clients) <= _LISTED:
        return list(range(len(stats.clients)))
    order: list[int] = stats.by_size().tolist()
    return [*order[:_ENDS], *order[-_ENDS:]]


def _line(stats: PartitionStats, client: int, total: int) -> tuple[str, ...]:
    rows, counts = int(stats.rows_C[client]), stats.counts_of(client)
    largest, most = next(iter(counts.items()))
    return (
        cut(stats.clients[client], 20),
        f"{rows:,}",
        _share(rows / total),
        "-" if stats.tokens_C is None else f"{stats.tokens_C[client]:,.0f}",
        str(len(counts)),
        f"{most / rows:4.0%} {largest}",
        f"{stats.distance_C[client]:.3f}",
        f"{int(stats.judged_C[client]):,}",
    )


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.3%}"


def _plain(title: str | None = None) -> Table:
    """A table with a line under its head and two spaces between columns."""
    heading = None if title is None else Text(title, "bold")
    return Table(title=heading, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))


def _picture(stats: PartitionStats, console: Console) -> Iterable[Table | Text]:
    """Clients by classes or keys: a cell's shade is the share of the client's rows in the column's class or key."""
    groups, values = stats.groups(_LISTED), stats.shown()
    banded = len(groups) < len(stats.clients)
    counts_GS = stats.table(groups)
    labels = group_labels(stats, groups)
    across = min(console.width, 140)
    beside = max(map(len, [*labels, "client"])) + (17 if banded else 10)  # names, rows, skew, and spaces
    room = (across - beside) // len(values)
    width = min(max(3, room), 14)
    heads = [cut(name, width - 1) for name in values]
    if width < 8 or len(set(heads)) < len(values):
        heads = list(ascii_letters[: len(values)])
    table = Table(box=None, padding=0, pad_edge=False)
    table.add_column("by size" if banded else "client", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True, min_width=7)
    if banded:
        table.add_column("skew", justify="right", no_wrap=True, min_width=7)
    table.add_column("", width=2)
    for head in heads:
        table.add_column(Text(head, justify="center"), width=width, no_wrap=True)
    coloured, digits = console.color_system is not None, len(f"{counts_GS.max()}")
    # All numbers or none: one here and a blank there would mislead.  Without colours they stand beside their blocks.
    digits = digits if digits < width - (0 if coloured else 1) else 0
    shade = _coloured if coloured else _blocks
    for label, distance, counts_S in zip(labels, stats.distances(groups), counts_GS, strict=True):
        rows, skew = int(counts_S.sum()), [f"{distance:.3f}"] if banded else []
        cells = [shade(count, count / rows, width, digits) for count in counts_S.tolist()]
        table.add_row(Text(label), f"{rows:,}", *skew, "", *cells)
    yield table
    if banded:
        caption = f"Bands of {len(groups[-1]):,} to {len(groups[0]):,} clients, with the mean skew of their clients; "
    else:
        caption = ""
    caption += f"darker: a larger share of the {'band' if banded else 'client'}'s rows"
    caption += "." if coloured else f" ({_BLOCKS[1]} from 6%, {_BLOCKS[2]} from 25%, {_BLOCKS[3]} from 56%)."
    for line in textwrap.wrap(caption[0].upper() + caption[1:], 78):
        yield Text(line, "dim")
    legend = "; ".join(f"{head} {name}" for head, name in zip(heads, values, strict=True) if head != name)
    for line in textwrap.wrap(legend, across - 2):
        yield Text(line, "dim")


def _coloured(count: int, share: float, width: int, digits: int) -> Text:
    """A cell `width` wide with the number on a shade; the root of the share, so that small shares show."""
    if not count:
        return Text("·".center(width), "dim")
    step = min(int(share**0.5 * len(_RAMP)), len(_RAMP) - 1)
    return Text(
        (f"{count}" if digits else "").center(width), f"{'#000000' if step < 4 else '#ffffff'} on {_RAMP[step]}"
    )


def _blocks(count: int, share: float, width: int, digits: int) -> Text:
    """A cell `width` wide with the number and blocks."""
    if not count:
        return Text("·".rjust(digits or 1).ljust(width))
    block = _BLOCKS[min(int(share**0.5 * len(_BLOCKS)), len(_BLOCKS) - 1)]
    return Text(f"{count if digits else '':>{digits}}{block * (width - digits - 1)} ")


def group_labels(stats: PartitionStats, groups: Sequence[Ints], most: int = 20) -> list[str]:
    """The names of clients, cut to `most` characters, or the places of a band's clients by size: "1-417"."""
    if len(groups) == len(stats.clients):
        return [cut(stats.clients[int(client)], most) for (client,) in groups]
    ends = np.cumsum([len(group) for group in groups])
    return [f"{end - len(group) + 1:,}-{end:,}" for group, end in zip(groups, ends.tolist(), strict=True)]


def cut(text: str, most: int) -> str:
    """`text` in one line of at most `most` characters.

    >>> cut("information extraction", 12)
    'information…'
    """
    text = text.strip().replace("\n", " ")
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def _rows(stats: PartitionStats) -> Table:
    row_counts = stats.row_counts
    table = _plain()
    table.add_column("split")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("judged")
    splits = {"training": row_counts.train, "validation": row_counts.validation, "held-out": row_counts.held_out}
    for name, count in splits.items():
        share = count / sum(splits.values())
        official = "" if stats.split.endswith(" share") else f": {stats.split}"
        table.add_row(name, f"{count:,}", f"{share:.1%}", f"yes{official}" if name == stats.judged else "")
    return table
