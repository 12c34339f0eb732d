"""Answers of an actor: waited for while it is alive, and no longer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.runtime import links
from rayfed_sub.runtime.links import RoundStream, answer


class Actor:
    """Slow, with a second thread for `alive` if created with two."""

    def alive(self) -> None:
        pass

    def slow(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    def refuses(self) -> None:
        raise UserError("field", 1, "2")

    def run_round(self, n: int, lr_factor: float) -> Iterator[int]:
        for pack in range(3):
            time.sleep(0.6)
            yield n + pack


@pytest.mark.slow
def test_busy_actor_is_waited_for_and_hung_actor_is_not(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(links, "_ANSWER_SECONDS", 0.5)
    busy = ray.remote(num_cpus=0, max_concurrency=2)(Actor).remote()
    ray.get(busy.alive.remote())  # an actor may take longer to start, and is then neither busy nor hung
    assert answer(busy, busy.slow.remote(1.2), "stage") == "done"
    assert list(RoundStream(busy, 4, 1.0)) == [4, 5, 6]
    with pytest.raises(UserError, match="field: got 1"):
        answer(busy, busy.refuses.remote(), "stage")

    hung = ray.remote(num_cpus=0)(Actor).remote()  # one thread: while it sleeps, it does not answer `alive`
    with pytest.raises(RunError, match=r"stage: the coordinator has not answered for [01] s"):
        answer(hung, hung.slow.remote(20), "stage")
    for actor in (busy, hung):
        ray.kill(actor)
