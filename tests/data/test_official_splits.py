"""Official splits by folder, file, name and column, and what they share."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from rayfed_sub.config.loading import load_config, stored_config
from rayfed_sub.config.schema import Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.dataset import Dataset, load_dataset
from rayfed_sub.models.tokenizers import ByteTokenizer

IID = {"clients": 2, "partition": {"kind": "iid"}}


def rows(begin: int, end: int, **more: Any) -> list[dict[str, Any]]:
    return [{"q": f"{i}?", "a": f"{i}", **more} for i in range(begin, end)]


def written(file: Path, records: list[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def built(path: Any, federation: dict[str, Any] = IID, judged: Any = "held-out", **fields: Any) -> Dataset:
    task = Task(**{"name": "table", "path": path, "prompt": "{q}", "answer": "a", **fields})
    return load_dataset(task, Federation.model_validate(federation), ByteTokenizer(), 0, judged)


def sizes(data: Dataset) -> tuple[int, int, int]:
    return data.row_counts.train, data.row_counts.validation, data.row_counts.held_out


def test_folder_s_own_splits_are_used(tmp_path: Path) -> None:
    for name, (begin, end) in {"train-1": (0, 12), "train-2": (12, 20), "dev": (20, 25), "test": (30, 37)}.items():
        written(tmp_path / f"{name}.jsonl", rows(begin, end))
    data = built(str(tmp_path))
    assert (sizes(data), data.split) == ((20, 5, 7), "test")
    validation = built(str(tmp_path), judged="validation")
    assert (len(validation.held_out), validation.split) == (5, "validation")
    shares = built(str(tmp_path), test=(), validation=(), test_share=0.2)
    assert (sizes(shares), shares.split) == ((16, 0, 4), "held-out share")
    swapped = built(str(tmp_path), test="validation")
    assert (sizes(swapped), swapped.split) == ((20, 0, 5), "test (validation)")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("train-1", "test")]
    named = built(None, train=f"{tmp_path}/train-*.jsonl", test=files[1], validation_share=0.1)
    assert (sizes(named), named.split) == ((18, 2, 7), "test (test.jsonl)")


def test_words_of_splits_may_have_numbers(tmp_path: Path) -> None:
    """As `datasets` reads the names of files."""
    names = {"train1": (0, 12), "v2-train2": (12, 20), "val2017": (20, 25), "test1": (30, 33), "wmt14test": (33, 37)}
    for name, (begin, end) in names.items():
        written(tmp_path / f"{name}.jsonl", rows(begin, end))
    assert sizes(built(str(tmp_path))) == (20, 5, 7)


@pytest.mark.parametrize("named", ["{0}/test1.jsonl", ["{0}/train.jsonl", "{0}/test1.jsonl"], "{0}/t*.jsonl"])
def test_files_that_are_trained_on_against_their_names(
    named: str | list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path / "train.jsonl", rows(0, 9))
    written(tmp_path / "test1.jsonl", rows(9, 20))
    path = named.format(tmp_path) if isinstance(named, str) else tuple(name.format(tmp_path) for name in named)
    for fields, said in (({}, True), ({"train": path, "path": None}, False), ({"path": str(tmp_path)}, False)):
        caplog.clear()
        built(**{"path": path, **fields})
        found = re.search(r"1 of \d training files have names of another split: \S*test1\.jsonl; name", caplog.text)
        assert (found is not None) == said


def test_saved_splits_and_columns_of_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = {"train": rows(0, 20), "test": rows(20, 26), "unsupervised": rows(40, 50)}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(records) for name, records in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    column = [{**row, "part": name} for name, records in splits.items() for row in records]
    with caplog.at_level(logging.WARNING):
        by_folder = built(str(tmp_path / "saved"))
        by_column = built(written(tmp_path / "rows.jsonl", column), split_column="part")
    assert by_folder.fingerprint == by_column.fingerprint
    assert (sizes(by_folder), by_folder.split, by_column.split) == ((20, 0, 6), "test", "test")
    messages = [record.getMessage() for record in caplog.records]
    assert "task.path: the splits unsupervised are not used" in messages
    assert "task.split_column: 10 of 36 rows are in no split that is used" in messages
    other = built(str(tmp_path / "rows.jsonl"), split_column="part", test="unsupervised", train=("train", "test"))
    assert (sizes(other), other.split) == ((26, 0, 10), "test (unsupervised)")


def test_shared_questions_stay_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Test has 3 questions of train and 2 of validation, validation 1 of train; two rows of test are equal."""
    written(tmp_path / "train.jsonl", rows(0, 20))
    written(tmp_path / "validation.jsonl", rows(19, 25))
    written(tmp_path / "test.jsonl", [*rows(0, 3), *rows(20, 22), *rows(30, 34), *rows(33, 34)])
    with caplog.at_level(logging.WARNING):
        data = built(str(tmp_path))
    assert sizes(data) == (20, 6, 10)
    assert (data.row_counts.shared, data.row_counts.repeated, data.row_counts.read) == (6, 0, 36)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 6 validation rows and 5 of 10 test rows ask what stands in another official split too, "
        "but for case, spaces and what is cut"
    ]


def test_drawn_validation_gives_way_to_nothing_official(tmp_path: Path) -> None:
    """Training rows that repeat a drawn validation question are left out; those that repeat a test question stay."""
    written(tmp_path / "train.jsonl", [*rows(0, 20), *({**row, "a": "Again."} for row in rows(0, 20))])
    written(tmp_path / "test.jsonl", rows(0, 4))
    data = built(str(tmp_path), validation_share=0.1)
    assert data.row_counts.held_out == 4
    assert data.row_counts.validation == 4
    assert data.row_counts.train + data.row_counts.repeated == 36
    assert data.row_counts.repeated > 0


def test_drawn_splits_are_apart_from_official_ones(tmp_path: Path) -> None:
    """Half of the training rows stand in the official split; none of them is drawn, and all stay in training."""
    written(tmp_path / "train.jsonl", rows(0, 20))
    for official, drawn in {"test": "validation", "validation": "held-out"}.items():
        written(tmp_path / f"{official}.jsonl", rows(0, 10))
        shares = {"validation_share": 0.4} if official == "test" else {"test_share": 0.4}
        judged = [built(str(tmp_path), judged=split, **shares) for split in ("validation", "held-out")]
        (tmp_path / f"{official}.jsonl").unlink()
        ours, theirs = ({bytes(data.held_out.row(row)) for row in range(len(data.held_out))} for data in judged)
        assert not ours & theirs
        counts = judged[0].row_counts
        assert (counts.train, counts.repeated, counts.shared) == (12, 0, 10), drawn


def test_max_rows_leaves_official_test_rows(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", rows(0, 20))
    written(tmp_path / "test.jsonl", rows(20, 30))
    assert sizes(built(str(tmp_path), max_rows=8)) == (8, 0, 10)


def test_test_rows_of_clients_and_of_nobody(tmp_path: Path) -> None:
    """A client's test rows are its own, those without a client are dealt out in proportion."""
    by = {"clients": 2, "partition": {"kind": "column", "column": "by"}}
    train = [*rows(0, 30, by="x"), *rows(30, 40, by="y"), *rows(40, 42, by="z")]
    test = [*rows(50, 53, by="y"), *rows(60, 64), *rows(70, 72, by="z")]
    written(tmp_path / "train.jsonl", train)
    written(tmp_path / "test.jsonl", test)
    data = built(str(tmp_path), by)
    assert data.client_names == ("x", "y")
    assert data.held_out_clients.tolist().count(1) == 3 + 1  # its own, and a quarter of the four
    assert (len(data.held_out), data.row_counts.strange) == (7, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test": "tset"}, "task.test: got 'tset'; allowed: a split of {}"),
        ({"train": "no.csv", "path": None}, "task.train: got 'no.csv'; allowed: a file that exists"),
        ({"test": "train"}, "task.test: got 'train'; allowed: other rows than task.train has; train.jsonl is in both"),
        ({"train": ()}, "task.train: got (); allowed: names of the training rows, of the splits test, train"),
        ({"split_column": "s", "test": "x"}, "task.test: got 'x'; allowed: values of the column s: dev, train"),
        ({"split_column": "t"}, "task.train: got None; allowed: values of the column t: a; set task.train; there is"),
        ({"split_column": "s", "validation": "train"}, "task.validation: got 'train'; allowed: other rows than"),
        ({"split_column": "q"}, "task.train: got None; allowed: values of the column q: "),
        ({"split_column": "z"}, "task.split_column: got 'z'; allowed: a column of the table: q, a, s, t"),
        ({"test": "unlabelled.jsonl"}, "task.test: got 'unlabelled.jsonl'; allowed: a split with rows that have all"),
    ],
)
def test_wrong_splits_are_one_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = tmp_path / "set"
    written(folder / "train.jsonl", [*rows(0, 10, s="train", t="a"), *rows(10, 12, s="dev", t="a")])
    written(folder / "test.jsonl", rows(20, 22, s="dev", t="a"))
    (folder / "more").mkdir()
    written(tmp_path / "unlabelled.jsonl", [{**row, "a": None} for row in rows(0, 3)])
    if fields.get("test") == "unlabelled.jsonl":
        fields = {"test": str(tmp_path / "unlabelled.jsonl")}
        message = message.replace("'unlabelled.jsonl'", repr(fields["test"]))
    with pytest.raises(UserError) as caught:
        built(**{"path": str(folder), **fields})
    assert str(caught.value).startswith(message.format(folder))
    assert "\n" not in str(caught.value)


def test_validation_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.split: got 'validation'; .*set a share"):
        built(written(tmp_path / "rows.jsonl", rows(0, 20)), judged="validation")


def test_old_keys_and_old_runs(tmp_path: Path) -> None:
    for old, new in {
        "task.held_out=0.2": "task.test_share, which replaces it; set task.test_share instead",
        "task.split=test": "task.train, which replaces it; set task.train instead",
        "task.validation=0.1": "a share is task.validation_share; set task.validation_share=0.1 instead",
    }.items():
        with pytest.raises(UserError) as caught:
            load_config({}, [old])
        assert new in str(caught.value)
    (tmp_path / "config.yaml").write_text("task: {split: train, held_out: 0.2, validation: 0.1}\n", encoding="utf-8")
    task = stored_config(tmp_path).task
    assert (task.train, task.test_share, task.validation_share) == (None, 0.2, 0.1)
    (tmp_path / "config.yaml").write_text("task: {name: table, path: a/b, split: all, validation: 0}\n")
    task = stored_config(tmp_path).task
    assert (task.train, task.test_share, task.validation_share) == ("all", 0.1, 0.0)
