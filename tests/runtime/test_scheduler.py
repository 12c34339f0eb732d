"""Work items on workers: deaths, losses, deadlines, order.  Most workers and the clock are stand-ins; some are
Ray's."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.runtime import scheduler
from rayfed_sub.runtime.scheduler import Backlog, WorkerPool, WorkItem, in_order


@dataclass(frozen=True)
class After:
    """An answer after some seconds."""

    seconds: float
    answer: Any


NEVER = After(math.inf, None)


class Clock:
    """Time that passes only while something waits."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Reference:
    def __init__(self, value: Any, due: float) -> None:
        self.value, self.due = value, due


class Worker:
    """Answers calls, one after the other, with the entries of `answers`, repeating the last; an exception is raised at
    the get.  `alive` is its answer to `ready`."""

    def __init__(self, *answers: Any, alive: Any = "cpu") -> None:
        self.answers, self.alive = deque(answers), alive
        self.ready = self
        self.clock, self.free, self.kills = Clock(), 0.0, 0

    def remote(self, *_: Any) -> Reference:
        return Reference(self.alive, self.clock.now)

    def work(self, index: int) -> Reference:
        answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        taken = answer if isinstance(answer, After) else After(0.0, answer)
        self.free = max(self.free, self.clock.now) + taken.seconds
        value = taken.answer if isinstance(taken.answer, Exception) else f"{taken.answer}{index}"
        return Reference(value, self.free)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def get(reference: Reference, timeout: float) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def wait(references: list[Reference], num_returns: int, timeout: float) -> tuple[list[Reference], list[Reference]]:
        assert timeout * 1000 < 2**63, "Ray counts milliseconds in 64 bits"
        first = min(references, key=lambda reference: reference.due)
        if first.due > clock.now + timeout:
            clock.now += timeout
            return [], references
        clock.now = max(clock.now, first.due)
        return [first], [reference for reference in references if reference is not first]

    def kill(worker: Worker, no_restart: bool) -> None:
        assert not no_restart
        worker.kills += 1
        worker.free = clock.now

    for name, stand_in in (("get", get), ("wait", wait), ("kill", kill)):
        monkeypatch.setattr(scheduler.ray, name, stand_in)
    monkeypatch.setattr(scheduler, "time", clock)
    return clock


def pool_of(clock: Clock, *workers: Worker, deadline: float = 10.0) -> WorkerPool:
    for worker in workers:
        worker.clock = clock
    return WorkerPool(workers, workers, deadline)


def items(count: int, **more: Any) -> list[WorkItem]:
    return [WorkItem(lambda worker, i=i: worker.work(i), i % 2, f"item {i}", **more) for i in range(count)]


def results(pool: WorkerPool, work: Iterable[WorkItem]) -> list[Any]:
    done = list(in_order(pool, work, "stage"))
    assert [d.index for d in done] == list(range(len(done)))
    return [d.result for d in done]


def test_result_reports_its_times_and_failures(clock: Clock) -> None:
    """WorkItem 0 takes 2 s, is lost on the way back once and takes 3 s then; item 1 is queued meanwhile."""
    worker = Worker(After(2.0, ObjectLostError("00" * 28, None, "")), After(1.0, "b"), After(3.0, "a"))
    first, second = in_order(pool_of(clock, worker), items(2), "stage")
    assert (second.began, second.ended, second.troubles) == (2.0, 3.0, ())
    assert (first.began, first.ended, len(first.troubles)) == (3.0, 6.0, 1)


def gone(text: str = "killed") -> ActorUnavailableError:
    return ActorUnavailableError(text, actor_id=None)


def test_results_come_in_order_from_several_workers(clock: Clock) -> None:
    pool = pool_of(clock, Worker("a"), Worker("b"))
    assert results(pool, items(9)) == ["a0", "b1", "a2", "b3", "a4", "b5", "a6", "b7", "a8"]


def test_items_of_a_dead_worker_run_again_elsewhere(clock: Clock) -> None:
    pool = pool_of(clock, Worker(gone(), alive=gone("restarting")), Worker("b"))
    assert results(pool, items(6)) == [f"b{i}" for i in range(6)]


def test_restarted_worker_works_again(clock: Clock) -> None:
    assert results(pool_of(clock, Worker(gone(), gone(), "a")), items(2)) == ["a0", "a1"]


def test_workers_that_died_earlier_do_not_count_as_losses(clock: Clock) -> None:
    """Three dead workers are found in one stage; in the next they get no work, and its single item succeeds."""
    dead = [Worker(gone(), alive=gone("restarting")) for _ in range(3)]
    pool = pool_of(clock, *dead, Worker("d"))
    assert results(pool, items(8)) == [f"d{i}" for i in range(8)]
    assert set(pool.load) == {3}
    assert results(pool, items(1)) == ["d0"]


LOST = ObjectLostError("00" * 28, None, "")
LOSSES = [
    *(gone(), ActorDiedError(), NodeDiedError("node"), OutOfMemoryError("memory"), WorkerCrashedError()),
    *(LOST, ObjectReconstructionFailedError("00" * 28, None, ""), OwnerDiedError("00" * 28, None, "")),
    *(GetTimeoutError("late"), RaySystemError("odd"), RayTaskError("work", "a state was lost", LOST)),
    RayTaskError("work", "a state was lost", LOST).as_instanceof_cause(),
]


@pytest.mark.parametrize("error", LOSSES, ids=lambda error: type(error).__name__)
def test_every_loss_of_ray_is_computed_again(clock: Clock, error: RayError) -> None:
    assert results(pool_of(clock, Worker(error, "a")), items(1)) == ["a0"]


def test_exception_of_the_work_itself_is_not_a_loss(clock: Clock) -> None:
    bug, ours = (RayTaskError("work", "traceback", cause) for cause in (KeyError("x"), UserError("a.b", 1, "2")))
    with pytest.raises(RayTaskError, match="traceback"):
        results(pool_of(clock, Worker(bug, "a")), items(1))
    with pytest.raises(UserError, match=r"a\.b"):
        results(pool_of(clock, Worker(ours, "a")), items(1))


def test_item_that_always_kills_its_worker_ends_the_run(clock: Clock) -> None:
    with pytest.raises(RunError, match=r"stage: item 0 lost 3 times in a row: .*killed"):
        results(pool_of(clock, Worker(gone())), items(1))


def test_death_counts_for_the_running_item_alone(clock: Clock) -> None:
    """Items 0 and 1 are at the worker when it dies, and the failure of 1, which was queued, arrives first: counted for
    1, or for both, it would be item 1's third loss."""
    at_work, queued = After(1.0, gone()), After(-1.0, gone())
    deaths = [at_work, queued, at_work, queued]
    assert results(pool_of(clock, Worker(*deaths, "a")), items(2)) == ["a0", "a1"]
    with pytest.raises(RunError, match="item 0 lost 3 times in a row"):
        results(pool_of(clock, Worker(*deaths, at_work, queued, "a")), items(2))


def test_waiting_for_a_lost_pool_is_limited(clock: Clock) -> None:
    with pytest.raises(RunError, match=r"no worker is left or answers any more.*restarting"):
        results(pool_of(clock, Worker(gone(), alive=gone("restarting"))), items(1))
    assert 1800 <= clock.now < 1801


def test_pool_that_dies_after_a_long_item_has_time_to_restart(clock: Clock) -> None:
    pool = pool_of(clock, Worker(After(1000.0, gone()), "a"), deadline=2000.0)
    assert results(pool, items(1)) == ["a0"]


def test_permanently_dead_pool_ends_the_run_at_once(clock: Clock) -> None:
    with pytest.raises(RunError, match="no worker is left"):
        results(pool_of(clock, Worker(gone(), alive=ActorDiedError())), items(1))
    assert clock.now == 0


def test_unsound_result_is_computed_once_more_elsewhere(clock: Clock) -> None:
    pool = pool_of(clock, Worker("a"), Worker("b"))
    assert results(pool, items(5, sound=lambda result: result[0] == "b")) == ["b0", "b1", "b2", "b3", "b4"]


def test_second_result_is_accepted(clock: Clock) -> None:
    pool = pool_of(clock, Worker("a"), Worker("b"))
    assert results(pool, items(2, sound=lambda result: False)) == ["b0", "a1"]
    assert results(pool_of(clock, Worker("x", "y", "z")), items(1, sound=lambda result: False)) == ["y0"]


def test_unsound_result_is_not_a_loss_and_resets_the_count(clock: Clock) -> None:
    worker = Worker(gone(), gone(), "x", gone(), gone(), "y")
    assert results(pool_of(clock, worker), items(1, sound=lambda result: False)) == ["y0"]


def test_stuck_worker_is_killed_and_its_items_run_elsewhere(clock: Clock) -> None:
    stuck, other = Worker(NEVER, alive=gone("restarting")), Worker(After(1.0, "b"))
    assert results(pool_of(clock, stuck, other), items(4)) == ["b0", "b1", "b2", "b3"]
    assert (stuck.kills, other.kills) == (1, 0)
    assert clock.now == pytest.approx(12, abs=0.5)  # 10 s deadline, then items 0 and 2 of one second each


def test_stuck_worker_restarts_and_works(clock: Clock) -> None:
    worker = Worker(NEVER, NEVER, "a")
    assert results(pool_of(clock, worker), items(2)) == ["a0", "a1"]
    assert worker.kills == 1


def test_time_in_the_queue_does_not_count_towards_the_deadline(clock: Clock) -> None:
    """Two items of 6 s are sent at once; the second is done after 12 s, but takes 6."""
    worker = Worker(After(6.0, "a"))
    assert results(pool_of(clock, worker, deadline=10.0), items(3)) == ["a0", "a1", "a2"]
    assert (worker.kills, clock.now) == (0, 18.0)


def test_third_missed_deadline_ends_the_run(clock: Clock) -> None:
    worker = Worker(After(11.0, "a"))
    message = r"^stage: item 0 lost 3 times in a row: past the deadline of 10 s; raise resources\.deadline$"
    with pytest.raises(RunError, match=message):
        results(pool_of(clock, worker, deadline=10.0), items(1))
    assert worker.kills == 3


def halving(units: Sequence[int]) -> WorkItem:
    """Work on units that is divided once it is lost."""

    def halves() -> list[WorkItem]:
        middle = len(units) // 2
        return [halving(part) for part in (units[:middle], units[middle:])] if middle else []

    label = "unit " + ", ".join(map(str, units))
    return WorkItem(lambda worker: worker.work(units), 0, label, units=units, halves=halves)


def test_lost_item_comes_back_in_halves_in_its_place(clock: Clock) -> None:
    worker = Worker(WorkerCrashedError(), "a")
    work = [halving([0, 1, 2]), halving([3]), halving([4, 5])]
    done = list(in_order(pool_of(clock, worker), work, "stage"))
    assert [(one.index, one.units) for one in done] == [(0, [0]), (1, [1, 2]), (2, [3]), (3, [4, 5])]
    assert [one.result for one in done] == ["a[0]", "a[1, 2]", "a[3]", "a[4, 5]"]
    assert [len(one.troubles) for one in done] == [1, 0, 0, 0]


def test_what_kills_its_worker_again_and_again_is_named_alone(clock: Clock) -> None:
    """Eight units: three halvings, then three losses of the one that is left."""
    worker = Worker(WorkerCrashedError())
    with pytest.raises(RunError, match=r"^stage: unit 0 lost 3 times in a row"):
        list(in_order(pool_of(clock, worker), [halving(range(8))], "stage"))


def test_pack_too_large_for_its_worker_is_trained_client_by_client(clock: Clock) -> None:
    """The losses of what can be divided do not count, however many."""
    worker = Worker(*[WorkerCrashedError()] * 4, "a")
    done = list(in_order(pool_of(clock, worker), [halving(range(8))], "stage"))
    assert [unit for one in done for unit in one.units] == list(range(8))
    assert len(done[0].units) == 1


def test_halves_do_not_hide_what_waits_before_them() -> None:
    """Items 0 and 1 are lost, then 6 and 7: their halves fill the eight next places but for some of the first."""
    work = Backlog([halving([2 * i, 2 * i + 1]) for i in range(12)], "stage")
    work.fill(12, 12)
    for _ in range(8):
        work.waiting.popleft()
    for number in (2, 3, 4, 5):  # done, and not yet yielded
        assert number in work.coming
    work.lost([0, 1], "died")
    work.lost([6, 7], "died")
    while soon := work.soon(8):
        work.waiting.remove(soon[0])
    assert all(number not in work.waiting for number in list(work.coming)[:8])


def test_items_are_taken_when_a_worker_has_a_place_for_them(clock: Clock) -> None:
    taken = list[int]()

    def source() -> Iterator[WorkItem]:
        for number, item in enumerate(items(5)):
            taken.append(number)
            yield item

    seen = [len(taken) for _ in in_order(pool_of(clock, Worker(*"abcde")), source(), "stage")]
    assert seen == [2, 3, 4, 5, 5]  # the one that is done, and one that waits for the worker's second place


def test_source_is_read_to_its_end_while_no_worker_is_up(clock: Clock) -> None:
    """A worker dies with all that is in flight; the rest of the source is not forgotten."""
    worker = Worker(WorkerCrashedError(), "lost with it", "a", "b", "c")
    assert results(pool_of(clock, worker), iter(items(3))) == ["a0", "b1", "c2"]


def test_half_of_an_unsound_pack_is_not_given_a_third_chance(clock: Clock) -> None:
    work = Backlog([halving([0, 1])], "stage")
    work.fill(1, 1)
    work.unsound(0, worker=1)
    work.lost([0], "died")
    assert [work.spoiled[number] for number in work.coming] == [1, 1]


def test_very_long_deadline_is_waited_for(clock: Clock) -> None:
    pool = pool_of(clock, Worker(After(1e5, "a")), deadline=1e300)
    assert results(pool, items(1)) == ["a0"]


def test_results_of_an_abandoned_stage_are_not_used(clock: Clock) -> None:
    pool = pool_of(clock, Worker("x", "x", "y"))
    abandoned = in_order(pool, items(3), "stage")
    assert next(abandoned).result == "x0"  # x1 is in flight
    assert results(pool, items(3)) == ["y0", "y1", "y2"]


class Sleeper:
    """Sleeps for ever over the first item that it finds unmarked, in every life."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def ready(self) -> str:
        return "cpu"

    def work(self, index: int) -> int:
        if not self.mark.exists():
            self.mark.touch()
            time.sleep(1e6)
        return index


def test_sleeping_ray_worker_is_killed_and_works_again(ray_session: None, tmp_path: Path) -> None:
    make = ray.remote(Sleeper).options(num_cpus=0.5, max_restarts=-1, max_task_retries=0)
    workers = [make.remote(tmp_path / "mark")]
    ray.get([worker.ready.remote() for worker in workers], timeout=60)
    submit: Callable[[int], Callable[[Any], Any]] = lambda i: lambda worker: worker.work.remote(i)  # noqa: E731
    work = [WorkItem(submit(i), 0, f"item {i}") for i in range(3)]
    try:
        assert results(WorkerPool(workers, workers, 1.0), work) == [0, 1, 2]
    finally:
        ray.kill(workers[0])


NODES = """
import os, threading, time
import ray
from ray.cluster_utils import Cluster
from rayfed_sub.runtime.scheduler import Backlog, WorkerPool, WorkItem, in_order

class Worker:
    def ready(self):
        return ray.get_runtime_context().get_node_id()
    def work(self, index):
        time.sleep(0.5)
        return index, self.ready(), bytes(1_000_000)  # too big to travel with the answer: it stays on its node

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
make = ray.remote(Worker).options(num_cpus=1, max_restarts=-1, max_task_retries=0)
workers = [make.remote(), make.remote()]
pool = WorkerPool(workers, workers, 60.0)
ray.get([worker.ready.remote() for worker in pool.workers], timeout=60)
work = [WorkItem(lambda worker, i=i: worker.work.remote(i), i % 2, str(i)) for i in range(12)]
done = []
def stage():
    done.append([d.result[:2] for d in in_order(pool, work, "stage")])
def during(act, seconds):
    thread = threading.Thread(target=stage)
    thread.start()
    time.sleep(seconds)
    act()
    thread.join()
    assert [index for index, _ in done[-1]] == list(range(12)), done[-1]
during(lambda: cluster.remove_node(nodes[0], allow_graceful=False), 1.2)  # cannot be placed any more
assert len(pool.load) == 1, pool.load
during(lambda: nodes.append(cluster.add_node(num_cpus=1)), 0.5)
stage()
assert len(pool.load) == 2, pool.load
assert {node for _, node in done[-1]} == {nodes[1].node_id, nodes[2].node_id}
def replace_all():
    for node in nodes[1:]:
        cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=2)
during(replace_all, 0.8)
print("kept going")
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_lost_node_and_node_that_joins_later() -> None:
    """Two nodes with a worker each: one is lost and replaced, then both at once.  A Ray of its own."""
    health = {"period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3, "initial_delay_ms": 1000}
    settings = {f"RAY_health_check_{name}": str(value) for name, value in health.items()}
    ended = subprocess.run(
        [sys.executable, "-c", NODES],
        env={**os.environ, **settings, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert "kept going" in ended.stdout, ended.stderr[-3000:]
