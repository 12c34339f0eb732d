"""Answers in a report: beside question and reference, with the words that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rayfed_sub.core.schemas import AnswerRow
from rayfed_sub.reports.answers import answers, differences
from rayfed_sub.reports.page import Cell, Details, Marked, Table
from rayfed_sub.reports.run_reader import _COLUMNS, read_run
from tests.helpers.written_runs import write_run


def answered(folder: Path, questions: int, *, after: bool = True) -> Path:
    """A run whose trained model answers every odd question as its reference does."""
    write_run(folder, "evaluation.generate_rows=3")
    rows = [AnswerRow(0, row, row % 2, f"q{row}?", f"So {row} is.", f"No {row} is.") for row in range(questions)]
    rows += [
        AnswerRow(5, row.row, row.client, row.question, row.reference, row.reference if row.row % 2 else row.answer)
        for row in rows * after
    ]
    pd.DataFrame([vars(row) for row in rows]).to_parquet(folder / "answers.parquet")
    return folder


def test_columns_are_the_engine_s() -> None:
    assert _COLUMNS["answers"] == tuple(AnswerRow.__dataclass_fields__)


def test_answers_of_a_run(tmp_path: Path) -> None:
    section = answers({"one": read_run(answered(tmp_path / "run", 12))})
    assert section is not None
    table: Any = section.parts[1]
    assert isinstance(table, Table)
    assert table.caption == "12 questions, 6 answered otherwise after training; answers of at most 40 tokens"
    assert list(table.columns) == ["row", "client", "question", "reference", "before", "after"]
    assert table.rows[1] == [
        *(Cell("1", 1.0), Cell("1", 1.0), "q1?", "So 1 is."),
        *(Marked("No 1 is.", [(0, 2)]), Marked("So 1 is.", [])),
    ]
    assert len(table.rows) == 12 > table.plain


def test_unfinished_run_has_the_answers_before_training(tmp_path: Path) -> None:
    folder = answered(tmp_path / "run", 3, after=False)
    (folder / "summary.json").unlink()
    section = answers({"one": read_run(folder)})
    assert section is not None
    table: Any = section.parts[1]
    assert table.caption == "3 questions; answers of at most 40 tokens"
    assert [row[-1] for row in table.rows] == [Marked("", [])] * 3


def test_runs_side_by_side_have_a_table_each(tmp_path: Path) -> None:
    runs = {name: read_run(answered(tmp_path / name, 2)) for name in ("one", "two")}
    runs["none"] = read_run(write_run(tmp_path / "none"))
    section = answers(runs)
    assert section is not None
    assert [part.title for part in section.parts if isinstance(part, Details)] == ["one", "two"]
    assert answers({"none": runs["none"]}) is None


def test_many_answers_are_shown_in_part(tmp_path: Path) -> None:
    section = answers({"one": read_run(answered(tmp_path / "run", 1001))})
    assert section is not None
    table: Any = section.parts[1]
    assert (len(table.rows), table.caption.endswith("; the first 1,000 of them")) == (1000, True)


@pytest.mark.parametrize(
    ("text", "reference", "marked"),
    [
        ("", "so", []),
        ("so it is", "so it is", []),
        ("so it is", "", ["so it is"]),
        ("so it was then", "so it is", ["was then"]),
        ("well so\nit is", "so it is now", ["well"]),
        ("a b a b", "b a", ["a", "b"]),
    ],
)
def test_words_that_the_reference_does_not_have(text: str, reference: str, marked: list[str]) -> None:
    spans = differences(text, reference)
    assert [text[begin:end] for begin, end in spans] == marked
    assert json.loads(json.dumps(spans)) == [list(span) for span in spans]
