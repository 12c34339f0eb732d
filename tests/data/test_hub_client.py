"""Without a hub that answers its client is offline, and what is not in the cache is refused at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from huggingface_hub import constants

from rayfed_sub.config.schema import Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data import hub_client, sources
from rayfed_sub.data.hub_client import hub_or_cache
from rayfed_sub.data.readers import Wanted
from rayfed_sub.data.sources import sources_at
from rayfed_sub.data.tables import load_table

CLOSED = "http://127.0.0.1:1"


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with an error, which is an answer."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_error(503)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as listening:
        thread = Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not offline by the environment; a try that waits for another one fails the test."""

    def waited(seconds: float) -> None:
        pytest.fail(f"a wait of {seconds} s")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", waited)
    hub_client._answers.cache_clear()


def test_client_is_offline_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    with suppress(KeyError), hub_or_cache():
        assert constants.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE


def test_any_answer_counts_and_is_asked_for_once(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server)
    for _ in range(2):
        with hub_or_cache():
            assert not constants.HF_HUB_OFFLINE
    assert Refusing.asked == ["/"]


def test_data_set_that_is_not_in_the_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    with pytest.raises(UserError, match=r"^task\.path: got 'nobody/nothing'; allowed: a hub id or folder that can be"):
        sources_at("task.path", "nobody/nothing")
    assert capfd.readouterr() == ("", "")


def plain_set(folder: Path, readme: str = "") -> Path:
    """A data set of two files whose cells `datasets` would change."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.csv").write_text("q,a,kind\n007,NA,1\n1e5,2026-01-02,0\n")
    (folder / "data" / "test.csv").write_text("q,a,kind\n1_000,x,0\n")
    (folder / "README.md").write_text(readme)
    return folder


def test_plain_files_of_a_hub_s_data_set_are_read_by_our_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_set(tmp_path / "set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "plain_files", lambda name, suffixes: folder if name == "us/set" else None)
    task = Task(name="table", path="us/set", prompt="{q}", answer="a")
    of_hub, of_folder = (
        load_table(task.model_copy(update={"path": path}), Wanted({"q": "task.prompt", "a": "task.answer"}, {}))
        for path in ("us/set", str(folder))
    )
    for table in (of_hub, of_folder):
        assert list(table.texts("task.prompt", "q")) == ["007", "1e5", "1_000"]
        assert list(table.texts("task.answer", "a")) == ["NA", "2026-01-02", "x"]
        assert [part.split for part in table.parts] == ["train", "test"]
    assert of_hub.parts[0].place == "us/set/train.csv"


README = {
    "classes": "---\ndataset_info:\n  features:\n  - name: kind\n    dtype:\n      class_label:\n        names:\n"
    "          '0': no\n          '1': yes\n---\n",
    "options": "---\nconfigs:\n- config_name: default\n  sep: ';'\n  data_files: data/train.csv\n---\n",
    "no such file": "---\nconfigs:\n- config_name: default\n  data_files: data/none.csv\n---\n",
}


@pytest.mark.parametrize("case", README)
def test_data_set_of_which_datasets_reads_more_is_left_to_it(case: str, tmp_path: Path) -> None:
    assert sources._plain(plain_set(tmp_path / "set", README[case]), "us/set") is None


def test_configuration_of_a_plain_data_set_names_its_splits(tmp_path: Path) -> None:
    readme = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: validation\n    path: data/test.csv\n---\n"
    )
    found = sources._plain(plain_set(tmp_path / "set", readme), "us/set")
    assert found is not None
    assert {split: [source.place for source in places] for split, places in found.items()} == {
        "validation": ["us/set/test.csv"]
    }


@pytest.mark.parametrize("path", ["two words", "a/b/c", "a--b/c", "here."])
def test_what_can_be_no_hub_id_is_refused_without_a_request(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "_answers", lambda endpoint, minute: pytest.fail("the hub was asked"))
    with pytest.raises(
        UserError, match=r"^task\.path: got .*a file that exists \(.*\), a folder, a glob or a hub id; check the path"
    ):
        sources_at("task.path", path)
