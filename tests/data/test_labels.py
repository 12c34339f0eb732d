"""Labels of tables: which problem they pose, in which form, and how they deal out rows; pairs of texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from rayfed_sub.config.schema import Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.batching import collate
from rayfed_sub.data.dataset import load_dataset
from rayfed_sub.data.given import given_rows, given_table
from rayfed_sub.data.labels import NOBODY, bins
from rayfed_sub.data.pairs import Pairs, canonical
from rayfed_sub.data.rows import Rows
from rayfed_sub.data.table_pairs import table_pairs
from rayfed_sub.models.tokenizers import ByteTokenizer

NAMES = [["joy"], [], ["anger", "joy"], ["joy"]]
HOT = [[0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]]


def written(path: Path, labels: Sequence[Any], **columns: Sequence[Any]) -> str:
    """A file of the type that the path says, with texts a0, a1, ... and a label each."""
    rows = [{"t": f"a{i}", "y": label} for i, label in enumerate(labels)]
    rows = [{**row, **{name: column[i] for name, column in columns.items()}} for i, row in enumerate(rows)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return str(path)


def read(path: str, key: str | None = None, **keys: Any) -> Pairs:
    return table_pairs(Task.model_validate({"name": "table", "path": path, "prompt": "{t}", "label": "y", **keys}), key)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_numbers_with_a_fraction_are_a_regression(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = read(written(tmp_path / f"rows{suffix}", [1, 0.25, 3.0, -2e-3]))
    assert (pairs.kind, pairs.class_names) == ("regression", ())
    assert list(pairs.answers) == ["1.0", "0.25", "3.0", "-0.002"]
    assert "y holds numbers with a fraction: task.problem=regression" in caplog.text


def test_whole_numbers_are_classes_unless_they_are_said_to_be_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [1, 10, 9])
    assert read(path).class_names == ("1", "9", "10")
    assert list(read(path, problem="regression").answers) == ["1.0", "10.0", "9.0"]


def test_texts_that_look_like_numbers_are_classes_where_the_file_is_text_and_others_are_none(tmp_path: Path) -> None:
    pairs = read(written(tmp_path / "rows.csv", ["1.5", "2.0", "2.0-beta"]))
    assert pairs.class_names == ("1.5", "2.0", "2.0-beta")
    assert read(written(tmp_path / "rows.csv", ["1.5", "2.5"]), problem="classification").kind == "classification"


@pytest.mark.parametrize(
    ("suffix", "labels", "names"),
    [
        (".jsonl", NAMES, ["anger", "joy"]),
        (".csv", NAMES, ["anger", "joy"]),  # as pandas writes lists: ['joy']
        (".parquet", NAMES, ["anger", "joy"]),
        (".parquet", [[5], [], [10, 5], [5]], ["5", "10"]),
        (".jsonl", HOT, ["0", "1", "2"]),
        (".parquet", [np.array(row, float) for row in HOT], ["0", "1", "2"]),
    ],
)
def test_lists_are_several_labels_a_row(suffix: str, labels: Any, names: list[str], tmp_path: Path) -> None:
    pairs = read(written(tmp_path / f"rows{suffix}", labels))
    assert (pairs.kind, list(pairs.class_names)) == ("multi-label", names)
    first, second = names[:2]
    one, both = (first, [first, second]) if names[0] == "5" else (second, [first, second])
    assert list(map(json.loads, pairs.answers)) == [[one], [], both, [one]]


@pytest.mark.parametrize("text", ["[{{}}]", "[{[1]: 2}]", "[" * 20_000 + "]" * 20_000], ids=["set", "key", "deep"])
def test_text_in_brackets_that_is_no_list_is_a_class(text: str, tmp_path: Path) -> None:
    assert read(written(tmp_path / "rows.csv", [text, "b"])).class_names == (text, "b")


def test_class_labels_inside_lists_have_their_names() -> None:
    types = datasets.Features(
        {"t": datasets.Value("string"), "y": datasets.List(datasets.ClassLabel(names=["calm", "joy", "anger"]))}
    )
    rows = datasets.Dataset.from_dict({"t": ["a", "b"], "y": [[1], [2, 0]]}, features=types)
    task = Task(name="given", prompt="{t}", label="y")
    pairs = table_pairs(task, None, given=lambda wanted: given_table(given_rows({"north": rows}), wanted))
    assert list(pairs.answers) == ['["joy"]', '["anger", "calm"]']


@pytest.mark.parametrize("names", [["0.5", "1.5"], ["[1]", "[2]"]], ids=["numbers", "lists"])
def test_class_labels_are_classes_whatever_their_names_look_like(names: list[str], tmp_path: Path) -> None:
    types = datasets.Features({"t": datasets.Value("string"), "y": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"t": ["a", "b"], "y": [1, 0]}, features=types)
    rows.to_parquet(tmp_path / "rows.parquet")
    pairs = read(str(tmp_path / "rows.parquet"))
    assert (pairs.kind, pairs.class_names, list(pairs.answers)) == ("classification", tuple(names), names[::-1])


def test_columns_of_0_and_1_are_labels_in_their_own_order(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", [0, 0, 1, 1], z=[True, False, True, True], m=[1, 0, 1, None])
    pairs = read(path, label=["z", "m", "y"])
    assert (pairs.kind, pairs.class_names) == ("multi-label", ("z", "m", "y"))
    assert list(pairs.answers) == ['["z", "m"]', "[]", '["z", "m", "y"]']  # the last row lacks one


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_cell_that_is_neither_0_nor_1_is_shown_as_it_is(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"each label; row 2 of rows\S+ holds the number 0\.5; correct it"):
        read(written(tmp_path / f"rows{suffix}", [0, 0.5], z=[0, 1]), label=["z", "y"])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_numbers_may_be_larger_than_whole_numbers_of_floats(suffix: str, tmp_path: Path) -> None:
    pairs = read(written(tmp_path / f"rows{suffix}", [1e20, 0.5, -(2.0**54)]))
    assert list(pairs.answers) == ["1e+20", "0.5", "-1.8014398509481984e+16"]


def test_rows_without_a_label_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = read(written(tmp_path / "rows.jsonl", [0.5, None, 1.5]))
    assert list(pairs.answers) == ["0.5", "1.5"]
    assert "1 of 3 rows have no prompt, label or key; dropped" in caplog.text


def test_numbers_deal_out_rows_by_quantile_bins() -> None:
    """Of 0, 1, ..., 99 the tenths begin at 0, 9.9, 19.8, ...; few different values make fewer bins."""
    values = [float(value) for value in range(100)]
    found = bins(values, values)
    assert found[:10] == ["0 to 9.9"] * 10
    assert found[99] == "89.1 to 99"
    assert len(set(found)) == 10
    assert bins([1.0, 1.0], [1.0, 1.0]) == ["1", "1"]
    years = [2000 + value / 100 for value in values]
    assert bins(years, years)[::99] == ["2000 to 2000.1", "2000.9 to 2001"]
    for begin in (1.7e9, 1e-3, -5e15):  # what differs in the last of all digits
        near = [begin]
        while len(near) < 100:
            near.append(float(np.nextafter(near[-1], np.inf)))
        assert len(set(bins(near, near))) == 10


def test_several_labels_deal_out_rows_by_the_rarest(tmp_path: Path) -> None:
    """joy is on three rows, anger on one."""
    path = written(tmp_path / "rows.jsonl", NAMES)
    assert list(read(path, key="y").keys) == ["joy", NOBODY, "anger", "joy"]


@pytest.mark.parametrize("kind", ["dirichlet", "shards", "iid"])
@pytest.mark.parametrize("labels", [[i / 7 for i in range(60)], [NAMES[i % 4] for i in range(60)]], ids=["n", "s"])
def test_partitions_by_label_take_numbers_and_lists(
    kind: str, labels: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "rows.jsonl", labels)
    task = Task(name="table", path=path, prompt="{t}", label="y")
    federation = Federation.model_validate({"clients": 3, "partition": {"kind": kind}})
    dataset = load_dataset(task, federation, ByteTokenizer(), seed=0)
    assert sorted(dataset.client_rows.tolist()) == list(range(len(dataset.train)))
    assert all(len(dataset.rows_of(client)) for client in range(3))
    assert isinstance(dataset.train, Rows)
    assert dataset.train.classes.dtype == np.float32
    assert dataset.train.classes.shape[1] == (1 if dataset.kind == "regression" else 2)


def test_pair_is_two_texts_with_their_types(tmp_path: Path) -> None:
    """bos, the bytes of the first text, eos, those of the second, eos: "a0" and "it: bc"."""
    path = written(tmp_path / "rows.jsonl", [i % 2 for i in range(20)], u=["bc"] * 20)
    task = Task.model_validate({"name": "table", "path": path, "prompt": ["{t}", "it: {u}"], "label": "y"})
    federation = Federation.model_validate({"clients": 2, "partition": {"kind": "iid"}})
    dataset = load_dataset(task, federation, ByteTokenizer(), seed=0)
    rows = dataset.train
    assert isinstance(rows, Rows)
    at = next(i for i in range(len(rows)) if rows.row(i)[2:4].tolist() == [ord("0") + 3, 2])
    assert rows.row(at).tolist() == [1, *(byte + 3 for byte in b"a0"), 2, *(byte + 3 for byte in b"it: bc"), 2]
    assert rows.types_of(at).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    longest = int(np.argmax(rows.lengths))
    batch = collate(rows, np.array([at, longest]), mask_prompt=True, pad=0)
    assert batch["token_type_ids"].tolist()[0] == [0] * 4 + [1] * 7 + [0] * (int(rows.lengths[longest]) - 11)
    assert rows.in_memory().types_of(at).tolist() == rows.types_of(at).tolist()


def test_pair_without_one_of_its_texts_is_dropped(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [0, 1, 0], u=["b", "", None])
    pairs = read(path, prompt=["{t}", "{u}"])
    assert (list(pairs.questions), pairs.paired) == (["a0\nb"], True)


def test_pairs_of_the_same_characters_are_two_where_the_texts_differ(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [0, 1, 0], u=["b\nc", "c", "b\nc"], v=["a", "a\nb", "a"])
    pairs = canonical(read(path, prompt=["{v}", "{u}"]))
    assert sorted(span[0][1] for span in pairs.spans) == [1, 3]


@pytest.mark.parametrize(("first", "second", "kept"), [(9, 2, (5, 2)), (2, 9, (2, 5)), (9, 9, (3, 4)), (3, 4, (3, 4))])
def test_pair_loses_tokens_of_the_longer_text(first: int, second: int, kept: tuple[int, int]) -> None:
    """Of 10 tokens three are the tokenizer's own, as transformers' `longest_first`: the shorter text stays whole while
    it has less than half of the rest."""
    (made,) = ByteTokenizer().pairs(10)([("x" * first, "y" * second)])
    assert (made.types.count(0) - 2, made.types.count(1) - 1) == kept
    assert made.cut == ((first, second) != kept)


def test_label_that_no_number_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text, finite numbers, .* or lists .* the number inf, which is not finite"):
        read(written(tmp_path / "rows.parquet", [0.5, float("inf")]))
    with pytest.raises(UserError, match="holds 'nan'; correct it"):
        read(written(tmp_path / "rows.csv", ["0.5", "'nan'".strip("'"), "x"]), problem="regression")


def test_quiet_where_the_problem_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(written(tmp_path / "rows.jsonl", [0.5, 1.5]), problem="regression")
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("train", "test", "problem"),
    [
        ([0, 1, 1], -1, "classification"),  # GLUE's
        ([0.5, 5, 2], -1.0, "regression"),  # STS-B's
        ([[0, 1], [1, 1], [0, 0]], [-1, -1], "multi-label"),
        ([[0, 3], [1], []], [-1], "multi-label"),
    ],
)
def test_test_rows_of_minus_1_have_no_label(train: Any, test: Any, problem: str, suffix: str, tmp_path: Path) -> None:
    written(tmp_path / f"train{suffix}", train)
    written(tmp_path / f"test{suffix}", [test, test])
    with pytest.raises(UserError, match=r"^task\.test: got None; allowed: a split with rows .*lack text, label or key"):
        read(str(tmp_path), problem=problem)


def test_minus_1_is_a_label_where_training_rows_have_it_or_other_numbers_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mood of -1, 0 or 1; temperatures, of which one test row has -1; and labels down to -2."""
    for train, test, problem, names in (
        ([-1, 0, 1], [-1, 1], "classification", ("-1", "0", "1")),
        ([0.5, 5, 2], [-1, 3], "regression", ()),
        ([-2, 0, 1], [-1, 1], "classification", ("-2", "-1", "0", "1")),
    ):
        written(tmp_path / "train.jsonl", train)
        written(tmp_path / "test.jsonl", test)
        pairs = read(str(tmp_path), problem=problem)
        assert (len(pairs), pairs.class_names) == (5, names)
    said = [note for note in caplog.messages if "no training row" in note]
    assert said == ["task.label: no training row has 1 of 4 labels: -1"]


def test_labels_that_only_test_rows_have_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path / "train.jsonl", [["joy"], ["fear"]])
    written(tmp_path / "test.jsonl", [["joy"], ["joy", "rage"]])
    assert read(str(tmp_path)).class_names == ("fear", "joy", "rage")
    assert "task.label: no training row has 1 of 3 labels: rage" in caplog.text


@pytest.mark.parametrize("label", [["\ud800"], '["\\ud800"]'], ids=["list", "text"])
def test_list_with_half_a_surrogate_pair_is_refused(label: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 2 of rows\.jsonl holds the list \["):
        read(written(tmp_path / "rows.jsonl", [["joy"], label]), problem="multi-label")
