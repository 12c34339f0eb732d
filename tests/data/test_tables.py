"""Tables as pairs: every file format, templates, labels, and every error."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from rayfed_sub.config.schema import Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.given import given_rows, given_table
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.table_pairs import table_pairs

RECORDS: list[dict[str, Any]] = [
    {"q": "one?", "about": "A", "a": "1", "n": 10},
    {"q": "two?", "about": None, "a": "2", "n": 9},
    {"q": " three?", "about": "B", "a": "  3 ", "n": 10},
]

NO_COLUMNS = {"one": [{"q": "one?", "a": "1"}], "two": [{"question": "two?", "answer": "2"}]}


def written(folder: Path, suffix: str, records: list[dict[str, Any]] = RECORDS) -> str:
    file = folder / f"rows{suffix}"
    frame = pd.DataFrame(records)
    if suffix == ".parquet":
        frame.to_parquet(file)
    elif suffix == ".csv":
        frame.to_csv(file, index=False)
    elif suffix == ".json":
        file.write_text(json.dumps(records), encoding="utf-8")
    else:
        file.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    return str(file)


def task(path: str, **fields: Any) -> Task:
    return Task(**{"name": "table", "path": path, "prompt": "{q}", "answer": "a", **fields})


def fault(task: Task, key: str | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        table_pairs(task, key)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_every_file_format_gives_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    pairs = table_pairs(task(written(tmp_path, suffix), prompt="{about}\n{q}"), key="n")
    assert pairs == Pairs(
        kind="causal-lm",
        questions=("A\none?", "two?", "B\nthree?"),  # cells and the whole text are stripped
        answers=("1", "2", "3"),
        keys=("10", "9", "10"),
        spans=(((0, 1), (2, 6)), ((0, 4),), ((0, 1), (2, 8))),
    )


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("q,a\n007,NA\n1.0,null\n", encoding="utf-8")
    pairs = table_pairs(task(str(file)), None)
    assert (pairs.questions, pairs.answers) == (("007", "1.0"), ("NA", "null"))


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    written(tmp_path / "set", ".jsonl")
    assert table_pairs(task(str(tmp_path / "set")), "n").answers == ("1", "2", "3")
    wrong = fault(task(str(tmp_path / "set"), test="dev"))
    assert (wrong.field, wrong.value) == ("task.test", "dev")
    assert fault(task(str(tmp_path / "set"), answer="b")).field == "task.answer"


def test_rows_without_text_are_dropped_and_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [*RECORDS, {"q": "four?", "a": None}, {"q": "five?", "a": " "}, {"q": "", "a": "6", "n": 1}]
    with caplog.at_level(logging.WARNING):
        pairs = table_pairs(task(written(tmp_path, ".jsonl", records)), None)
    assert pairs.questions == ("one?", "two?", "three?")
    assert [record.getMessage() for record in caplog.records] == [
        "task.path: 3 of 6 rows have no prompt, answer or key; dropped"
    ]


def test_rows_with_nothing_in_the_template_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The template's own words are no question; a column that is empty beside another one is."""
    records = [{"q": "one?", "c": None, "a": "1"}, {"q": None, "c": " ", "a": "2"}, {"q": None, "c": "So.", "a": "3"}]
    path = written(tmp_path, ".jsonl", records)
    pairs = table_pairs(task(path, prompt="Question: {q}\n{c}\nAnswer:"), key=None)
    assert list(pairs.answers) == ["1", "3"]
    assert "1 of 3 rows have no prompt, answer or key; dropped" in caplog.text
    two = table_pairs(task(path, prompt=("First: {q}", "Second: {q}{c}"), answer=None, label="a"), key=None)
    assert list(two.questions) == ["First: one?\nSecond: one?"]


def test_rows_without_a_label_are_counted_in_thousands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"q": "one?", "y": "a"}, *({"q": f"{i}?", "y": None} for i in range(7019))]
    with caplog.at_level(logging.WARNING):
        table_pairs(task(written(tmp_path, ".jsonl", records), answer=None, label="y"), None)
    assert [record.getMessage() for record in caplog.records] == [
        "task.path: 7,019 of 7,020 rows have no prompt, label or key; dropped"
    ]


def test_rows_without_a_key_are_dropped_where_a_key_is_needed(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl")
    assert table_pairs(task(path), "about").keys == ("A", "B")
    assert table_pairs(task(path), None).keys == ("", "", "")


def test_template_can_contain_braces(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl")
    assert table_pairs(task(path, prompt="{{x}} {q} {{}}"), None).questions[0] == "{x} one? {}"


# --- labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["no", "yes", "no"], ("no", "yes")),
        ([10, 9, 10], ("9", "10")),  # numbers by size, not as text
        ([True, False, True], ("False", "True")),
    ],
)
def test_class_names_are_sorted(tmp_path: Path, labels: list[Any], names: tuple[str, ...]) -> None:
    records = [{"q": f"q{i}", "y": label} for i, label in enumerate(labels)]
    pairs = table_pairs(task(written(tmp_path, ".jsonl", records), answer=None, label="y"), "y")
    assert (pairs.kind, pairs.class_names) == ("classification", names)
    assert pairs.answers == pairs.keys == tuple(map(str, labels))


def test_class_labels_are_their_names(tmp_path: Path) -> None:
    features = datasets.Features({"q": datasets.Value("string"), "y": datasets.ClassLabel(names=["z", "b", "k"])})
    data = datasets.Dataset.from_dict({"q": ["p", "q", "r"], "y": [1, 0, -1]}, features=features)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    pairs = table_pairs(task(str(tmp_path / "rows.parquet"), answer=None, label="y"), None)
    assert pairs.class_names == ("b", "z")  # as in a CSV with the names: those that occur, by the alphabet
    assert pairs.answers == ("b", "z")  # -1 is "no label"


# --- errors


def test_missing_path() -> None:
    assert fault(task("x").model_copy(update={"path": None})).field == "task.path"


@pytest.mark.parametrize("path", ["nowhere/rows.csv", "/nowhere/rows.parquet", "/nowhere/at all"])
def test_missing_file(path: str) -> None:
    wrong = fault(task(path))
    assert (wrong.field, wrong.value) == ("task.path", path)
    assert "a file that exists" in str(wrong)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("x", encoding="utf-8")
    wrong = fault(task(str(tmp_path / "rows.xlsx")))
    assert wrong.field == "task.path"
    assert ".parquet, .jsonl, .ndjson, .json, .csv" in str(wrong)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", "PAR1 this is not Parquet"),
        ("rows.jsonl", '{"q": "one?"}\n{"q": '),
        ("rows.jsonl", "[1, 2]\n"),
        ("rows.json", '{"q": "one?"}'),
        ("rows.csv", 'q,a\n"unclosed,1\n'),
        ("rows.csv", ""),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    wrong = fault(task(str(tmp_path / name)))
    assert wrong.field == "task.path"
    assert "a readable ." in str(wrong)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"q,a\n\xff\xfe,1\n")
    assert fault(task(str(tmp_path / "rows.csv"))).field == "task.path"


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize(
    ("fields", "key", "field"),
    [
        ({"prompt": "{question}"}, None, "task.prompt"),
        ({"answer": "response"}, None, "task.answer"),
        ({"answer": None, "label": "class"}, None, "task.label"),
        ({}, "by", "federation.partition.column"),
    ],
)
def test_unknown_column_is_refused_with_the_known_columns(
    tmp_path: Path, suffix: str, fields: dict[str, Any], key: str | None, field: str
) -> None:
    wrong = fault(task(written(tmp_path, suffix), **fields), key)
    assert wrong.field == field
    assert "q, about, a, n" in str(wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": None}, "got None; allowed: a column of the table, here"),
        ({"answer": "a", "label": "n"}, "got 'a'; allowed: nothing where task.label is set"),
    ],
)
def test_exactly_one_of_answer_and_label(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    assert str(fault(task(written(tmp_path, ".csv"), **fields))).startswith(f"task.answer: {message}")


@pytest.mark.parametrize("prompt", [None, "", "no column", "{", "{}", "{q!r}", "{q:>9}"])
def test_invalid_templates(tmp_path: Path, prompt: str | None) -> None:
    assert fault(task(written(tmp_path, ".csv"), prompt=prompt)).field == "task.prompt"


@pytest.mark.parametrize("wanted", ["answer", "label"])
def test_prompt_must_not_contain_the_answer(tmp_path: Path, wanted: str) -> None:
    fields = {"answer": None, wanted: "a", "prompt": "{q} {a}"}
    wrong = fault(task(written(tmp_path, ".csv"), **fields))
    assert wrong.field == "task.prompt"
    assert "a template without {a}" in str(wrong)


def test_no_rows_left(tmp_path: Path) -> None:
    wrong = fault(task(written(tmp_path, ".jsonl", [{"q": "one?", "a": None}])))
    assert wrong.field == "task.path"
    assert "rows that have a prompt and an answer" in str(wrong)


def test_hub_id_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or the hub is asked whether it is there

    def unreachable(path: str) -> None:
        raise ConnectionError(f"Couldn't reach {path}\non the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    wrong = fault(task("nobody/nothing"))
    assert (wrong.field, wrong.value) == ("task.path", "nobody/nothing")
    assert "Couldn't reach nobody/nothing" in str(wrong)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_files_with_none_of_the_columns_are_refused(tmp_path: Path, suffix: str) -> None:
    """All of their rows count, though none of their columns is read."""
    for name, records in NO_COLUMNS.items():
        (tmp_path / name).mkdir()
        written(tmp_path / name, suffix, records)
    error = fault(task(str(tmp_path)))
    assert error.allowed == f"a column of every file; two/rows{suffix} has question, answer"


@pytest.mark.parametrize("form", [list, Dataset.from_list, lambda rows: Dataset.from_list(rows * 2).select([1])])
def test_given_rows_with_none_of_the_columns_are_refused(form: Callable[[Any], Any]) -> None:
    given = given_rows({name: form(records) for name, records in NO_COLUMNS.items()})
    with pytest.raises(UserError, match=r"a column of every file; data\['two'\] has question, answer"):
        table_pairs(Task(name="given", prompt="{q}", answer="a"), None, given=partial(given_table, given))


@pytest.mark.parametrize("kind", ["answer", "messages"])
def test_text_of_a_typed_file_that_is_not_utf_8_is_one_line(tmp_path: Path, kind: str) -> None:
    """Arrow stores what it is given; the third row is latin-1."""
    cells = pa.array([b"a", None, "\xe4".encode("latin-1")]).view(pa.string())
    if kind == "messages":
        cells = pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([cells], ["content"]))
    pq.write_table(pa.table({"q": ["one?", "two?", "three?"], "a": cells}), tmp_path / "rows.parquet")
    own = {"prompt": None, "answer": None, "messages": "a"} if kind == "messages" else {}
    error = fault(task(str(tmp_path), **own))
    assert error.field == f"task.{'messages' if own else 'answer'}"
    assert error.allowed.endswith("; row 3 of rows.parquet holds text that is not UTF-8")
