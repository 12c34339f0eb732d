"""Tables in parts: whatever is cut off, and wherever, the rows are those of one file written at the end."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from rayfed_sub.core.errors import RunError
from rayfed_sub.core.schemas import ClientRow, ScoreRow
from rayfed_sub.storage import atomic_files, table_parts
from rayfed_sub.storage.table_parts import Table, place, schema, table

ROUNDS = 7


class Crash(BaseException):
    """The process ends here; nothing may catch it."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part with two rounds' clients is full, one with a round's is not; most of the bytes are the footer's."""
    monkeypatch.setattr(table_parts, "FULL", (size(client_rows(ROUNDS)) + size(ROWS["clients"](2))) // 2)


def client_rows(n: int) -> list[ClientRow]:
    return [ClientRow(n, client, 3.0 + n, 50, 100, 2.5, client / 7 + n) for client in range(12)]


def score_rows(n: int) -> list[ScoreRow]:
    """Scores after n finished rounds, every second round."""
    return [] if n % 2 else [ScoreRow(n, client, "held_out_loss", n / 4, 50) for client in (None, 0, 1)]


ROWS: dict[str, Callable[[int], list[Any]]] = {
    "clients": lambda rounds: [row for n in range(rounds) for row in client_rows(n)],
    "scores": lambda rounds: [row for n in range(rounds + 1) for row in score_rows(n)],
}


def walk(folder: Path, begun: int = 0, rounds: int = ROUNDS) -> None:
    """A run's use of its tables, written after every round."""
    clients, scores = Table(folder, "clients"), Table(folder, "scores")
    if begun:
        clients.cut(begun)
        scores.cut(begun)
        scores.lead(score_rows(0))
    else:
        clients.begin()
        scores.begin(score_rows(0))
    for n in range(begun, rounds):
        clients.add(n, client_rows(n))
        scores.add(n, score_rows(n + 1))
        clients.write()
        scores.write()
        (folder / "manifest").write_text(str(n + 1))
    if rounds == ROUNDS:
        clients.merge()
        scores.merge()


def check(folder: Path, rounds: int) -> None:
    """Check that pandas and pyarrow find the rows of so many rounds under the tables' one name."""
    for name, rows in ROWS.items():
        at = place(folder, name)
        assert at is not None
        expected = table(table_parts.KINDS[name], rows(rounds))
        assert parquet.read_table(at).equals(expected)
        pd.testing.assert_frame_equal(pd.read_parquet(at), expected.to_pandas())


def size(rows: Sequence[Any]) -> int:
    """Bytes of a file with these rows."""
    content = io.BytesIO()
    parquet.write_table(table(type(rows[0]), rows), content)
    return len(content.getvalue())


def reached(folder: Path) -> int:
    return int((folder / "manifest").read_text()) if (folder / "manifest").exists() else 0


def test_rows_are_those_of_one_file_at_every_moment(tmp_path: Path) -> None:
    for rounds in range(1, ROUNDS):
        folder = tmp_path / str(rounds)
        folder.mkdir()
        walk(folder, rounds=rounds)
        assert (folder / "clients.parquet").is_dir()
        check(folder, rounds)
    parts = sorted(part.name for part in (tmp_path / "6" / "clients.parquet").iterdir())
    assert parts == ["part-000000.parquet", "part-000002.parquet", "part-000004.parquet"]
    walk(tmp_path / "6", begun=6)
    check(tmp_path / "6", ROUNDS)
    assert {path.name for path in (tmp_path / "6").iterdir()} == {"clients.parquet", "scores.parquet", "manifest"}
    assert all((tmp_path / "6" / f"{name}.parquet").is_file() for name in ROWS)


def changes(patch: pytest.MonkeyPatch, fatal: int, full: bool = False) -> Iterator[int]:
    """Lets the change of a file or folder with this number fail: as by SIGKILL, or of a full disk."""
    counted = 0

    def dies(*arguments: Any) -> None:
        nonlocal counted
        counted += 1
        if counted == fatal + 1:
            if full:
                raise OSError(28, "No space left on device")
            raise Crash

    for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rename"), (Path, "mkdir")):
        real = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, real=real, **kwargs: (dies(), real(*args, **kwargs))[1])
    real_rmtree = shutil.rmtree

    def cut_rmtree(path: Path) -> None:
        for file in sorted(path.iterdir())[:1]:  # some of the files go, and then the process dies
            os.unlink(file)
        dies()
        real_rmtree(path)

    patch.setattr(table_parts.shutil, "rmtree", cut_rmtree)
    yield counted


@pytest.mark.parametrize("form", ["new", "one file", "one file of a finished run"])
def test_crash_anywhere_loses_no_row_of_a_round_that_counts(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change of a file is the last one once, also while the run goes on after another crash."""
    monkeypatch.setattr(atomic_files.os, "fsync", lambda handle: None)
    begun = {"new": 0, "one file": 4, "one file of a finished run": ROUNDS}[form]
    fatal, whole = 0, False
    while not whole:
        folder = tmp_path / str(fatal)
        folder.mkdir()
        for name, rows in ROWS.items() if begun else ():  # one round more than the checkpoint has
            parquet.write_table(
                table(table_parts.KINDS[name], rows(min(begun + 1, ROUNDS))), folder / f"{name}.parquet"
            )
            (folder / "manifest").write_text(str(begun))
        for number in (fatal, fatal // 2):
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Crash):
                next(changes(patch, number))
                walk(folder, reached(folder))
                whole = whole or number == fatal
            done = reached(folder)
            for name, rows in ROWS.items():
                at = place(folder, name)
                found = parquet.read_table(at) if done and at is not None else pa.table({})
                expected = table(table_parts.KINDS[name], rows(done))
                assert found.slice(0, expected.num_rows).equals(expected) or not done
                assert found.num_rows - expected.num_rows in (0, 12, 3) or not done  # of one round more, at most
        walk(folder, reached(folder))
        check(folder, ROUNDS)
        assert {path.name for path in folder.iterdir()} == {"clients.parquet", "scores.parquet", "manifest"}
        fatal += 1
    assert fatal > 10


def test_full_disk_is_reported_wherever_it_was_met(tmp_path: Path) -> None:
    fatal, whole, messages = 0, False, set[str]()
    while not whole:
        folder = tmp_path / str(fatal)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            next(changes(patch, fatal, full=True))
            try:
                walk(folder)
                whole = True
            except RunError as error:
                messages.add(str(error).partition(":")[0] + str(error).rpartition(":")[2])
        walk(folder, reached(folder))
        check(folder, ROUNDS)
        fatal += 1
    assert messages == {"writing files No space left on device"}


def test_rounds_that_run_again_are_cut_off(tmp_path: Path) -> None:
    """Back over two full parts, to the middle of one."""
    walk(tmp_path, rounds=6)
    for rounds in (5, 1):
        for name in ROWS:
            assert not Table(tmp_path, name).cut(rounds)
        check(tmp_path, rounds)
    walk(tmp_path, begun=1)
    check(tmp_path, ROUNDS)


def test_last_round_is_replaced_in_a_full_part(tmp_path: Path) -> None:
    clients = Table(tmp_path, "clients")
    clients.begin()
    for n in range(2):
        clients.add(n, client_rows(n))
    clients.write()
    assert (tmp_path / "clients.parquet" / "part-000000.parquet").stat().st_size >= table_parts.FULL
    clients.replace(2, client_rows(1)[:1])
    clients.add(2, client_rows(2))
    clients.write()
    rows = [*client_rows(0), client_rows(1)[0], *client_rows(2)]
    assert parquet.read_table(tmp_path / "clients.parquet").equals(table(ClientRow, rows))


def test_checkpoint_writes_no_more_after_many_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of 16 kB and a round's rows, however many rounds there were; and so few rows are in memory."""
    monkeypatch.setattr(table_parts, "FULL", 2**14)
    monkeypatch.setattr(atomic_files.os, "fsync", lambda handle: None)
    written: list[int] = []
    write = atomic_files.write
    monkeypatch.setattr(
        atomic_files, "write", lambda path, *parts: (written.append(sum(map(len, parts))), write(path, *parts))
    )
    clients = Table(tmp_path, "clients")
    clients.begin()
    for n in range(120):
        clients.add(n, [ClientRow(n, client, n + client / 7, 50, 100, n * client / 3) for client in range(60)])
        clients.write()
    one = parquet.read_table(tmp_path / "clients.parquet")
    assert one.num_rows == 120 * 60
    assert len(written) == 120
    assert max(written) < 2**14 + 2500
    assert next(clients.rows()).num_rows < 20 * 60
    whole = pa.concat_tables(list(clients.rows())[::-1])
    assert whole.equals(one)
    clients.merge()
    assert parquet.read_table(tmp_path / "clients.parquet").equals(whole)
    assert next(clients.rows()).equals(whole)


def test_one_file_of_an_older_version_gets_the_columns_and_rows_of_this_one(tmp_path: Path) -> None:
    """Without scores of the initial model, and without the split."""
    old = table(ScoreRow, score_rows(2)).drop_columns(["split"])
    parquet.write_table(old, tmp_path / "scores.parquet")
    scores = Table(tmp_path, "scores")
    assert scores.cut(3)
    scores.lead(score_rows(0))
    scores.write()
    assert parquet.read_table(tmp_path / "scores.parquet").equals(table(ScoreRow, [*score_rows(0), *score_rows(2)]))


def test_newest_rounds_are_read_from_the_end(tmp_path: Path) -> None:
    walk(tmp_path, rounds=6)
    clients = Table(tmp_path, "clients")
    clients.cut(6)
    newest = clients.newest(1)
    assert newest.schema.equals(schema(ClientRow))
    assert newest.equals(table(ClientRow, [*client_rows(4), *client_rows(5)]))  # of a whole part
