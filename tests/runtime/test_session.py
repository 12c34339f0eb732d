"""Answers of an actor: waited for as long as it lives, and no longer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.runtime import session
from rayfed_sub.runtime.session import answer, stream_of


class Actor:
    """Slow, with a second thread for `alive` where it was made with two."""

    def alive(self) -> None:
        pass

    def slow(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    def refuses(self) -> None:
        raise UserError("field", 1, "2")

    def counts(self, seconds: float) -> Iterator[int]:
        for n in range(3):
            time.sleep(seconds)
            yield n


def test_a_busy_actor_is_waited_for_and_a_hung_one_is_not(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(session, "_ANSWER_SECONDS", 1.0)
    busy = ray.remote(num_cpus=0, max_concurrency=2)(Actor).remote()
    ray.get(busy.alive.remote())  # an actor may take longer to start, and is then neither busy nor hung
    assert answer(busy, busy.slow.remote(2.5), "stage") == "done"
    stream = busy.counts.options(num_returns="streaming").remote(1.3)
    assert [answer(busy, reference, "stage") for reference in stream_of(busy, stream, "stage")] == [0, 1, 2]
    with pytest.raises(UserError, match="field: got 1"):
        answer(busy, busy.refuses.remote(), "stage")

    hung = ray.remote(num_cpus=0)(Actor).remote()  # one thread: while it sleeps, it does not say that it is alive
    with pytest.raises(RunError, match=r"stage: the coordinator has not answered for 1 s"):
        answer(hung, hung.slow.remote(20), "stage")
    for actor in (busy, hung):
        ray.kill(actor)
