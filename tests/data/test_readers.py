"""Files of every type as one table: equal cells, and one line for each kind of bad data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from rayfed_sub.config.schema import Federation, Task
from rayfed_sub.data.dataset import load_pairs

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
    federation = Federation.model_validate({"partition": {"kind": "iid", "column": "sure"}})
    expected = load_pairs(table(saved(tmp_path, "parquet"), **fields), federation)
    assert load_pairs(table(saved(tmp_path, kind), **fields), federation) == expected
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
