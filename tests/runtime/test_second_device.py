"""A worker whose device is not the CPU: nothing mixes devices, and no local step waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfed_sub import load_config
from rayfed_sub.core.arrays import packed
from rayfed_sub.core.devices import meta_as
from rayfed_sub.core.types import Broadcast, ClientState, ServerState
from rayfed_sub.methods import METHODS, build
from rayfed_sub.models.weights import load_weights, target_weights
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.planning.sampling import pack_work
from rayfed_sub.runtime import worker as worker_module
from rayfed_sub.runtime.worker import PackOutcome, Spec, Worker
from tests.end_to_end.test_runs import BERT, small
from tests.helpers.second_device import SecondDevice, Seen

States = Mapping[int, ClientState]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers on the meta device, which stands for a GPU."""
    monkeypatch.setattr(worker_module, "_device", lambda *_: torch.device("meta"))
    with meta_as("cuda"):
        yield


def server_of(job: Job) -> ServerState:
    pretrained = target_weights(job.architecture.shape, job.architecture.transposed, weights_of(job))
    return job.method.init_server(pretrained, job.architecture.shape, job.config.seed)


def round_of(job: Job, worker: Worker, server: ServerState, clients: Sequence[int], states: States) -> PackOutcome:
    """One pack's round; clients with a state come back."""
    for client, state in states.items():
        worker._remember(client, state)
    stored = [((k, states[k].round), None) if k in states else None for k in clients]
    work = pack_work(job.config, job.dataset, server.round, clients)
    return worker.train(work, stored, Broadcast(server.round, job.method.broadcast(server).tensors))


@cache
def prepared() -> Job:
    """A job that all tests share."""
    rows = ("task.max_rows=40", "federation.partition.kind=iid", "federation.local_steps=2", "diagnostics.every=0")
    return prepare(small(*rows, "model.random.num_hidden_layers=1"))


def job_of(name: str, **fields: object) -> Job:
    return replace(prepared(), method=build({"name": name, **fields}))


_WEIGHTS: dict[int, dict[str, torch.Tensor]] = {}


def weights_of(job: Job) -> dict[str, torch.Tensor]:
    """The model's weights, read once."""
    key = id(job.architecture)
    if key not in _WEIGHTS:
        _WEIGHTS[key] = load_weights(job.config.model, job.architecture, job.config.seed)
    return _WEIGHTS[key]


def made(job: Job) -> Worker:
    return Worker(Spec(job.config, job.method, job.architecture, job.processor), packed(weights_of(job)), job.dataset)


def walked(job: Job) -> tuple[Seen, Seen]:
    """What a pack of two returning clients and a new one asks away from the CPU, and a shard of held-out rows, after a
    round on the CPU."""
    method, shape, server = job.method, job.architecture.shape, server_of(job)
    with pytest.MonkeyPatch.context() as at_home:
        at_home.setattr(worker_module, "_device", lambda *_: torch.device("cpu"))
        first = round_of(job, made(job), server, [0, 1], {})
    states = {k: state for k, state in enumerate(first.states) if state is not None}
    assert len(states) == 2
    total = method.accumulator(server, shape)
    for update in first.updates:
        total = method.accumulate(total, update, shape)
    server, worker = method.aggregate(server, total, shape), made(job)
    with SecondDevice() as training:
        round_of(job, worker, server, [0, 1, 2], states)
    owner = (0, ((0, 1), None)) if method.personal else (None, None)
    with SecondDevice() as judging:
        worker.evaluate(range(4), Broadcast(server.round, method.broadcast(server).tensors), *owner)
    return training.seen, judging.seen


def asked(seen: Counter[str], *but: str) -> dict[str, int]:
    """Where the device was asked, and how often, but for files of these names."""
    return {where: n for where, n in seen.items() if n and not any(name in where for name in but)}


STARTING = ("fedalt.py", "fedsub.py", "components.py", "fed_sb_gradient.py")
"""Methods that ask the broadcast for a number of theirs before the first step."""


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", list(METHODS))
def test_round_of_every_method_mixes_no_devices(name: str) -> None:
    """Two steps of returning clients and new ones: the device is asked once for the losses of the round, and once a
    layer by an eigenproblem; of an evaluation nothing but the predictions comes back.  Deterministic mode has an
    algorithm for all of it."""
    training, judging = walked(job_of(name))
    by_training = {where: n for where, n in asked(training.reads).items() if where.startswith("training/")}
    eigenproblems = len(prepared().architecture.shape.targets) if name == "fedftg" else 0
    assert sum(n for where, n in by_training.items() if "executor.py" in where) == 1
    assert sum(by_training.values()) == 1 + eigenproblems
    assert asked(training.reads, *STARTING).keys() == by_training.keys()
    assert asked(training.sends, *STARTING) == {}
    assert asked(judging.reads, *STARTING) == {}
    assert judging.fetched == 2  # losses and predictions
    assert training.unsteady == judging.unsteady == {}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("projector", ["svd", "randomized", "random"])
def test_refresh_asks_no_more_than_its_factorisation(projector: str) -> None:
    training, _ = walked(job_of("fedftg", projector=projector))
    assert sum(training.reads.values()) == 1
    assert asked(training.sends) == {}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "fields",
    [{"name": "fedftg", "refresh_every": 1, "moments": "rotate"}, {"name": "fedit", "dropout": 0.1}],
    ids=lambda fields: fields["name"],
)
def test_step_s_additions_ask_nothing(fields: dict[str, Any]) -> None:
    """Closed blocks that decay, moments that turn, a clipped norm, FedProx's pull, dropout."""
    job = prepared()
    federation = job.config.federation.model_copy(update={"proximal": 0.1})
    optimizer = job.config.optimizer.model_copy(update={"clip_norm": 1.0, "weight_decay": 0.1})
    config = job.config.model_copy(update={"federation": federation, "optimizer": optimizer})
    training, _ = walked(replace(job, config=config, method=build(fields)))
    assert sum(asked(training.reads, "projectors.py").values()) == 1
    assert asked(training.sends) == {}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["fedit", "fedftg"])
def test_classifier_s_round_mixes_no_devices(name: str, tmp_path: Path) -> None:
    """A BERT with a dense head, rows of several lengths, so several passes a step, and filled up some of them."""
    table = tmp_path / "letters.csv"
    rows = [f"{letter * length},{letter}" for length in range(3, 43) for letter in "az"]
    table.write_text("sentence,letter\n" + "\n".join(rows) + "\n")
    config = load_config(
        {
            "model": {"path": "random", "random": BERT},
            "task": {"name": "table", "path": str(table), "prompt": "{sentence}", "label": "letter"},
            "federation": {"clients": 3, "local_steps": 2, "partition": {"kind": "iid"}},
            "method": {"name": name, "rank": 4},
            "resources": {"workers": 0},
        }
    )
    training, judging = walked(prepare(config))
    assert sum(asked(training.reads, "projectors.py").values()) == 1
    assert asked(judging.reads) == asked(training.sends) == asked(judging.sends) == {}
