"""Answers of runs, before and after training: a table of questions and references in which differences are marked."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

import pandas as pd

from rayfed_sub.reports.page import Cell, Details, Marked, Section, Table, Text
from rayfed_sub.reports.run_reader import Run, Runs

_MOST = 1000
"""Most questions of a run in a report; its answers.parquet has all."""
_AT_ONCE = 10
"""Most questions that are shown without pages."""


def answers(runs: Runs) -> Section | None:
    """The answers of each run that has any; None without."""
    found = {name: run for name, run in runs.items() if len(run.answers)}
    if not found:
        return None
    about = Text(
        "Greedy answers to held-out questions. Underlined are the words of an answer that its reference does not have "
        "there. A search finds words in all of a row's texts."
    )
    tables = {name: _table(run) for name, run in found.items()}
    if len(runs) == 1:
        return Section("Answers", [about, *tables.values()])
    return Section("Answers", [about, *(Details(name, [table]) for name, table in tables.items())])


def _table(run: Run) -> Table:
    by_row = run.answers.sort_values(["row", "rounds"]).groupby("row", sort=True)
    pairs = [(frame.iloc[0], frame.iloc[-1] if len(frame) > 1 else None) for _, frame in by_row]
    changed = sum(after is not None and after["answer"] != before["answer"] for before, after in pairs)
    shown, new = pairs[:_MOST], run.config.evaluation.max_new_tokens
    counts = f"{len(pairs):,} questions" + (f", {changed:,} answered otherwise after training" if run.summary else "")
    some = f"; the first {_MOST:,} of them" if len(shown) < len(pairs) else ""
    return Table(
        f"{counts}; answers of at most {new:,} tokens{some}",
        ["row", "client", "question", "reference", "before", "after"],
        [_row(before, after) for before, after in shown],
        plain=_AT_ONCE,
    )


def _row(before: pd.Series, after: pd.Series | None) -> list[Cell | Marked | str]:
    numbers = [Cell(f"{before[name]}", float(before[name])) for name in ("row", "client")]
    reference = str(before["reference"])
    said = ["" if answer is None else str(answer["answer"]) for answer in (before, after)]
    marked = [Marked(text, differences(text, reference)) for text in said]
    return [*numbers, str(before["question"]), reference, *marked]


def differences(text: str, reference: str) -> list[tuple[int, int]]:
    """The parts of `text`, in characters, whose words are not in line with the reference's.

    >>> differences("It is on shelf 4.", "It is on the shelf 5.")
    [(15, 17)]
    """
    words, others = (list(re.finditer(r"\S+", one)) for one in (text, reference))
    matcher = SequenceMatcher(None, [word[0] for word in words], [word[0] for word in others], autojunk=False)
    return [
        (words[begin].start(), words[end - 1].end())
        for kind, begin, end, _, _ in matcher.get_opcodes()
        if kind != "equal" and end > begin
    ]
