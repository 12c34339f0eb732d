"""A worker without Ray: the updates and states of clients that fail."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from rayfed_sub import load_config
from rayfed_sub.core.arrays import packed
from rayfed_sub.core.types import ClientState, Tensors
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.data.rows import Rows
from rayfed_sub.models.weights import load_weights, target_weights
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.planning.sampling import pack_work
from rayfed_sub.runtime.worker import PackOutcome, Spec, Worker

CLIENTS = [0, 1, 2]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Three clients with some ten rows each, on a Llama with one layer."""
    rows = [{"q": f"{i} + {i} = ", "a": f"{2 * i}, as everybody knows"} for i in range(36)]
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tree = {
        "model": {"path": "random", "random": {"type": "llama", "num_key_value_heads": 1, **sizes}},
        "task": {"name": "table", "path": str(path), "prompt": "{q}", "answer": "a", "max_length": 36},
        "federation": {"clients": 3, "rounds": 1, "local_steps": 4, "batch_size": 2, "partition": {"kind": "iid"}},
        "method": {"name": "fedftg", "rank": 2, "refresh_every": 2},
    }
    return prepare(load_config(tree))


class Trial:
    """A worker and its inputs in round 0."""

    def __init__(self, job: Job, dataset: Dataset | None = None, **resources: Any) -> None:
        config = job.config.model_copy(update={"resources": job.config.resources.model_copy(update=resources)})
        weights = load_weights(config.model, job.architecture, config.seed)
        pretrained = target_weights(job.architecture.shape, job.architecture.transposed, weights)
        server = job.method.init_server(pretrained, job.architecture.shape, config.seed)
        spec = Spec(config, job.method, job.architecture, job.processor)
        self.config, self.dataset = config, dataset or job.dataset
        self.worker = Worker(spec, packed(weights), self.dataset)
        self.broadcast = job.method.broadcast(server)

    def train(self, clients: list[int], lr: float = 1e-3) -> PackOutcome:
        work = pack_work(self.config, self.dataset, 0, clients)
        return self.worker.train(replace(work, lr=lr), [None] * len(clients), self.broadcast)


def without_rows(dataset: Dataset, client: int) -> Dataset:
    """The client's rows are missing."""
    rows = dataset.client_rows.copy()
    rows[dataset.client_offsets[client] : dataset.client_offsets[client + 1]] = 10**6
    return replace(dataset, client_rows=rows)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("executor", ["pack", "reference"])
def test_batches_follow_the_configuration(job: Job, executor: str) -> None:
    """Rows of different lengths come in another order, which shows in the weights."""
    ways = [job.config.federation.model_copy(update={"batching": way}) for way in ("shuffled", "bucketed", "shuffled")]
    jobs = [replace(job, config=job.config.model_copy(update={"federation": way})) for way in ways]
    first, second, again = (Trial(one, executor=executor).train(CLIENTS).updates[0].tensors for one in jobs)
    assert same(first, again)
    assert not same(first, second)


def test_client_may_meet_its_first_batches_again(job: Job) -> None:
    later = ClientState(1, 4, 4, {})
    for same_batches in (False, True):
        federation = job.config.federation.model_copy(update={"same_batches": same_batches})
        worker = Trial(replace(job, config=job.config.model_copy(update={"federation": federation}))).worker
        first, second = (worker._batches(0, state, 1)[0] for state in (None, later))
        assert isinstance(first, dict)
        assert isinstance(second, dict)
        alike = first["input_ids"].shape == second["input_ids"].shape and same(first, second)
        assert alike == same_batches


@pytest.mark.parametrize("executor", ["pack", "reference"])
def test_unreadable_rows_are_reported_in_the_client_s_update(job: Job, executor: str) -> None:
    torn = without_rows(job.dataset, 1)
    outcome = Trial(job, torn, executor=executor).train(CLIENTS)
    first, bad, last = outcome.updates
    assert [update.client for update in outcome.updates] == CLIENTS
    assert bad.failure is not None
    assert bad.failure.startswith("batch of local step 0: IndexError: index 10")
    assert (bad.weight, bad.tensors, bad.metrics) == (0.0, {}, {"steps": 0.0})
    assert outcome.states[1] is None
    for update, state in ((first, outcome.states[0]), (last, outcome.states[2])):
        assert update.failure is None
        assert update.weight == len(job.dataset.rows_of(update.client))
        assert update.tensors
        assert state is not None
        assert state.cursor == 4
    again = Trial(job, torn, executor=executor).train(CLIENTS)
    assert all(same(a.tensors, b.tensors) for a, b in zip(outcome.updates, again.updates, strict=True))


@pytest.mark.parametrize("executor", ["pack", "reference"])
def test_nan_is_kept_out_of_the_metrics(job: Job, executor: str) -> None:
    """A step of 1e38 must overflow: step 0 has a loss, step 1 has no finite one, and training ends there."""
    outcome = Trial(job, executor=executor).train([0], lr=1e38)
    (update,) = outcome.updates
    assert update.failure == "non-finite loss at local step 1"
    assert {"loss", "loss_last"}.isdisjoint(update.metrics)
    assert update.metrics["steps"] == 2
    assert all(math.isfinite(value) for value in update.metrics.values())
    assert outcome.states == (None,)


@pytest.mark.parametrize("part", ["upload", "client_state"])
def test_sent_and_kept_tensors_must_be_finite(job: Job, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(type(job.method), part)

    def spoiled(self: Any, broadcast: Any, result: Any, *rest: Any) -> Any:
        out = right(self, broadcast, result, *rest)
        if result.client != 1:
            return out
        bad = {"x/left": torch.tensor([math.inf])}
        return replace(out, tensors=bad) if part == "upload" else bad

    monkeypatch.setattr(type(job.method), part, spoiled)
    outcome = Trial(job).train(CLIENTS)
    assert [update.failure for update in outcome.updates] == [None, "non-finite values in x/left", None]
    assert outcome.updates[1].metrics["loss"] > 0
    assert [state is None for state in outcome.states] == [False, True, False]


def test_pack_with_a_failure_caches_no_states(job: Job) -> None:
    """The pack is run again, and its other clients may then end with different states."""
    failed, whole = Trial(job, without_rows(job.dataset, 1)), Trial(job)
    failed.train(CLIENTS)
    assert not failed.worker._resident
    whole.train(CLIENTS)
    assert list(whole.worker._resident) == CLIENTS


def test_oldest_cached_states_are_dropped_first(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten numbers, 40 bytes a state, room for 100 bytes: two of them; a repeated one becomes the newest."""
    monkeypatch.setattr("rayfed_sub.runtime.worker._RESIDENT_BYTES", 100)
    worker = Trial(job).worker
    for client in (0, 1, 0, 2):
        worker._remember(client, ClientState(1, 0, 0, {"x": torch.zeros(10)}))
    assert list(worker._resident) == [0, 2]
    worker._remember(3, ClientState(1, 0, 0, {"x": torch.zeros(30)}))  # too large even alone, yet kept alone
    assert list(worker._resident) == [3]
    worker._remember(4, ClientState(1, 0, 0, {"x": torch.zeros(20)}))
    worker._remember(5, ClientState(1, 0, 0, {"x": torch.zeros(5)}))
    assert list(worker._resident) == [4, 5]


def test_exception_of_the_method_keeps_its_traceback(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(type(job.method), "upload", broken)
    with pytest.raises(KeyError):
        Trial(job).train(CLIENTS)


def test_worker_releases_the_broadcast(job: Job) -> None:
    """The object store keeps whatever a process still reads."""
    trial = Trial(job)
    trial.train([0])
    trial.worker.evaluate(range(1), trial.broadcast, None, None)
    tensors = [weakref.ref(tensor) for tensor in trial.broadcast.tensors.values()]
    assert tensors
    del trial.broadcast
    gc.collect()
    assert all(tensor() is None for tensor in tensors)


def test_answer_has_its_reference_cut_as_in_training_and_the_likeliest_tokens(job: Job) -> None:
    """task.max_length is 36 bytes here: after bos and "Q: 15 + 15 =\nA: " 19 are left of "30, as everybody knows"."""
    trial, held_out = Trial(job), job.dataset.held_out
    rows = list(range(len(held_out)))
    generated = trial.worker.generate(rows, trial.broadcast, None, None)
    judged = trial.worker.evaluate(rows, trial.broadcast, None, None)
    assert isinstance(held_out, Rows)
    for row, found, prediction in zip(rows, generated, judged, strict=True):
        prompt, _, shown = job.processor.decode(held_out.row(row).tolist()).partition("\nA: ")
        number = 2 * int(prompt.removesuffix(" =").rpartition(" + ")[2])
        answer = f"{number}, as everybody knows"[: 36 - 1 - len(prompt) - len("\nA: ")]
        assert found.reference == found.labels == shown == answer
        assert found.teacher_forced == job.processor.decode(prediction.predicted)
        assert 0 < len(prediction.predicted) == len(shown)
        assert len(found.answer) <= job.config.evaluation.max_new_tokens
    assert {len(found.reference) for found in generated} == {19, 21}  # of two digits and of one


def test_worker_limits_the_kernel_cache(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    Trial(job)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
