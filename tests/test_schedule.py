"""Pieces to workers without Ray's processes: deaths, losses, order.  The workers are stand-ins."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError

from rayfed_sub.engine import schedule
from rayfed_sub.engine.schedule import Crew, Piece, in_order
from rayfed_sub.errors import RunError


class Worker:
    """Answers calls with what stands in `answers`, the last one for ever; an exception is raised at the get."""

    def __init__(self, *answers: Any, alive: Any = "cpu") -> None:
        self.answers, self.alive = deque(answers), alive
        self.ready = self

    def remote(self, *_: Any) -> Reference:
        return Reference(self.alive)

    def work(self, index: int) -> Reference:
        answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        return Reference(answer if isinstance(answer, Exception) else f"{answer}{index}")


class Reference:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: Reference, timeout: float) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    monkeypatch.setattr(schedule.ray, "get", get)
    monkeypatch.setattr(schedule.ray, "wait", lambda refs, num_returns, timeout: (refs[:1], refs[1:]))
    monkeypatch.setattr(schedule, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(schedule, "_RETURN_SECONDS", 0.2)


def pieces(count: int) -> list[Piece]:
    return [Piece(lambda worker, i=i: worker.work(i), i % 2, f"piece {i}") for i in range(count)]


def results(crew: Crew, count: int) -> list[Any]:
    done = list(in_order(crew, pieces(count), "stage"))
    assert [d.index for d in done] == list(range(count))
    return [d.result for d in done]


def gone(text: str = "killed") -> ActorUnavailableError:
    return ActorUnavailableError(text, actor_id=None)


def test_results_come_in_order_from_several_workers() -> None:
    assert results(Crew([Worker("a"), Worker("b")]), 9) == ["a0", "b1", "a2", "b3", "a4", "b5", "a6", "b7", "a8"]


def test_a_dead_workers_pieces_run_again_elsewhere() -> None:
    crew = Crew([Worker(gone(), alive=gone("restarting")), Worker("b")])
    assert results(crew, 6) == [f"b{i}" for i in range(6)]


def test_a_worker_that_comes_back_works_again() -> None:
    crew = Crew([Worker(gone(), gone(), "a")])
    assert results(crew, 2) == ["a0", "a1"]


def test_workers_that_died_before_do_not_wear_out_a_piece() -> None:
    """Three dead workers are met in one stage; in the next they get nothing, and its one piece lives."""
    dead = [Worker(gone(), alive=gone("restarting")) for _ in range(3)]
    crew = Crew([*dead, Worker("d")])
    assert results(crew, 8) == [f"d{i}" for i in range(8)]
    assert set(crew.load) == {3}
    assert results(crew, 1) == ["d0"]


def test_a_lost_result_is_computed_again() -> None:
    lost = ObjectLostError("00" * 28, None, "")
    assert results(Crew([Worker(lost, "a")]), 1) == ["a0"]


def test_a_piece_that_always_kills_its_worker_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"stage: piece 0 lost 3 times.*killed"):
        results(Crew([Worker(gone())]), 1)


def test_a_crew_that_never_comes_back_is_not_waited_for_for_ever() -> None:
    with pytest.raises(RunError, match=r"no worker is left or answers any more.*restarting"):
        results(Crew([Worker(gone(), alive=gone("restarting"))]), 1)


def test_a_crew_that_is_dead_for_good_ends_the_run_at_once() -> None:
    with pytest.raises(RunError, match="no worker is left"):
        results(Crew([Worker(gone(), alive=ActorDiedError())]), 1)
