"""Without a hub that answers its client is offline, and what is not in the cache is refused at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest
from huggingface_hub import constants

from rayfed_sub.core.errors import UserError
from rayfed_sub.data import hub_client
from rayfed_sub.data.hub_client import hub_or_cache
from rayfed_sub.data.sources import sources_at

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


@pytest.mark.parametrize("path", ["two words", "a/b/c", "a--b/c", "here."])
def test_what_can_be_no_hub_id_is_refused_without_a_request(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "_answers", lambda endpoint, minute: pytest.fail("the hub was asked"))
    with pytest.raises(
        UserError, match=r"^task\.path: got .*a file that exists \(.*\), a folder, a glob or a hub id; check the path"
    ):
        sources_at("task.path", path)
