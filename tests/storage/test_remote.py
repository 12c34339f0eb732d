"""Runs in an object store: after any interrupted upload a run can resume, and ends with the same bits.

The store is a local folder behind a handler that counts, and fails on request; or S3, served by moto."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FileInfo, FileSelector, FSSpecHandler, PyFileSystem

from rayfed_sub import run
from rayfed_sub.config.loading import load_config, stored_config
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.storage import atomic_files, checkpoints, remote, table_parts
from rayfed_sub.storage.remote import Mirror, Place, local_copy, open_place
from rayfed_sub.storage.run_folder import create, finished, reopen, summary_of
from rayfed_sub.telemetry.events import Notice, PackDone, Stage, Started, Summary
from tests.helpers import chaos
from tests.storage.test_run_folder import BEGINNING, done, summary
from tests.storage.test_state_store import check, check_best, state_store, walk

COHORTS = [[0, 1, 2], [1], [0, 3], [1], [2]]
TABLES = ("log.jsonl", "rounds.parquet")


class Store(FSSpecHandler):  # type: ignore[misc]
    """Records what is sent and deleted; refuses everything after the first `left` of these.

    In an object store a name may be that of an object and begin those of others; here the others lie in a folder of
    another name."""

    def __init__(self, root: Path) -> None:
        super().__init__(LocalFileSystem(auto_mkdir=True))  # an object store needs no folders
        self.root, self.left, self.done = root, 10**6, list[str]()

    def mirror(self) -> Mirror:
        return Mirror("s3://bucket/run", PyFileSystem(self), str(self.root))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._step("+", path)
        return super().open_output_stream(_on_disk(path), metadata)

    def open_input_stream(self, path: str) -> Any:
        return super().open_input_stream(_on_disk(path))

    def open_input_file(self, path: str) -> Any:
        return super().open_input_file(_on_disk(path))

    def delete_file(self, path: str) -> None:
        self._step("-", path)
        super().delete_file(_on_disk(path))

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [_in_store(info) for info in super().get_file_info(list(map(_on_disk, paths)))]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        at = FileSelector(_on_disk(f"{selector.base_dir}/").rstrip("/"), allow_not_found=selector.allow_not_found)
        return [_in_store(info) for info in super().get_file_info_selector(at)]

    def _step(self, sign: str, path: str) -> None:
        if not self.left:
            raise OSError("the line is dead")
        self.left -= 1
        self.done.append(sign + path.removeprefix(f"{self.root}/"))


def _on_disk(path: str) -> str:
    return path.replace(".parquet/", ".parquet.under/")


def _in_store(info: FileInfo) -> FileInfo:
    return FileInfo(info.path.replace(".parquet.under", ".parquet"), info.type, size=info.size)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def work(folder: Path, copy: Mirror, rounds: int = len(COHORTS), bests: Collection[int] = ()) -> None:
    """A run's use of its folder: started or resumed, a checkpoint every round, sent each time."""
    folder.mkdir(exist_ok=True)
    if not (folder / "config.yaml").exists():
        atomic_files.write(folder / "config.yaml", b"name: tiny")
    copy.push(folder)
    states = state_store(folder)
    for n in range(states.current.server.round, rounds):
        for name in TABLES:
            atomic_files.write(folder / name, b"." * (n + 1))
        walk(states, COHORTS[: n + 1], bests=bests)
        copy.push(folder)
    if rounds == len(COHORTS):
        atomic_files.write(folder / "summary.json", b"{}")
        copy.push(folder)


def copy(place: Place) -> Mirror:
    assert place.mirror is not None
    return place.mirror


def local(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_run_resumes_after_an_upload_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection fails after every possible number of steps; then another machine resumes."""
    monkeypatch.setattr(atomic_files.os, "fsync", lambda handle: None)  # 40 times an entire run
    steps, whole, messages, bests = 0, False, set[str](), {2, 4}
    while not whole:
        store = Store(tmp_path / f"store-{steps}")
        store.left = steps
        try:
            work(tmp_path / f"first-{steps}", store.mirror(), bests=bests)
            whole = True
        except RunError as error:
            messages.add(str(error))
        store.left = 10**6

        there, folder = store.mirror(), tmp_path / f"second-{steps}"
        names = there.names()
        assert "config.yaml" in names or not names
        there.pull(folder)
        reached = checkpoints.newest(folder) or 0
        assert "summary.json" not in names or reached == len(COHORTS)
        assert all(len((folder / name).read_bytes()) >= reached for name in TABLES if reached)
        if reached:
            check(state_store(folder), COHORTS, reached)
        work(folder, there, bests=bests)
        check(state_store(folder), COHORTS, len(COHORTS))
        check_best(folder, COHORTS, 4)
        assert local(store.root) == local(folder)  # no file is left that no manifest names
        steps += 1
    assert messages == {"writing files: s3://bucket/run: the line is dead"}
    # config.yaml and summary.json, five rounds of server, manifest and two tables, 8 states; 3 rounds are deleted,
    # each a server and a manifest, with the states that only they named: 000001-000001, 000000-000001, 000001-000002.
    # Two best manifests, of which one is deleted.
    assert steps == 1 + 2 + 5 * 4 + 8 + 3 * 2 + 3 + 2 + 1


def test_run_is_lengthened_wherever_that_was_cut(tmp_path: Path) -> None:
    """Its last round, judged out of turn, is to run again: summary, manifest and configuration go one by one."""
    short, longer = (
        load_config({"federation": {"rounds": rounds}, "evaluation": {"every": 4}}, []) for rounds in (2, 9)
    )
    steps, whole = 0, False
    while not whole:
        store, folder = Store(tmp_path / f"store-{steps}"), tmp_path / f"first-{steps}"
        checkpoints.make(folder)
        place = Place(folder, store.mirror())
        create(place, short)
        for rounds in (1, 2):
            checkpoints.write(folder, checkpoints.Checkpoint(rounds, {}, {}))
        atomic_files.write(folder / "summary.json", b"{}")
        place.push()
        store.left = steps
        try:
            reopen(place, longer)
            place.push()
            whole = True
        except RunError:
            steps += 1
        store.left = 10**6

        there, again = store.mirror(), tmp_path / f"second-{steps}-{whole}"
        there.pull(again)
        assert checkpoints.newest(again) == 2 or not (again / "summary.json").exists()
        reopen(Place(again, there), longer)
        assert (checkpoints.newest(again), stored_config(again)) == (1, longer)
        assert not (again / "summary.json").exists()
    assert steps == 3


def use(folder: Path, copy: Mirror, rounds: int, dies: int | None = None) -> None:
    """A run of so many rounds from where it is, a checkpoint and a full part of each table in every round.  dies: the
    process ends after the checkpoint of so many rounds."""
    settings, at = load_config({"name": "kept", "federation": {"rounds": rounds}}, []), Place(folder, copy)
    checkpoints.make(folder)
    if not (folder / "config.yaml").exists():
        run_folder = create(at, settings)
    elif summary_of(folder, settings) is None:
        run_folder = reopen(at, settings)
    else:
        return
    at.push()
    begun = checkpoints.newest(folder) or 0
    if run_folder.begun():
        run_folder.go_on(begun)
    else:
        run_folder.begin(BEGINNING)
    for n in range(begun, rounds):
        run_folder.add(done(n, 2.0, n, n + 1))
        run_folder.write_tables()
        checkpoints.write(folder, checkpoints.Checkpoint(n + 1, {}, {}))
        at.push()
        if n + 1 == dies:
            return
    run_folder.write_summary(summary(folder))
    at.push()


@pytest.mark.slow
def test_tables_are_whole_after_an_upload_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds in parts, merged, made parts again for a third one, and merged: in the store a table is a file or
    parts, or for a while both.  Another machine finds all rows of the rounds that count."""
    monkeypatch.setattr(atomic_files.os, "fsync", lambda handle: None)
    monkeypatch.setattr(table_parts, "FULL", 1)
    expected = [(n, client) for n in range(3) for client in (n, n + 1)]
    use(tmp_path / "begun", Store(tmp_path / "base").mirror(), 2, dies=2)
    assert "clients.parquet/part-000001.parquet" in Store(tmp_path / "base").mirror().names()
    steps, whole, doubled = 0, False, set[str]()
    while not whole:
        shutil.copytree(tmp_path / "base", tmp_path / f"store-{steps}")
        store, first = Store(tmp_path / f"store-{steps}"), tmp_path / f"first-{steps}"
        mirror = store.mirror()
        mirror.pull(first)
        store.left = steps
        with suppress(RunError):
            use(first, mirror, 2)
            use(first, mirror, 3)
            whole = True
        store.left = 10**6

        there, folder = store.mirror(), tmp_path / f"second-{steps}"
        names = set(there.names())
        doubled |= {name for name in names if name.rpartition("/")[0] in names}
        there.pull(folder)
        reached = checkpoints.newest(folder) or 0
        if reached:
            found = pd.read_parquet(folder / "clients.parquet")
            rows = list(zip(found["round"], found["client"], strict=True))
            assert rows == expected[: max(len(rows), 2 * reached)]
        use(folder, there, 3)
        assert local(store.root) == local(folder) - {"checkpoints/.lock"}
        assert not [name for name in local(store.root) if "/part-" in name]
        found = pd.read_parquet(folder / "clients.parquet")
        assert list(zip(found["round"], found["client"], strict=True)) == expected
        assert pd.read_parquet(folder / "scores.parquet")["rounds"].tolist() == [0, 1, 1, 2, 2, 3, 3]
        steps += 5  # files are sent and deleted side by side, in any order
    assert {name.rpartition("/")[2] for name in doubled} >= {"part-000000.parquet", "part-000001.parquet"}


def test_requests_of_a_checkpoint(store: Store, tmp_path: Path) -> None:
    """The third: two states, the server, tables and log; then the manifest; then the removal of the first one, manifest
    first.

    State 000001-000001 was replaced in round 2, so only the first checkpoint names it."""
    copy = store.mirror()
    work(tmp_path / "run", copy, rounds=2)
    store.done.clear()
    work(tmp_path / "run", copy, rounds=3)
    needed, manifest, first, rest = store.done[:5], store.done[5], store.done[6], store.done[7:]
    assert set(needed) == {
        *("+checkpoints/clients/000000-000003.safetensors", "+checkpoints/clients/000003-000003.safetensors"),
        *("+checkpoints/server-000003.safetensors", "+log.jsonl", "+rounds.parquet"),
    }
    assert manifest == "+checkpoints/manifest-000003.json"
    assert first == "-checkpoints/manifest-000001.json"
    assert set(rest) == {"-checkpoints/server-000001.safetensors", "-checkpoints/clients/000001-000001.safetensors"}
    copy.push(tmp_path / "run")
    assert len(store.done) == 9  # nothing is new


def test_complete_run_is_sent_from_configuration_to_summary(store: Store, tmp_path: Path) -> None:
    work(tmp_path / "run", Store(tmp_path / "elsewhere").mirror())
    store.mirror().push(tmp_path / "run")
    assert store.done[0] == "+config.yaml"
    assert sorted(store.done[-3:-1]) == [f"+checkpoints/manifest-00000{n}.json" for n in (4, 5)]
    assert store.done[-1] == "+summary.json"


def test_file_of_the_same_length_with_other_content_is_sent(store: Store, tmp_path: Path) -> None:
    """A state that an interrupted round left there, and that the repeated round writes anew."""
    name = "checkpoints/clients/000001-000002.safetensors"
    checkpoints.make(tmp_path)
    for content in (b"old", b"new"):
        copy = store.mirror()
        copy.pull(tmp_path)
        atomic_files.write(tmp_path / name, content)
        copy.push(tmp_path)
        assert (store.root / name).read_bytes() == content


def test_foreign_files_are_not_sent(store: Store, tmp_path: Path) -> None:
    (store.root / "checkpoints").mkdir(parents=True)
    for name in ("notes.txt", "checkpoints/notes.txt"):
        (store.root / name).write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tracker-mlflow.json").write_text("{}")  # the run's own: it is
    work(tmp_path / "run", store.mirror(), rounds=2)
    copy = store.mirror()
    copy.pull(tmp_path / "again")
    assert local(tmp_path / "again") == local(tmp_path / "run") > {"tracker-mlflow.json"}
    atomic_files.write(tmp_path / "again" / ".log.jsonl", b"half")  # and an unfinished write is not sent
    work(tmp_path / "again", copy, rounds=4)
    assert {"notes.txt", "checkpoints/notes.txt"} == local(store.root) - local(tmp_path / "again")
    assert not list(store.root.glob(".*"))


@pytest.fixture
def temporary(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary folders; every URI leads to `store`."""
    monkeypatch.setattr(remote, "connect", lambda uri, order=remote.RUN: store.mirror())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_files_are_sent_after_any_ending(store: Store, temporary: Path) -> None:
    def interrupted() -> None:
        with open_place("s3://bucket/run", print, resume=False) as place:
            work(place.path, copy(place), rounds=1)
            atomic_files.write(place.path / "log.jsonl", b"interrupted")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (store.root / "log.jsonl").read_bytes() == b"interrupted"
    assert not list(temporary.iterdir())


def test_unsent_files_stay_on_this_machine(store: Store, temporary: Path) -> None:
    records: list[Any] = []

    def cut() -> None:
        with open_place("s3://bucket/run", records.append, resume=False) as place:
            work(place.path, copy(place), rounds=1)
            store.left = 3
            work(place.path, copy(place), rounds=2)

    with pytest.raises(RunError, match="writing files: s3://bucket/run: the line is dead"):
        cut()
    (folder,) = temporary.iterdir()
    where = f"is in {folder}: go on there, with --out {folder} --resume"
    assert records == [Notice(f"what could not be sent to s3://bucket/run {where}")]
    assert checkpoints.newest(folder) == 2


def test_existing_run_is_not_overwritten(store: Store, temporary: Path, tmp_path: Path) -> None:
    work(tmp_path / "run", store.mirror(), rounds=2)
    before = local(store.root)
    with pytest.raises(UserError, match=r"--out: got 's3://bucket/run'; allowed: a folder without a run in it"):
        open_place("s3://bucket/run", print, resume=False).__enter__()
    (store.root / "config.yaml").unlink()  # the rest is no run to resume, and must not mix with a new one
    with pytest.raises(UserError, match="a folder without a run in it"):
        open_place("s3://bucket/run", print, resume=True).__enter__()
    assert local(store.root) == before - {"config.yaml"}
    assert not list(temporary.iterdir())


def test_errors_name_the_user_s_location(store: Store, temporary: Path, tmp_path: Path) -> None:
    work(tmp_path / "run", store.mirror(), rounds=2)
    (store.root / "checkpoints" / "manifest-000002.json").write_bytes(b"")
    records: list[Any] = []
    with pytest.raises(UserError) as caught, open_place("s3://bucket/run", records.append, resume=True) as place:
        state_store(place.path)
    assert records == [Stage("fetching what is in s3://bucket/run")]
    assert caught.value.value == "s3://bucket/run/checkpoints/manifest-000002.json"
    assert caught.value.advice == "delete manifest-000002.json to go on from round 1"


def test_remote_run_can_be_read_locally(store: Store, temporary: Path, tmp_path: Path) -> None:
    work(tmp_path / "run", store.mirror(), rounds=2)
    with local_copy("s3://bucket/run", "RUN") as folder:
        assert local(folder) == local(tmp_path / "run")
    with pytest.raises(UserError, match=r"^RUN: got 's3://bucket/run'"), local_copy("s3://bucket/run", "RUN") as folder:
        finished(folder)
    with local_copy("runs/tiny", "RUN") as folder:
        assert folder == Path("runs/tiny")
    assert not list(temporary.iterdir())


SECRET = "s3://AKIAKEY:hush@bucket/run?region=eu-west-1&session_token=hush"


def test_credentials_in_a_uri_are_used_and_never_shown(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection uses all of the URI; names and errors of the run's location omit the credentials."""
    given: list[str] = []

    class Files:
        @staticmethod
        def from_uri(uri: str) -> tuple[Any, str]:
            given.append(uri)
            return store, str(store.root)

    with monkeypatch.context() as patch:
        patch.setattr(remote.fs, "FileSystem", Files)
        connected = remote.connect(SECRET)
    assert given == [f"{SECRET}&allow_delayed_open=true"]
    assert connected.uri == SECRET  # for the trials of a sweep, which connect as well
    place = Place(tmp_path, connected)
    shown = "s3://bucket/run?region=eu-west-1"
    assert (place.display_name(), place.display_name("a")) == (shown, "s3://bucket/run/a?region=eu-west-1")

    def refused(uri: str, order: object = None) -> Any:
        raise OSError(f"cannot reach {uri}: 'AKIAKEY:hush' is no bucket")  # as pyarrow does, without the scheme

    monkeypatch.setattr(remote, "connect", refused)
    with pytest.raises(UserError) as caught:
        open_place(SECRET, print, resume=False).__enter__()
    assert "AKIAKEY" not in str(caught.value)
    assert "hush" not in str(caught.value)
    assert f"got '{shown}'" in str(caught.value)

    def cut_off(*arguments: object) -> Any:
        raise OSError("no access for AKIAKEY:hush")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: a\n", encoding="utf-8")
    monkeypatch.setattr(connected, "_copy", cut_off)
    with pytest.raises(RunError) as failed:
        connected.push(tmp_path / "run")
    assert str(failed.value).startswith(f"writing files: {shown}: OSError, ")
    assert "hush" not in str(failed.value)


@pytest.mark.parametrize("uri", ["s4://bucket/run", "s3://", "s3:// bucket/run", "file:///tmp/run"])
def test_impossible_location_is_refused_before_the_run_starts(uri: str) -> None:
    with pytest.raises(UserError, match=r"^--out: got '[^']*'; allowed: what an object store gives access to \("):
        run(chaos.job(1), uri)


def test_run_in_s3_resumes_after_an_interrupt(undisturbed_job: Summary, bucket: str, tmp_path: Path) -> None:
    """Ctrl-C in the third round, without a due checkpoint; the second machine has only the URI."""
    records: list[Any] = []

    def interrupt(record: Any) -> None:
        records.append(record)
        if isinstance(record, PackDone) and record.round == 2:
            raise KeyboardInterrupt

    uri = f"{bucket}/runs/one"
    with pytest.raises(KeyboardInterrupt):
        run(chaos.job(0, "checkpoint.every=0"), uri, interrupt)
    hint = f"interrupted; go on with: rayfed-sub run {uri}/config.yaml --out {uri} --resume"
    assert [record.text for record in records if isinstance(record, Notice)] == [hint]
    assert [record.folder for record in records if isinstance(record, Started)] == [uri]

    with local_copy(f"{uri}/config.yaml", "CONFIG.yaml") as path:
        config = load_config(path)
    summary = run(config, uri, resume=True)
    assert summary.weights_sha256 == undisturbed_job.weights_sha256
    assert summary.metrics == undisturbed_job.metrics
    assert summary.resumed == (2,)
    assert summary.folder == uri

    assert run(config, uri, records.append, resume=True) == summary  # finished: nothing happens
    assert records[-1] == Notice(f"{uri} is finished already")
    with local_copy(uri, "RUN") as folder:
        assert finished(folder) == config
        assert checkpoints.newest(folder) == 4
        state_store(folder)  # whole
        ours, theirs = ({path.name for path in place.iterdir()} for place in (folder, Path(undisturbed_job.folder)))
        assert ours == theirs


def test_refusal_by_s3_is_reported_before_the_run_starts(bucket: str) -> None:
    with pytest.raises(UserError, match=r"^--out: got 's3://nobody/run'; allowed: .*\(.*NO_SUCH_BUCKET"):
        run(chaos.job(1), "s3://nobody/run")
