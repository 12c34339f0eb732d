"""A worker in the coordinator's own process: its order, its second try, its memory, and its cleanup."""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError

from rayfed_sub import load_config, run
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Broadcast, ClientState
from rayfed_sub.planning.job import prepare
from rayfed_sub.runtime import links, ray_workers, scheduler
from rayfed_sub.runtime import worker as worker_module
from rayfed_sub.runtime.coordinator import Coordinator
from rayfed_sub.runtime.links import Crew
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.runtime.ray_workers import Inputs, UnusableProcessError, WorkerProcess
from rayfed_sub.runtime.scheduler import WorkItem
from rayfed_sub.runtime.session import load_backbone, spec_of
from rayfed_sub.runtime.workers import LocalWorker
from rayfed_sub.storage import checkpoints
from rayfed_sub.telemetry.process_memory import GpuPeak

TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
SMALL = [
    *("model.random.hidden_size=32", "model.random.intermediate_size=96", "model.random.num_hidden_layers=1"),
    *("federation.rounds=1", "federation.clients=2", "federation.local_steps=1", "evaluation.eval_rows=16"),
]


def test_a_process_makes_a_worker_for_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the process that comes back after a death, for the call of a run under way."""
    made, closed = list[str](), list[str]()

    class Noted:
        def __init__(self, spec: str, backbone: int, dataset: int, gpus: float) -> None:
            made.append(spec)
            self.spec, self.given = spec, (backbone, dataset, gpus)

        def train(self, more: int) -> tuple[str, int]:
            return self.spec, more

        def close(self) -> None:
            closed.append(self.spec)

    monkeypatch.setattr(ray_workers, "Worker", Noted)
    first, second = (Inputs(name, Shared(name, 1, 2), 0.5) for name in ("one", "two"))
    process = WorkerProcess()
    assert [process.call(first, "train", 3), process.call(first, "train", 4)] == [("one", 3), ("one", 4)]
    assert process.call(second, "train", 5) == ("two", 5)
    assert (made, closed) == (["one", "two"], ["one"])
    assert WorkerProcess().call(second, "train", 6) == ("two", 6)


def test_a_process_that_cannot_make_its_worker_is_lost_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray tells whoever waits for the call: the scheduler asks such a process no more."""

    def fails(*parts: object) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr(ray_workers, "Worker", fails)
    with pytest.raises(UnusableProcessError, match=r"^ValueError: no such layer$") as caught:
        WorkerProcess().call(Inputs("one", Shared("one", 1, 2), 0.5), "ready")
    told = RayTaskError("call", "traceback", pickle.loads(pickle.dumps(caught.value))).as_instanceof_cause()
    assert isinstance(told, ActorDiedError)
    assert scheduler._lost(told)  # no error of the work itself, which would be raised


def test_a_coordinator_takes_another_run_over(tmp_path: Path) -> None:
    """With nothing of the first one: the weights of the second one are its own."""

    def parts(lr: float, name: str) -> tuple[Any, ...]:
        job = prepare(load_config(TINY, [*SMALL, "resources.workers=0", f"optimizer.lr={lr}"]))
        checkpoints.make(tmp_path / name)
        return links.parts_of(job, tmp_path / name, Shared(spec_of(job), load_backbone(job), job.dataset))

    def trained(coordinator: Coordinator) -> str:
        coordinator.start()
        list(coordinator.run_round(0, 1.0))
        return coordinator.weights_sha256()

    alone = Coordinator(*parts(0.003, "alone"))
    moving = Coordinator(*parts(0.1, "first"))
    try:
        wanted = trained(alone)
        assert trained(moving) != wanted
        assert moving.leave()
        moving.take_over(*parts(0.003, "second"))
        assert trained(moving) == wanted
    finally:
        alone.close()
        moving.close()


def test_a_crew_serves_runs_of_its_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []
    monkeypatch.setattr(links.ray, "kill", killed.append)
    one, two = (load_config(TINY, [f"resources.workers={workers}"]).resources for workers in (1, 2))
    crew = Crew("actor", one)
    assert crew.taken(one) == "actor"
    assert crew.taken(one) is None
    crew = Crew("actor", one)
    assert crew.taken(two) is None
    assert killed == ["actor"]


class Counting:
    """A stand-in for a worker: returns the number of calls so far."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def train(self, name: str) -> int:
        self.calls.append(name)
        return len(self.calls)


def test_items_run_one_after_the_other_and_unsound_ones_twice() -> None:
    worker = Counting()
    items = [
        WorkItem(lambda w, name=name: w.train.remote(name), 0, name, lambda result: result not in (2, 3))
        for name in "abc"
    ]
    done = list(LocalWorker(cast(Any, worker)).in_order(items, "stage"))
    assert worker.calls == ["a", "b", "b", "c"]
    assert [(one.index, one.result, one.worker, one.troubles) for one in done] == [
        (0, 1, 0, ()),
        (1, 3, 0, ("a client failed",)),  # the second result counts, as in the scheduler
        (2, 4, 0, ()),
    ]


def test_shared_tensors_have_the_layout_of_the_object_store() -> None:
    """Contiguous and aligned; a tensor that is so already is not copied."""
    turned, plain = torch.arange(6.0).reshape(2, 3).T, torch.zeros(4)
    workers = LocalWorker(cast(Any, Counting()))
    shared = workers.share(Broadcast(3, {"turned": turned, "plain": plain}))
    assert (shared.round, shared.tensors["turned"].tolist()) == (3, turned.tolist())
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in shared.tensors.values())
    assert shared.tensors["plain"].data_ptr() == plain.data_ptr()
    assert workers.put(ClientState(1, 2, 3, {"turned": turned})).tensors["turned"].is_contiguous()


def test_run_in_this_process_starts_no_ray_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(ray, "put", started)
    before, threads = set(threading.enumerate()), torch.get_num_threads()
    asked = load_config(TINY, [*SMALL, "resources.workers=0", "resources.cpus_per_worker=1"])
    torch.set_num_threads(2)
    try:
        summary = run(asked, tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert {thread.name for thread in threading.enumerate() if thread not in before} == set()
    held = psutil.Process().memory_full_info().pss
    assert 0.5 * held < summary.peak_memory_bytes < 1.5 * held  # one process, counted once
    assert run(asked, tmp_path / "run", resume=True).weights_sha256 == summary.weights_sha256  # no claim is left


def test_cluster_address_is_refused_for_one_process(tmp_path: Path) -> None:
    asked = load_config(TINY, [*SMALL, "resources.workers=0"])
    with pytest.raises(UserError, match=r"^--address: got 'auto'; allowed: nothing with resources\.workers=0"):
        run(asked, tmp_path / "run", address="auto")


def test_summary_has_the_gpu_s_peak_of_every_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peaks = iter(range(10**6, 10**7))
    monkeypatch.setattr(worker_module, "gpu_peak", lambda device: GpuPeak(next(peaks), 10**8))
    summary = run(load_config(TINY, [*SMALL, "resources.workers=0"]), tmp_path / "run")
    (where,) = summary.gpu_memory
    assert where.endswith(f" {os.getpid()}")
    assert summary.gpu_memory[where]["reserved"] == 10**8
    assert 10**6 <= summary.gpu_memory[where]["allocated"] < 10**7
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["gpu_memory"] == summary.gpu_memory
