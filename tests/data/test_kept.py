"""Rows of large files, which a second start maps."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rayfed_sub.config.schema import Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data import columns, kept
from rayfed_sub.data.columns import ArrayWriter, Labels, Texts, TextWriter, numbers_of
from rayfed_sub.data.dataset import Dataset, load_dataset
from rayfed_sub.data.rows import Rows
from rayfed_sub.models.tokenizers import ByteTokenizer, hub_codec
from tests.helpers.word_tokenizers import numbers

SHARED = Federation.model_validate({"clients": 3, "partition": {"kind": "column", "column": "who"}})
IID = Federation.model_validate({"clients": 2, "partition": {"kind": "iid"}})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; every file counts as large, and arrays go to files early."""
    monkeypatch.setenv("RAYFED_SUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "_LARGE", 1)
    monkeypatch.setattr(columns, "_BUFFER", 64)
    return tmp_path / "cache"


def written(file: Path, answer: str = "so") -> str:
    rows = [{"q": f"why {i // 2} {'x' * (i % 7)}?", "a": f"{answer} {i % 11}", "who": f"w{i % 4}"} for i in range(300)]
    rows += rows[:5]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def table(path: str, **more: object) -> Task:
    fields = {"name": "table", "path": path, "prompt": "{q}", "answer": "a", "max_length": 24}
    return Task.model_validate({**fields, **more})


def loaded(task: Task, federation: Federation = SHARED, seed: int = 0) -> Dataset:
    return load_dataset(task, federation, ByteTokenizer(), seed)


def same(one: Dataset, other: Dataset) -> bool:
    """Whether all is equal, tokens included."""
    assert isinstance(one.train, Rows)
    assert isinstance(other.train, Rows)
    rows = zip(range(len(one.train)), range(len(other.train)), strict=True)
    tokens = all(np.array_equal(one.train.row(a), other.train.row(b)) for a, b in rows)
    numbers = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("client_rows", "client_offsets", "held_out_clients", "train_keys")
    )
    return tokens and numbers and (one.fingerprint, one.row_counts) == (other.fingerprint, other.row_counts)


def test_kept_pairs_follow_the_side_that_is_cut_and_the_types_that_the_model_reads(cache: Path, tmp_path: Path) -> None:
    path, sided, typed = written(tmp_path / "rows.jsonl"), numbers(), numbers()
    sided.truncation_side = "left"
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    plain = numbers()
    plain.model_input_names = ["input_ids", "attention_mask"]
    for prompt, folders in (("{q}", 1), (["{q}", "{a}"], 3)):
        task = Task.model_validate({"name": "table", "path": path, "prompt": prompt, "label": "who", "max_length": 8})
        before = set(cache.glob("*"))
        for tokenizer in (plain, sided, typed):
            load_dataset(task, IID, hub_codec(tokenizer), 0)
        assert len(set(cache.glob("*")) - before) == folders


def test_second_start_has_the_rows_and_the_warnings_of_the_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = table(written(tmp_path / "rows.jsonl"))
    plain = loaded(task)
    notes = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("cut" in note for note in notes)
    assert any("of a row before them" in note for note in notes)
    monkeypatch.setattr("rayfed_sub.data.dataset.load_pairs", None)  # nothing is read again
    caplog.clear()
    assert same(loaded(task), plain)
    assert [record.getMessage() for record in caplog.records] == notes
    assert len(list(cache.iterdir())) == 1


def test_rows_of_small_files_are_not_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = table(written(tmp_path / "rows.jsonl"))
    large = loaded(task)
    monkeypatch.setattr(kept, "_LARGE", 2**30)
    assert same(loaded(task), large)
    assert len(list(cache.iterdir())) == 1


def test_whatever_rows_follow_from_makes_them_anew(cache: Path, tmp_path: Path) -> None:
    task = table(written(tmp_path / "rows.jsonl"))
    loaded(task)
    loaded(task, seed=1)  # deals out the same rows
    resampled = Federation.model_validate({"clients": 3, "partition": {"kind": "resample", "rows_per_client": 4}})
    assert len(list(cache.iterdir())) == 1
    for changed, federation in (
        (table(task.path, max_length=20), SHARED),
        (table(task.path, prompt="{q}!"), SHARED),
        (task, SHARED.model_copy(update={"clients": 2})),
        (task, resampled),
    ):
        before = len(list(cache.iterdir()))
        loaded(changed, federation)
        assert len(list(cache.iterdir())) == before + 1
    loaded(task, resampled.model_copy(update={"clients": 9}))  # whose clients share all rows
    assert len(list(cache.iterdir())) == 5
    loaded(table(task.path, test_share=0.3, seed=3))  # splits are drawn anew at every start
    assert len(list(cache.iterdir())) == 5
    written(tmp_path / "rows.jsonl", answer="thus")
    assert loaded(task).fingerprint.rows != loaded(table(written(tmp_path / "other.jsonl"))).fingerprint.rows


def test_a_copy_of_the_files_has_the_same_rows(cache: Path, tmp_path: Path) -> None:
    one = loaded(table(written(tmp_path / "one.jsonl")))
    assert same(loaded(table(written(tmp_path / "two.jsonl"))), one)
    assert len(list(cache.iterdir())) == 1


def test_rows_that_cannot_be_kept_are_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = loaded(table(written(tmp_path / "one.jsonl")))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYFED_SUB_CACHE", str(tmp_path / "file" / "below"))
    assert same(loaded(table(written(tmp_path / "one.jsonl"))), one)
    assert "rows are not kept for the next start" in caplog.records[-2].getMessage()


def test_rows_that_another_process_has_kept_meanwhile_stay(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = table(written(tmp_path / "one.jsonl"))
    one = loaded(task)
    (folder,) = cache.iterdir()
    write = kept._write
    (folder / "rows.json").rename(folder / "hidden")  # not there yet when this process looks

    def late(*args: Any) -> None:
        (folder / "hidden").rename(folder / "rows.json")
        write(*args)

    monkeypatch.setattr(kept, "_write", late)
    assert same(loaded(task), one)
    assert list(cache.iterdir()) == [folder]
    assert not any("are not kept" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "rows.json").unlink(),
        lambda folder: (folder / "rows.json").write_text(""),
        lambda folder: (folder / "tokens.npy").unlink(),
        lambda folder: (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:-4]),
        lambda folder: (folder / "keys.npy").write_bytes(b""),
    ],
)
def test_damaged_rows_are_made_anew(harm: Callable[[Path], object], cache: Path, tmp_path: Path) -> None:
    task = table(written(tmp_path / "one.jsonl"))
    one = loaded(task).in_memory()  # the harm is done to what is mapped, too
    (folder,) = cache.iterdir()
    harm(folder)
    assert same(loaded(task), one)
    assert [entry.name for entry in cache.iterdir()] == [folder.name]
    assert kept._read(folder) is not None


def test_values_of_a_split_column_make_other_rows(cache: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "one.jsonl")
    frame = pd.read_json(path, lines=True).assign(part=lambda rows: np.where(rows.index % 3 > 0, "x", "y"))
    frame.to_parquet(tmp_path / "one.parquet")
    one, other = (
        loaded(table(str(tmp_path / "one.parquet"), split_column="part", train=train, test=test))
        for train, test in (("x", "y"), ("y", "x"))
    )
    assert one.row_counts.train > one.row_counts.held_out
    assert other.row_counts.train < other.row_counts.held_out
    with pytest.raises(UserError, match=r"^task\.test"):
        loaded(table(str(tmp_path / "one.parquet"), split_column="part", train="x", test="z"))


def test_order_of_files_decides_where_row_numbers_do(cache: Path, tmp_path: Path) -> None:
    first, second = written(tmp_path / "a.jsonl"), written(tmp_path / "b.jsonl", answer="thus")
    (tmp_path / "clients.json").write_text(json.dumps({"north": list(range(305)), "south": list(range(305, 610))}))
    rows = {"kind": "rows", "file": str(tmp_path / "clients.json")}
    for partition in (rows, {"kind": "column", "column": "who"}):
        federation = Federation.model_validate({"clients": 2, "partition": partition})
        orders = (first, second), (second, first)
        one, other = (loaded(table("").model_copy(update={"path": paths}), federation) for paths in orders)
        assert same(one, other) == (partition is not rows)


def test_unused_rows_go_after_a_month(cache: Path, tmp_path: Path) -> None:
    loaded(table(written(tmp_path / "one.jsonl")))
    (old,) = cache.iterdir()
    month = time.time() - 31 * 24 * 3600
    os.utime(old, (month, month))
    (cache / "new-dead").mkdir()
    os.utime(cache / "new-dead", (month, month))
    loaded(table(written(tmp_path / "two.jsonl", answer="thus")))
    assert not old.exists()
    assert len(list(cache.iterdir())) == 1


def test_mapped_tokens_travel_as_a_path(cache: Path, tmp_path: Path) -> None:
    data = loaded(table(written(tmp_path / "rows.jsonl")))
    assert isinstance(data.train, Rows)
    assert isinstance(data.train.tokens, np.memmap)
    sent = pickle.dumps(data)
    assert data.train.tokens.tobytes() not in sent
    assert same(pickle.loads(sent), data)
    assert same(data.in_memory(), data)
    unnamed = replace(data.train, tokens=np.memmap(tempfile.TemporaryFile(), np.int32, "w+", shape=(10**6,)))  # noqa: SIM115
    buffers: list[pickle.PickleBuffer] = []
    assert len(pickle.dumps(unnamed, protocol=5, buffer_callback=buffers.append)) < 10**4
    assert not isinstance(data.in_memory().train.tokens, np.memmap)  # type: ignore[union-attr]
    assert data.nbytes < data.in_memory().nbytes


def test_texts_and_labels_in_files(cache: Path) -> None:
    words = [f"wörd {i} \ud800" for i in range(50)]
    writer = TextWriter()
    for word in words:
        writer.add(word)
    made = writer.done()
    assert isinstance(made.content, np.memmap)
    assert list(made) == words == Texts.of(words)
    assert list(made.take(np.array([7, 7, 0]))) == [words[7], words[7], words[0]]
    labels = Labels.of(word[-3:] for word in words).take(np.array([1, 2, 1]))
    assert labels.compact() == labels
    assert (len(labels.names), len(labels.compact().names)) == (10, 2)


def test_numbers_are_equal_for_equal_digests_alone() -> None:
    digests = np.random.default_rng(0).integers(0, 3, (400, 16), np.uint8)
    digests[:, 2:] = 0
    numbers = numbers_of(digests)
    for row in range(40):
        assert np.array_equal(numbers == numbers[row], (digests == digests[row]).all(axis=1))


def test_an_empty_array_is_written(cache: Path) -> None:
    assert ArrayWriter(np.int32).done().shape == (0,)
