"""Rows that a Python call hands over: the same data set as the same rows in files, and every mistake in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from rayfed_sub.config.schema import Federation, Partition, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.dataset import Dataset, load_dataset
from rayfed_sub.data.given import given_rows, own_pairs
from rayfed_sub.data.objects import AsTheyAre
from rayfed_sub.models.image_processors import HubImageProcessor
from rayfed_sub.models.tokenizers import ByteTokenizer
from tests.helpers.pictures import KINDS, drawn, filed

CLIENTS = {"north": range(8), "south": range(8, 14), "west": range(14, 19)}
RECORDS = {
    name: [{"q": f"what is {i}?", "a": f" it is {i} ", "n": i % 2} for i in rows] for name, rows in CLIENTS.items()
}
TEXTS = {"prompt": "{q} {n}", "answer": "a", "max_length": 64, "test_share": 0.2}
BY_NAME = Federation(clients=3, partition=Partition(kind="files"))


class Listed(torch.utils.data.Dataset[Any]):
    """A torch data set whose numbers are torch's and numpy's."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**row, "n": np.int64(row["n"]) if index % 2 else torch.tensor(row["n"])}


def chosen(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """The rows by an index over a larger set in another order."""
    whole = datasets.Dataset.from_list([*rows[::-1], *RECORDS["west"]])
    return whole.select(range(len(rows))[::-1])


def handed(data: Any, fields: dict[str, Any] = TEXTS, processor: Any = None, **more: Any) -> Dataset:
    task, clients = Task(name="given", **fields), BY_NAME.model_copy(update={"clients": len(data)})
    return load_dataset(task, clients, processor or ByteTokenizer(), 0, given=given_rows(data, **more))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list, chosen, Listed])
def test_given_texts_are_those_of_files(suffix: str, form: Callable[[Any], Any], tmp_path: Path) -> None:
    """The same fingerprint: tokens, splits, owners, and so the same run."""
    file = tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame([{**row, "at": name} for name, rows in RECORDS.items() for row in rows])
    if suffix in ("csv", "tsv"):
        frame.to_csv(file, index=False, sep="," if suffix == "csv" else "\t")
    elif suffix == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_parquet(file)
    column = Federation(clients=3, partition=Partition(kind="column", column="at"))
    there = load_dataset(Task(name="table", path=str(file), **TEXTS), column, ByteTokenizer(), 0)
    # Neither the order of the clients nor that of their rows counts.
    here = handed({name: form(rows[::-1]) for name, rows in reversed(RECORDS.items())})
    assert here.fingerprint == there.fingerprint
    assert here.client_names == there.client_names == ("north", "south", "west")
    assert [len(here.rows_of(k)) for k in range(3)] == [len(there.rows_of(k)) for k in range(3)]


def test_given_images_are_those_of_files(tmp_path: Path) -> None:
    pictures = {name: [(kind, drawn(kind, i)) for i in rows for kind in KINDS] for name, rows in CLIENTS.items()}
    fields = {"image": "picture", "label": "kind", "test_share": 0.2}
    processor = HubImageProcessor(24, (0.5,) * 3, (0.5,) * 3)
    for client, own in pictures.items():
        for number, (kind, image) in enumerate(own):
            (tmp_path / "folder" / client / kind).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "folder" / client / kind / f"{number}.png")
    rows = [
        {"picture": filed(image), "kind": kind, "at": client} for client, own in pictures.items() for kind, image in own
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    folder = Task(name="table", path=str(tmp_path / "folder"), **{**fields, "image": "image", "label": "label"})
    column = Federation(clients=3, partition=Partition(kind="column", column="at"))
    table = Task(name="table", path=str(tmp_path / "rows.parquet"), **fields)
    found = [load_dataset(folder, BY_NAME, processor, 0), load_dataset(table, column, processor, 0)]
    forms: list[Callable[[Image.Image], Any]] = [lambda image: image, np.asarray, filed]
    for form in forms:
        lists = {c: [{"picture": form(image), "kind": kind} for kind, image in own] for c, own in pictures.items()}
        found.append(handed(lists, fields, processor))
    kinds = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(KINDS))})
    whole = {
        client: datasets.Dataset.from_dict(
            {"picture": [image for _, image in own], "kind": [kind for kind, _ in own]}, features=kinds
        )
        for client, own in pictures.items()
    }
    found.append(handed(whole, fields, processor))
    assert {one.fingerprint for one in found} == {found[0].fingerprint}
    assert found[0].class_names == KINDS


def test_given_chats_are_those_of_files(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"what {i}"}, {"role": "assistant", "content": f"that {i}"}] for i in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"m": chat, "at": "a"}) for chat in chats))
    column = Federation(clients=1, partition=Partition(kind="column", column="at"))
    fields = {"messages": "m", "test_share": 0.2}
    file = str(tmp_path / "chats.jsonl")
    there = load_dataset(Task(name="table", path=file, **fields), column, ByteTokenizer(), 0)
    rows = [{"m": chat} for chat in chats]
    assert handed({"a": rows}, fields).fingerprint == there.fingerprint
    assert handed({"a": datasets.Dataset.from_list(rows)}, fields).fingerprint == there.fingerprint


def test_official_rows_of_clients_and_of_nobody() -> None:
    """Own test rows are judged as the client's; common ones are dealt out; without any a share is held out."""
    test = {"south": RECORDS["west"][:2], "north": RECORDS["west"][2:]}
    data = {name: RECORDS[name] for name in ("north", "south")}
    own, common, drawn_ = handed(data, test=test), handed(data, test=RECORDS["west"]), handed(data)
    assert (own.split, common.split, drawn_.split) == ("test", "test", "held-out share")
    assert sorted(own.held_out_clients.tolist()) == [0, 0, 0, 1, 1]  # north, the larger, is client 0
    assert (len(own.train), len(common.train), len(common.held_out)) == (14, 14, 5)
    assert len(drawn_.train) + len(drawn_.held_out) == 14
    chosen = handed(data, validation=RECORDS["west"])
    assert chosen.row_counts.validation == 5


def mistaken(data: Any, **more: Any) -> Callable[[], Any]:
    return lambda: handed(data, **more)


class Raising(Listed):
    def __getitem__(self, index: int) -> dict[str, Any]:
        raise OSError("no such\nfile")


class Streamed(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from RECORDS["north"]


NORTH = RECORDS["north"]
MISTAKES = {
    "no mapping": (lambda: handed([NORTH]), r"^data: got 'list'; allowed: a mapping of clients' names to their"),
    "no client": (lambda: handed({}), r"^data: got {}; allowed: a mapping of clients"),
    "empty client": (lambda: handed({"a": NORTH, "b": []}), r"^data\['b'\]: got 'list'; allowed: one row at least"),
    "empty name": (lambda: handed({" ": NORTH}), r"^data: got ' '; allowed: clients' names as text that is not empty"),
    "number as name": (lambda: handed({3: NORTH}), r"^data: got 3; allowed: clients' names as text"),
    "name twice": (lambda: handed({"a": NORTH, "a ": NORTH}), r"^data: got 'a'; allowed: each client once"),
    "splits": (
        lambda: handed({"a": datasets.DatasetDict(train=datasets.Dataset.from_list(NORTH))}),
        r"^data\['a'\]: got 'datasets\.dataset_dict\.DatasetDict'; allowed: a datasets\.Dataset, a torch Dataset",
    ),
    "frame": (lambda: handed({"a": pd.DataFrame(NORTH)}), r"^data\['a'\]: got 'pandas\..*DataFrame'; allowed"),
    "stream": (lambda: handed({"a": Streamed()}), r"^data\['a'\]: got '.*Streamed'; allowed"),
    "text": (lambda: handed({"a": "rows.csv"}), r"^data\['a'\]: got 'str'; allowed"),
    "nothing": (lambda: handed({"a": None}), r"^data\['a'\]: got 'nothing'; allowed"),
    "rows that are none": (
        lambda: handed({"a": [*NORTH, (1, 2)]}),
        r"^data\['a'\]: got 'list'; allowed: rows that are mappings of columns to values; row 9 is tuple",
    ),
    "other keys": (
        lambda: handed({"a": [*NORTH, {"q": "x", "b": "y", "n": 1}]}),
        r"^data\['a'\]: got 'list'; allowed: rows with the same keys; row 1 has q, a, n, row 9 q, b, n",
    ),
    "other keys of another client": (
        lambda: handed({"a": NORTH, "b": [{"q": "x", "answer": "y", "n": 1}]}),
        r"^task\.answer: got 'a'; allowed: a column of every file; data\['b'\] has q, answer, n",
    ),
    "a cell that is no text": (
        lambda: handed({"a": [{**NORTH[0], "a": [1]}]}),
        r"^task\.answer: got 'a'; allowed: a column of text.*row 1 of data\['a'\] holds a list",
    ),
    "no such column": (
        lambda: handed({"a": NORTH}, {**TEXTS, "answer": "z"}),
        r"^task\.answer: got 'z'; allowed: a column of the table: q, a, n",
    ),
    "a row that cannot be read": (
        lambda: handed({"a": Raising(NORTH)}),
        r"^data\['a'\]: got '.*Raising'; allowed: rows that can be read; row 1 cannot; OSError: no such$",
    ),
    "half a character": (
        lambda: handed({"a": [{**NORTH[0], "a": "x\ud800"}]}),
        r"^data\['a'\]: got 'list'; allowed: text; half of a surrogate pair",
    ),
    "no images": (
        lambda: handed({"a": [{"p": "x.png", "l": "y"}]}, {"image": "p", "label": "l"}),
        r"^task\.image: got 'p'; allowed: a column of images.*'x\.png' is text, not an image's bytes",
    ),
    "test of a stranger": (
        lambda: handed({"a": NORTH}, test={"b": NORTH}),
        r"^test: got 'b'; allowed: clients that data has: a; give rows of nobody as test=rows",
    ),
    "empty test": (lambda: handed({"a": NORTH}, test=[]), r"^test: got 'list'; allowed: one row at least"),
    "rows of another client": (
        lambda: handed({"a": NORTH, "b": NORTH[:2]}),
        r"^data\['b'\]: got 'list'; allowed: a row that no other client has, with all its values; none of its 2 rows",
    ),
    "incomplete rows": (
        lambda: handed({"a": NORTH, "b": [{**NORTH[0], "a": None}]}),
        r"^data\['b'\]: got 'list'; allowed: a row that no other client has, with all its values; none of its 1 rows",
    ),
    "clients whose only row is not drawn": (
        lambda: handed({"a": NORTH} | {k: [{**NORTH[0], "q": k}] for k in "bcde"}, {**TEXTS, "max_rows": 7}),
        r"^data: got '5 clients'; allowed: at least one row for every client \(\w has none\); leave that client out",
    ),
    "no data": (
        lambda: load_dataset(Task(name="given", **TEXTS), BY_NAME, ByteTokenizer(), 0),
        r"^task\.name: got 'given'; allowed: anything but given.*call rayfed_sub\.run\(config, data=\.\.\.\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str) -> None:
    call, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- rows that only the caller's own functions read


class Changing(Listed):
    """Another row at each reading."""

    reads = 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        return {"x": self.reads}


def test_own_rows_are_split_by_what_they_hold() -> None:
    """Equal rows never stand on both sides of a drawn split, whatever objects hold them."""
    rows = {name: [(torch.tensor([i, i + 1]), {"k": [i]}) for i in own] for name, own in CLIENTS.items()}
    copies = {name: [(torch.tensor([i, i + 1]), {"k": [i]}) for i in own][::-1] for name, own in CLIENTS.items()}
    task = Task(name="given", test_share=0.2)
    first, again = (load_dataset(task, BY_NAME, AsTheyAre(list), 0, given=given_rows(data)) for data in (rows, copies))
    assert first.fingerprint == again.fingerprint
    batch = first.train.batch_of(first.rows_of(0)[:2])  # type: ignore[union-attr]
    assert batch.rows == len(batch.content) == 2
    assert batch.content[0][1]["k"][0] == int(batch.content[0][0][0])
    twice = {"a": [1, 1, 1, 1, 2, 2, 2, 2, 3, 4]}
    one = Federation(clients=1, partition=Partition(kind="files"))
    kept = load_dataset(task, one, AsTheyAre(list), 0, given=given_rows(twice))
    trained, held = (set(part.batch_of(np.arange(len(part))).content) for part in (kept.train, kept.held_out))  # type: ignore[union-attr]
    assert trained
    assert not trained & held


def test_a_row_holds_its_own_numbers_alone() -> None:
    """A view of a large tensor, of any type, comes back as it was, without the rest of it."""
    large = torch.arange(100_000).reshape(1000, 100)
    rows = [(large[3], large[:4, 7].bfloat16()), (torch.tensor(True), large[5].numpy())]
    pickles = own_pairs(given_rows({"a": rows})).objects
    assert sum(map(len, pickles)) < 5000
    (first, second), (true, third) = map(pickle.loads, pickles)
    assert torch.equal(first, large[3])
    assert torch.equal(second, large[:4, 7].bfloat16())
    assert true.item() is True
    assert (third == large[5].numpy()).all()


def test_own_rows_that_change_or_cannot_be_pickled_are_refused() -> None:
    with pytest.raises(UserError, match=r"^data\['a'\]: got '.*Changing'; allowed: rows that are the same each time"):
        own_pairs(given_rows({"a": Changing(NORTH)}))
    with pytest.raises(UserError, match=r"^data\['a'\]: got 'generator'; allowed: rows that can be pickled; row 1"):
        own_pairs(given_rows({"a": [(i for i in range(3))]}))
