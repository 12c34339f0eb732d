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
from rayfed_sub.reports.report import write_report
from rayfed_sub.reports.run_reader import _COLUMNS, read_run
from tests.helpers.browser import CHROMIUM, browse
from tests.helpers.written_runs import write_run
from tests.reports.test_page import result_of, with_script


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


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_answers_page_search_sort_and_mark_in_a_browser(tmp_path: Path) -> None:
    """120 questions; odd ones are answered as their reference is, number 77 by what a page could take for its own."""
    folder = answered(tmp_path / "run", 120)
    frame = pd.read_parquet(folder / "answers.parquet")
    odd = 'No \U0001f600 </script><b>"x"</b>, a = 5\n  is.'
    frame.loc[(frame["row"] == 77) & (frame["rounds"] == 5), "answer"] = odd
    frame.to_parquet(folder / "answers.parquet")
    path = tmp_path / "report.html"
    write_report([read_run(folder)], path)
    script = """
      const heads = [...document.querySelectorAll(".table thead")].map(head => [...head.rows[0].cells]);
      const part = heads.find(cells => cells.some(cell => cell.textContent === "after"))[0].closest(".table");
      const names = [...part.querySelector("thead").rows[0].cells].map(cell => cell.textContent);
      const cells = name => [...part.querySelector("tbody").rows].map(row => row.cells[names.indexOf(name)]);
      const column = name => cells(name).map(cell => cell.textContent), box = part.querySelector("input");
      const marks = name => cells(name).map(cell => [...cell.querySelectorAll("mark")].map(one => one.textContent));
      const [first, previous, next, last] = part.querySelectorAll(".pages button");
      const place = () => part.querySelector(".pages output").textContent;
      const find = text => { box.value = text; box.dispatchEvent(new Event("input")); return column("row"); };
      const press = name => part.querySelector("thead").rows[0].cells[names.indexOf(name)].firstChild.click();
      result.start = [column("row")[0], column("row").length, place()];
      last.click(); result.end = [column("row").at(-1), column("row").length, place()];
      previous.click(); result.middle = place();
      result.question = find("Q77?"); result.word = find("<\\/script>"); result.comma = find("x, a = 5");
      result.marks = [column("before"), marks("before"), column("after"), marks("after"), box.placeholder];
      result.inner = cells("after")[0].querySelectorAll("b").length;
      result.numbers = find("row > 117, client = 1"); result.both = find("so 11, q1");
      find(""); press("row"); press("row"); result.down = [column("row").slice(0, 2), marks("after").slice(0, 2)];
      press("after"); result.after = [column("after")[0], marks("after")[0], place()];
      result.wide = document.documentElement.scrollWidth - innerWidth;
      result.underlined = getComputedStyle(part.querySelector("mark")).textDecorationLine;
    """
    dom, console = browse(with_script(path, script), "--window-size=900,900")
    assert console == []
    result = result_of(dom)
    assert result["start"] == ["0", 50, "rows 1 to 50 of 120"]
    assert (result["end"], result["middle"]) == (["119", 20, "rows 101 to 120 of 120"], "rows 51 to 100 of 120")
    assert result["question"] == result["word"] == result["comma"] == ["77"]
    assert result["marks"][:4] == [["No 77 is."], [["No"]], [odd], [[odd.removesuffix("\n  is.")]]]
    assert result["inner"] == 0
    assert (result["numbers"], result["both"]) == (["119"], ["11", *(f"{row}" for row in range(110, 120))])
    assert result["down"] == [["119", "118"], [[], ["No"]]]
    assert result["after"] == [odd, [odd.removesuffix("\n  is.")], "rows 1 to 50 of 120"]  # signs before digits
    assert (result["wide"] <= 0, result["underlined"]) == (True, "underline")
