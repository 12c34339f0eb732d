"""Files of every type as one table: equal cells, and one line for each kind of bad data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from datasets.table import MemoryMappedTable

from rayfed_sub.config.schema import Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.dataset import load_dataset, load_pairs
from rayfed_sub.data.readers import Wanted, read_file
from rayfed_sub.models.tokenizers import ByteTokenizer

ROWS: list[dict[str, Any]] = [
    {
        "q": f' What is {i},\n"{i}"?\t',
        "a": f"It is 00{i}.",
        "n": i % 4 + 8,
        "sure": i % 3 == 0,
        "by": None if i == 5 else "é",
    }
    for i in range(24)
]


def saved(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> str:
    """The rows as a file, or a folder, of that kind."""
    file, frame = folder / f"rows.{kind}", pd.DataFrame(rows)
    if kind == "parquet":
        frame.to_parquet(file)
    elif kind in ("csv", "tsv"):
        frame.to_csv(file, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "jsonl":
        file.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(file))
    else:  # a folder of two files of different types, in which the rows lie in another order
        file.mkdir()
        frame[13:].to_csv(file / "a.csv", index=False)
        frame[:13].to_parquet(file / "b.parquet")
    return str(file)


def table(path: Any, **fields: Any) -> Task:
    return Task(**{"name": "table", "path": path, "prompt": "{q}", "answer": "a", **fields})


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "saved", "folder"])
@pytest.mark.parametrize("label", [None, "n", "sure"])
def test_every_type_of_file_gives_the_same_rows(tmp_path: Path, kind: str, label: str | None) -> None:
    fields = {"prompt": "{q} {by}" if label else "{q} {n} {by}", "answer": None if label else "a", "label": label}
    federation = Federation.model_validate({"clients": 3, "partition": {"kind": "dirichlet", "column": "sure"}})
    expected = load_pairs(table(saved(tmp_path, "parquet"), **fields), federation)
    other = table(saved(tmp_path, kind), **fields)
    assert load_pairs(other, federation) == expected
    data = [
        load_dataset(task, federation, ByteTokenizer(), 0)
        for task in (table(str(tmp_path / "rows.parquet"), **fields), other)
    ]
    assert data[0].fingerprint == data[1].fingerprint  # rows, splits and owners: all that a run's bits depend on
    assert (len(expected), set(expected.keys)) == (24, {"True", "False"})
    assert expected.class_names == {None: (), "n": ("8", "9", "10", "11"), "sure": ("False", "True")}[label]
    assert f'What is 3,\n"3"? {"" if label else "11 "}é' in expected.questions


def test_order_of_rows_and_files_changes_nothing(tmp_path: Path) -> None:
    federation = Federation.model_validate({"partition": {"kind": "iid"}})
    first, second = tmp_path / "1.jsonl", tmp_path / "2.csv"
    rows = [{"q": f"{i % 9}?", "a": f"{i}"} for i in range(18)]
    pd.DataFrame(rows[:7]).to_json(first, orient="records", lines=True)
    pd.DataFrame(rows[7:]).to_csv(second, index=False)
    pairs = load_pairs(table((str(first), str(second))), federation)
    assert load_pairs(table((str(second), str(first))), federation) == pairs
    assert load_pairs(table(str(tmp_path)), federation) == load_pairs(table(f"{tmp_path}/*.*"), federation) == pairs
    assert load_pairs(table(saved(tmp_path, "json", rows[::-1])), federation) == pairs
    # Of a classified text with two labels the same one is kept.
    labelled = [
        load_pairs(table(path, answer=None, label="a"), federation)
        for path in (str(tmp_path / "rows.json"), str(tmp_path))
    ]
    assert labelled[0] == labelled[1]
    assert len(labelled[0]) == 9


# --- bad data: one line each

QA = b'{"q": "one?", "a": "1"}\n'

BAD: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "a field too many": ({"r.csv": b'q,a\n"1\n2",x\n\ny,z,w\n'}, {}, "line 5 has 3 fields, the header 2 fields"),
    "a field too few": ({"r.tsv": b"q\ta\n1\n"}, {}, "line 2 has 1 field, the header 2 fields"),
    "an open quote": ({"r.csv": b'q,a\n1,2\n"3,4\n5,6\n'}, {}, "line 3: unexpected end of data"),
    "text after a quote": ({"r.csv": b'q,a\n"1"x,2\n'}, {}, "line 2: ',' expected after '\"'"),
    "a column twice": ({"r.csv": b"q,a,q\n1,2,3\n"}, {}, "line 1: the header has q more than once"),
    "a key twice": (
        {"r.jsonl": QA + b'{"q": "2", "q": "3", "a": "4"}'},
        {},
        "line 2: the key 'q' stands in one object",
    ),
    "a broken line": ({"r.jsonl": QA * 40 + b'{"q": "cut'}, {}, "line 41: Unterminated string starting at, column 7"),
    "no object": ({"r.jsonl": QA + b"\n7\n"}, {}, "line 3 is not a mapping of columns to values"),
    "a broken document": ({"r.json": b'[{"q": 1},\n{"q" 2}]'}, {}, "Expecting ':' delimiter: line 2 column 6"),
    "a document of one record": ({"r.json": b'{"q": "one?", "a": "1"}'}, {}, "must hold one list of records"),
    "half a surrogate": ({"r.jsonl": QA + b'{"q": "\\ud800", "a": "1"}'}, {}, "line 2: half of a surrogate pair"),
    "another encoding": ({"r.csv": "q,a\n1,2\nä,b\n".encode("latin-1")}, {}, "line 3: byte 0xe4 is not UTF-8"),
    "UTF-16": ({"r.csv": "q,a\n1,2\n".encode("utf-16")}, {}, "line 1: byte 0xff is not UTF-8"),
    "nothing": ({"r.jsonl": b""}, {}, "it is empty"),
    "no rows": ({"r.csv": b"q,a\n"}, {}, "a table with rows that have a prompt and an answer"),
    "blank cells alone": ({"r.csv": b"q,a\n  ,1\n2,\n"}, {}, "a table with rows that have a prompt and an answer"),
    "a torn Parquet file": ({"r.parquet": b"PAR1 and no more"}, {}, "a readable .parquet file"),
    "a nested answer": ({"r.jsonl": QA + b'{"q": "2", "a": {"text": ["3"]}}'}, {}, "line 2 of r.jsonl holds an object"),
    "a list": ({"r.json": b'[{"q": ["1"], "a": "2"}]'}, {}, "record 1 of r.json holds a list"),
    "a fraction": (
        {"r.jsonl": QA + b'{"q": "2", "a": 0.5}'},
        {},
        "line 2 of r.jsonl holds the number 0.5, which is not",
    ),
    "infinity": ({"r.jsonl": QA + b'{"q": "2", "a": Infinity}'}, {}, "line 2 of r.jsonl holds the number inf"),
    "a file without the column": ({"1.csv": b"q,a\n1,2\n", "2.csv": b"q,b\n1,2\n"}, {}, "2.csv has q, b"),
    "no such column": ({"r.csv": b"q;a\n1;2\n"}, {}, "a column of the table: q;a"),
    "no such file": ({"r.csv": b"q,a\n1,2\n"}, {"path": "r*.json"}, "a glob that files match"),
    "an unknown type": ({"r.xlsx": b"PK"}, {"path": "r.xlsx"}, "a file ending in .parquet"),
    "a folder of nothing known": ({"r.xlsx": b"PK"}, {}, "a folder with data that can be loaded"),
    "lists of unequal length by user": (
        {"r.json": b'{"users": ["u"], "user_data": {"u": {"q": ["1"], "a": []}}}'},
        {},
        "user_data of u must hold lists of equal length",
    ),
    "splits in one document": (
        {"r.json": b'{"train": [{"q": "1", "a": "2"}], "test": [{"q": "3", "a": "4"}], "n": []}'},
        {},
        "its keys, train, test, n, name splits, not clients; write a file for each split",
    ),
    "a client's own column": ({"r.json": b'{"u": [{"q": "1", "a": "2", "client": "v"}]}'}, {}, "have a column client"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line(case: str, tmp_path: Path) -> None:
    files, fields, message = BAD[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    path = str(tmp_path / fields["path"]) if "path" in fields else str(tmp_path)
    with pytest.raises(UserError) as caught:
        load_pairs(table(path), Federation.model_validate({"partition": {"kind": "iid"}}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


TYPED: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "bytes": (lambda: [None, b"x"], "row 2 of rows.parquet holds a cell of type binary"),
    "lists": (lambda: [None, None, ["x"]], "row 3 of rows.parquet holds a cell of type list"),
    "objects": (lambda: [{"text": "x"}], "row 1 of rows.parquet holds a cell of type struct"),
    "dates": (lambda: [pd.Timestamp("2026-01-02")], "row 1 of rows.parquet holds a cell of type timestamp"),
    "fractions": (lambda: [1.0, float("nan"), 2.5], "row 3 of rows.parquet holds the number 2.5, which is not whole"),
}


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (kind, field)
        for kind in TYPED
        for field in ("answer", "label", "prompt", "key")
        if field != "label" or kind not in ("lists", "fractions")  # which are labels: tests/data/test_labels.py
    ],
)
def test_cells_that_are_no_text_are_one_line(kind: str, field: str, tmp_path: Path) -> None:
    made, message = TYPED[kind]
    cells = made()
    frame = pd.DataFrame({"q": ["1"] * len(cells), "a": ["2"] * len(cells), "odd": cells})
    frame.to_parquet(tmp_path / "rows.parquet")
    fields = {
        "answer": {"answer": "odd"},
        "label": {"answer": None, "label": "odd"},
        "prompt": {"prompt": "{q} {odd}"},
        "key": {},
    }[field]
    partition = {"kind": "iid", "column": "odd"} if field == "key" else {"kind": "iid"}
    with pytest.raises(UserError) as caught:
        load_pairs(table(str(tmp_path / "rows.parquet"), **fields), Federation.model_validate({"partition": partition}))
    expected = "federation.partition.column" if field == "key" else f"task.{field}"
    assert (caught.value.field, caught.value.value) == (expected, "odd")
    assert message in str(caught.value)


def test_columns_that_nobody_asks_for_may_hold_anything(tmp_path: Path) -> None:
    frame = pd.DataFrame({"q": ["1"], "a": ["2"], "when": [pd.Timestamp("2026-01-02")], "data": [b"x"], "list": [[1]]})
    frame["kind"] = pd.Categorical(["x"])
    frame.to_parquet(tmp_path / "rows.parquet")
    iid = Federation.model_validate({"partition": {"kind": "iid"}})
    pairs = load_pairs(table(str(tmp_path / "rows.parquet"), prompt="{q} {kind}"), iid)
    assert (pairs.questions, pairs.answers) == (("1 x",), ("2",))


def test_large_files_are_memory_mapped_in_batches(tmp_path: Path) -> None:
    rows = [{"q": f"{i}? " + "é" * 60, "a": str(i)} for i in range(12_000)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    wanted = Wanted({"q": "task.prompt", "a": "task.answer"}, {})
    part = read_file(file, wanted, "task.path")
    assert isinstance(part.data.data, MemoryMappedTable)
    assert part.data[11_999] == {"q": rows[-1]["q"], "a": "11999"}
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"q": "1?", "a": [1]}\n')
    with pytest.raises(UserError, match=r"task\.answer: got 'a'; .* line 12001 of rows\.jsonl holds a list"):
        read_file(file, wanted, "task.path")
    assert not list(Path(tempfile.gettempdir()).glob("rayfed-sub-*.arrow"))


def test_folder_of_tables_may_hold_a_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows.csv").write_text("q,a\n1,2\n", encoding="utf-8")
    (tmp_path / "README.txt").write_text("What is in here", encoding="utf-8")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}', encoding="utf-8")
    (tmp_path / "plot.png").write_bytes(b"")
    iid = Federation.model_validate({"partition": {"kind": "iid"}})
    assert load_pairs(table(str(tmp_path)), iid).answers == ("2",)
    assert not caplog.messages
    for name in ("more.jsonl.gz", "b.arrow", "c.ARROW"):
        (tmp_path / name).write_bytes(b"")
    assert load_pairs(table(str(tmp_path)), iid).answers == ("2",)
    (said,) = caplog.messages
    assert said.startswith(f"task.path: files in {tmp_path} that are not read: 2 of .arrow, 1 of .gz; those read are .")


@pytest.mark.parametrize("fields", [{"path": ("{0}/a.csv", "{0}/../{1}/a.csv")}, {"path": ("{0}/*.csv", "{0}/a*")}])
@pytest.mark.parametrize("more", [{}, {"split_column": "s"}])
def test_file_that_is_named_twice_is_refused(fields: Any, more: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a,s\n1,2,train\n", encoding="utf-8")
    (tmp_path / "b.csv").symlink_to("a.csv")  # equal content, as in the hub's cache
    path = tuple(one.format(tmp_path, tmp_path.name) for one in fields["path"])
    iid = Federation.model_validate({"partition": {"kind": "iid"}})
    with pytest.raises(UserError, match=r"^task\.path: got .*each file once, .*a\.csv comes again; name it once"):
        load_pairs(table(path, **more), iid)
    assert load_pairs(table(f"{tmp_path}/*.csv", **more), iid).answers == ("2",)
