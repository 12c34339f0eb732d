"""Clients as their source has them: files and folders, row numbers, LEAF's and FedLLM-Bench's JSON, partitioners."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from flwr_datasets import partitioner

from rayfed_sub.config.checks import check_rules
from rayfed_sub.config.schema import Config, Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.dataset import Dataset, load_dataset, load_pairs
from rayfed_sub.models.image_processors import HubImageProcessor
from rayfed_sub.models.tokenizers import ByteTokenizer
from tests.helpers.pictures import drawn


def rows(begin: int, end: int, **more: Any) -> list[dict[str, Any]]:
    return [{"q": f"{i}?", "a": f"{i}", **more} for i in range(begin, end)]


def written(file: Path, records: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records) if file.suffix == ".jsonl" else json.dumps(records)
    file.write_text(lines, encoding="utf-8")
    return str(file)


def table(path: Any, **fields: Any) -> Task:
    return Task(**{"name": "table", "path": path, "prompt": "{q}", "answer": "a", **fields})


def dealt(clients: int, **partition: Any) -> Federation:
    return Federation.model_validate({"clients": clients, "partition": partition})


def held(data: Dataset) -> dict[str, tuple[int, int]]:
    """Training and held-out rows of each client."""
    return {
        name: (len(data.rows_of(client)), data.held_out_clients.tolist().count(client))
        for client, name in enumerate(data.client_names)
    }


PLACES = {
    "a folder each": "{client}/{split}.jsonl",
    "a folder of each split": "{split}/{client}.jsonl",
    "both in the name": "{client}_{split}.jsonl",
    "shards": "{client}/{split}-00000-of-00001.jsonl",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_clients_of_files_have_their_own_test_rows(place: str, tmp_path: Path) -> None:
    for begin, client, train, test in ((0, "south", 6, 3), (20, "north", 9, 1), (40, "east", 2, 5)):
        written(tmp_path / place.format(client=client, split="train"), rows(begin, begin + train))
        written(tmp_path / place.format(client=client, split="test"), rows(begin + 10, begin + 10 + test))
    data = load_dataset(table(str(tmp_path)), dealt(3, kind="files"), ByteTokenizer(), 0)
    assert held(data) == {"north": (9, 1), "south": (6, 3), "east": (2, 5)}
    assert data.split == "test"


def test_official_split_of_other_clients_is_not_replaced_by_a_share(tmp_path: Path) -> None:
    written(tmp_path / "train" / "alice.jsonl", rows(0, 9))
    written(tmp_path / "test" / "zoe.jsonl", rows(20, 29))
    with pytest.raises(UserError, match=r"task\.test: got None; allowed: a split with rows of the clients that train"):
        load_dataset(table(str(tmp_path)), dealt(1, kind="files"), ByteTokenizer(), 0)


def test_saved_data_set_has_no_clients_by_file(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows(0, 9)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"federation\.partition\.kind: got 'files'; .*name a column that does"):
        load_pairs(table(str(tmp_path / "saved")), dealt(1, kind="files"))


def test_clients_of_files_without_test_rows(tmp_path: Path) -> None:
    for client, count in (("a", 10), ("b", 20), ("c", 5)):
        written(tmp_path / f"{client}.jsonl", rows(100 * count, 101 * count))
    for path in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        data = load_dataset(table(path, test_share=0.2), dealt(2, kind="files"), ByteTokenizer(), 0)
        assert held(data) == {"b": (16, 4), "a": (8, 2)}  # the two largest
        assert data.row_counts.strange == 5
    north = written(tmp_path / "north" / "train.jsonl", rows(0, 10))
    named = load_dataset(table((north, str(tmp_path / "a.jsonl"))), dealt(2, kind="files"), ByteTokenizer(), 0)
    assert set(named.client_names) == {"north", "a"}
    (tmp_path / "north" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"federation\.clients: got 4; allowed: 1 to 3, .* column client"):
        load_dataset(table(str(tmp_path)), dealt(4, kind="files"), ByteTokenizer(), 0)


def test_folders_of_images_by_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, client in enumerate("ab"):
        for kind in ("disc", "cross"):
            (tmp_path / "set" / client / kind).mkdir(parents=True)
            for i in range(2 + number):
                drawn(kind, 10 * number + i).save(tmp_path / "set" / client / kind / f"{i}.png")
    task = Task(name="table", path=str(tmp_path / "set"), image="image", label="label")
    pairs = load_pairs(task, dealt(2, kind="files"))
    assert (Counter(pairs.keys), pairs.class_names) == ({"a": 4, "b": 6}, ("cross", "disc"))


def test_client_whose_name_begins_like_a_split_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device, perhaps."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, client in enumerate(("dev1", "dev2")):
        (tmp_path / "set" / client / "disc").mkdir(parents=True)
        drawn("disc", number).save(tmp_path / "set" / client / "disc" / "0.png")
    task = Task(name="table", path=str(tmp_path / "set"), image="image", label="label")
    assert Counter(load_pairs(task, dealt(2, kind="files")).keys) == {"dev1": 1, "dev2": 1}


def test_folders_of_images_by_client_in_folders_of_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits are no clients: what lies in test is held out.  Text beside images is no row."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("train", 3), ("test", 1)):
        for client in ("north", "south"):
            for kind in ("disc", "cross"):
                folder = tmp_path / "set" / split / client / kind
                folder.mkdir(parents=True)
                for i in range(count):
                    drawn(kind, len(list(tmp_path.rglob("*.png")))).save(folder / f"{i}.png")
    (tmp_path / "set" / "classes.txt").write_text("disc\ncross\n")
    task = Task(name="table", path=str(tmp_path / "set"), image="image", label="label")
    data = load_dataset(task, dealt(2, kind="files"), HubImageProcessor(8, (0.5,) * 3, (0.5,) * 3), 0)
    assert held(data) == {"north": (6, 2), "south": (6, 2)}
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "set" / split / "north", tmp_path / "bare" / split)
    bare = task.model_copy(update={"path": str(tmp_path / "bare")})
    with pytest.raises(
        UserError, match=r"^federation\.partition\.kind: got 'files'; .*no folder names a client: .*cross"
    ):
        load_pairs(bare, dealt(2, kind="files"))


@pytest.mark.parametrize("kind", ["leaf", "fedllm-bench"])
def test_published_json_by_client(kind: str, tmp_path: Path) -> None:
    users = {"u1": rows(0, 8), "u2": rows(10, 14)}
    tests = {"u1": rows(20, 21), "u2": rows(30, 33)}

    def form(records: dict[str, list[dict[str, Any]]]) -> Any:
        if kind == "fedllm-bench":
            return records
        columns = {user: {name: [row[name] for row in own] for name in ("q", "a")} for user, own in records.items()}
        return {"users": list(records), "num_samples": [len(own) for own in records.values()], "user_data": columns}

    train, test = written(tmp_path / "x.json", form(users)), written(tmp_path / "y.json", form(tests))
    data = load_dataset(table(train, test=test), dealt(2, kind="column", column="client"), ByteTokenizer(), 0)
    assert held(data) == {"u1": (8, 1), "u2": (4, 3)}


def test_row_numbers_count_the_source_s_own_rows(tmp_path: Path) -> None:
    """Rows 2 (no answer) and 5 (a repeat of 0) are dropped; the numbers of the others stay."""
    records = rows(0, 12)
    records[2]["a"] = None
    records[5] = records[0]
    path = written(tmp_path / "rows.jsonl", records)
    lists = {"x": [0, 1, 2, 3], "y": [11, 10, 9, 8, 7]}
    partition = {"kind": "rows", "file": written(tmp_path / "clients.json", lists)}
    pairs = load_pairs(table(path), dealt(2, **partition))
    assert dict(zip(pairs.answers, pairs.keys, strict=True)) == {
        **dict.fromkeys("013", "x"),
        **dict.fromkeys(("7", "8", "9", "10", "11"), "y"),
    }
    listed = {"kind": "rows", "file": written(tmp_path / "lists.json", list(lists.values()))}
    assert set(load_pairs(table(path), dealt(2, **listed)).keys) == {"client 0", "client 1"}


def test_row_numbers_of_personal_test_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", rows(0, 12))
    own = {"x": {"train": [0, 1, 2], "test": [3]}, "y": {"train": [4, 5, 6, 7], "test": [8, 9]}}
    partition = {"kind": "rows", "file": written(tmp_path / "clients.json", own)}
    data = load_dataset(table(path), dealt(2, **partition), ByteTokenizer(), 0)
    assert (held(data), data.split) == ({"y": (4, 2), "x": (3, 1)}, "test")
    other = written(tmp_path / "test.jsonl", rows(50, 60))  # with test rows of their own, numbers count those
    data = load_dataset(table(path, test=other), dealt(2, **partition), ByteTokenizer(), 0)
    assert held(data)["y"] == (4, 2)
    assert len(data.held_out) == 3
    pairs = load_pairs(table(path, test=other), dealt(2, **partition))
    assert {q for q, split in zip(pairs.questions, pairs.splits, strict=True) if split == "test"} == {
        "53?",
        "58?",
        "59?",
    }


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"x": [0, 12]}, "row numbers from 0 to 11; x has 12"),
        ({"x": [0, -1]}, "row numbers from 0 to 11; x has -1"),
        ({"x": ["0"]}, "row numbers from 0 to 11; x has '0'"),
        ({"x": [0, 1], "y": [1]}, "each row once; x and y have 1"),
        ({"x": {"trian": [0]}}, "lists of train, validation and test; x has 'trian'"),
        ({"x": 3}, "a list of row numbers for each client"),
        (7, "a list of row numbers for each client, in a list or by client"),
        ({}, "a list of row numbers for each client, in a list or by client"),
    ],
)
def test_wrong_row_numbers_are_one_line(lists: Any, message: str, tmp_path: Path) -> None:
    path, file = written(tmp_path / "rows.jsonl", rows(0, 12)), written(tmp_path / "clients.json", lists)
    with pytest.raises(UserError) as caught:
        load_pairs(table(path), dealt(1, kind="rows", file=file))
    assert caught.value.field == "federation.partition.file"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("DirichletPartitioner", {"partition_by": "y", "alpha": 0.5, "min_partition_size": 1, "seed": 7}),
        ("PathologicalPartitioner", {"partition_by": "y", "num_classes_per_partition": 2}),
        ("ShardPartitioner", {"partition_by": "y", "num_shards_per_partition": 2}),
        ("LinearPartitioner", {}),
        ("IidPartitioner", {}),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_partitioners_deal_out_as_flwr_datasets_does(
    name: str, args: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    records = [{**row, "y": (7 * i) % 12} for i, row in enumerate(rows(0, 120))]
    data = datasets.Dataset.from_list(records)
    data.to_csv(tmp_path / "rows.csv")
    written(tmp_path / "rows.jsonl", records)
    theirs = getattr(partitioner, name)(num_partitions=4, **args)
    theirs.dataset = data
    pairs = load_pairs(table(str(tmp_path / f"rows.{suffix}")), dealt(4, kind="flwr", partitioner=name, args=args))
    for client in range(4):
        ours = {q for q, key in zip(pairs.questions, pairs.keys, strict=True) if key == f"client {client}"}
        assert ours == set(theirs.load_partition(client)["q"])


@pytest.mark.parametrize(
    ("partition", "field", "message"),
    [
        ({"partitioner": "Dirichlet"}, "partitioner", "one of flwr-datasets': "),
        ({"partitioner": "VerticalSizePartitioner"}, "partitioner", "one of flwr-datasets': "),
        (
            {"partitioner": "IidPartitioner", "args": {"alpha": 1}},
            "args",
            "arguments of IidPartitioner: num_partitions",
        ),
        ({"partitioner": "IidPartitioner", "args": {"num_partitions": 9}}, "args", "federation.clients=10 as"),
        ({"partitioner": "SizePartitioner", "args": {"partition_sizes": [900]}}, "args", "deals out 500 rows"),
        (
            {"partitioner": "DirichletPartitioner", "args": {"partition_by": "y", "alpha": 0.1}},
            "args",
            "It wants min_partition_size=10 rows for every client, which Dirichlet(0.1) seldom gives 10 clients of 500",
        ),
        (
            {"partitioner": "NaturalIdPartitioner", "args": {"partition_by": "z"}},
            "args.partition_by",
            "the table: q, a, y",
        ),
    ],
)
def test_what_partitioners_refuse_is_one_line(
    partition: dict[str, Any], field: str, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", [{**row, "y": i % 2} for i, row in enumerate(rows(0, 500))])
    with pytest.raises(UserError) as caught:
        load_pairs(table(path), dealt(10, kind="flwr", **partition))
    assert caught.value.field == f"federation.partition.{field}"
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "rows"},
        {"kind": "flwr"},
        {"kind": "iid", "file": "x.json"},
        {"kind": "iid", "partitioner": "IidPartitioner"},
        {"kind": "column", "args": {"seed": 1}},
        {"kind": "files", "column": "by"},
        {"kind": "files", "largest": 3},
    ],
)
def test_keys_that_do_not_go_together(partition: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^federation\.partition\."):
        check_rules(Config.model_validate({"federation": {"partition": partition}}))
