"""The plan: bytes equal those of real rounds, memory matches a real worker, a job that cannot fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from rayfed_sub import load_config, run
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Client, ClientState, Layer, ModelShape, wire_bytes
from rayfed_sub.data.rows import Rows
from rayfed_sub.methods import METHODS, build
from rayfed_sub.models.weights import load_weights
from rayfed_sub.planning import machines
from rayfed_sub.planning.allocations import Allocations
from rayfed_sub.planning.fit import check_fits
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.planning.machines import Machine, machine_named
from rayfed_sub.planning.needs import HOLES, Need, need
from rayfed_sub.planning.plan import as_dict, here, job_parts, plan, plan_of
from rayfed_sub.planning.traffic import Parts, by_method, traffic
from rayfed_sub.planning.worker_memory import backbone_bytes
from rayfed_sub.runtime.probe import probe
from rayfed_sub.storage import checkpoints
from tests.end_to_end.test_runs import BERT, SMALL, TINY, small
from tests.helpers.measured_worker import prepared
from tests.helpers.tiny_models import bert, llama
from tests.methods.test_protocol import OPTIMIZER, STEPS, clients_data, made, walk

ROOT = Path(__file__).parents[2]
LIKE = ["federation.local_steps=2", "evaluation.generate_rows=0"]


# --- bytes

BOUNDED = ("hetlora", "florist", "fedmomentum")
"""Clients prune themselves, or the server keeps as much as the data asks for."""


@pytest.mark.parametrize("model", [llama, bert])
@pytest.mark.parametrize("name", list(METHODS))
def test_bytes_match_real_training(name: str, model: Any) -> None:
    """Three rounds of clients (0, 1, 2), (0, 2) and (1, 2) on layers of two or three shapes, GaLore closing blocks (3
    steps, a refresh every 2); where bytes follow from the data, they are at most the planned ones."""
    tiny, method = model(), made(name, **{"refresh_every": 2} if name == "fedftg" else {})
    cohorts = [[0, 1, 2], [0, 2], [1, 2]]
    planned = traffic(method, tiny.shape, Config(optimizer=OPTIMIZER), cohorts, lambda client: STEPS)
    server, states = method.init_server(tiny.weights, tiny.shape, seed=0), dict[int, ClientState]()
    assert planned.server[0] == wire_bytes(server.tensors)
    for n, cohort in enumerate(cohorts):
        since = {k: states[k].round - 1 if k in states else -1 for k in cohort}
        down = [method.download_bytes(server, tiny.shape, Client(k, 0), since[k]) if n else 0 for k in cohort]
        data, before = clients_data(tiny, len(cohort), seed=10 * n), [states.get(k) for k in cohort]
        done = walk(method, tiny, server, data, weights=[1.0] * len(cohort), states=before, ids=cohort)
        for k, update, state, received in zip(cohort, done.updates, done.states, down, strict=True):
            found = planned.rounds[n][k]
            got, sent = (found.up, found.down, found.state), (update.wire_bytes, received, wire_bytes(state.tensors))
            assert all(a >= b for a, b in zip(got, sent, strict=True)) if name in BOUNDED else got == sent
            states[k] = state
        server = done.server
        assert planned.server[n + 1] == wire_bytes(server.tensors) or name in BOUNDED


@pytest.mark.parametrize(
    "overrides",
    [
        ["federation.sampled=3", "method.refresh_every=3", "optimizer.weight_decay=0.01"],
        pytest.param(
            ["method={name: fedit, optimizer_state: average}", "server.optimizer=adam", "server.lr=0.01"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["method={name: flora, client_ranks: [1, 3]}", "federation.sampled=5", "server.optimizer=momentum"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bytes_match_a_run(overrides: list[str], tmp_path: Path) -> None:
    """Compare with clients.parquet, and with the states in the last checkpoint."""
    config = small("federation.rounds=3", "resources.workers=0", *overrides)
    job = prepare(config)
    found = job_parts(job).traffic()
    run(config, tmp_path / "run")
    rows = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    for row in rows.itertuples():
        client = found.rounds[row.round][row.client]
        assert (client.up, client.down) == (row.uplink_bytes, row.downlink_bytes)
    checkpoint = checkpoints.read(tmp_path / "run")
    assert checkpoint is not None
    assert {client for client, _ in checkpoint.state_files} == set(rows.client)
    for client, after in checkpoint.state_files:
        state = checkpoints.stored_state(tmp_path / "run", checkpoint, client)
        assert wire_bytes(state.tensors) == found.rounds[after - 1][client].state
    assert wire_bytes(checkpoint.server) == found.server[-1]


@pytest.mark.parametrize("method", [{"name": "fedavg"}, {"name": "fedit", "rank": 8, "rank_pattern": {"gate": 2}}])
def test_methods_are_planned_at_a_rank_that_fits_the_narrowest_target(method: dict[str, Any]) -> None:
    """A run of fedavg, which has no rank, and one whose own rank fits by its pattern: the others have 2, not 8."""
    shape = ModelShape((Layer("up", 16, 8), Layer("gate", 2, 8)))
    parts = Parts(Config(method=method), build(method), Mock(shape=shape), Mock(), [[0], [0]], lambda client: 1)
    ranks = {row.method: row.rank for row in by_method(parts)}
    others = {name: None if name == "fedavg" else 2 for name in METHODS}
    assert ranks == {**others, method["name"]: method.get("rank")}


def test_download_is_limited_to_the_dense_size() -> None:
    """Layers of 24 x 16 at rank 2: a client's block has 2 * 40 = 80 numbers, the matrix 384, so five fill it."""
    tiny = llama(targets=r"up_proj$")
    for clients, numbers in ((1, 80), (4, 320), (5, 384), (50, 384)):
        cohorts = [list(range(clients)), [0]]
        found = traffic(made("flora"), tiny.shape, Config(), cohorts, lambda client: 1)
        assert found.rounds[1][0].down == 2 * numbers * 4  # two layers, 4 bytes a number


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.dtype=bfloat16"],
        ["model.random={type: gpt2, n_embd: 32, n_layer: 2, n_head: 2}"],
        ["model.random={type: gpt2, n_embd: 32, n_layer: 2, n_head: 2}", "model.quantize=int8"],
        ["model.quantize=nf4", "model.dtype=bfloat16"],
    ],
)
def test_backbone_bytes_match_the_loaded_backbone(overrides: list[str]) -> None:
    job = prepare(load_config(TINY, overrides))
    loaded = load_weights(job.config.model, job.architecture, seed=0)
    assert backbone_bytes(job.architecture) == sum(x.numel() * x.element_size() for x in loaded.values())


# --- limits

MANY = ["federation.clients=128", "federation.partition={kind: iid}"]  # a pack is not larger than a cohort


def refused(machine: Machine, *overrides: str) -> tuple[UserError, list[str]]:
    """The refusal, and its advice as overrides."""
    job = prepare(small(*overrides))
    with pytest.raises(UserError) as caught:
        check_fits(job_parts(job), machine)
    assert "\n" not in str(caught.value)
    words = caught.value.advice.partition("set ")[2].partition(",")[0]
    return caught.value, words.split()


def fitting(machine: Machine, *overrides: str) -> None:
    check_fits(job_parts(prepare(small(*overrides))), machine)


MB, PLENTY = 10**6, 10**12


@pytest.mark.parametrize(
    ("memory", "pack", "field"), [(1500, 2, "resources.workers"), (1490, 64, "resources.pack_size")]
)
def test_job_with_too_much_memory_is_refused_with_the_nearest_fit(memory: int, pack: int, field: str) -> None:
    """Eight workers need eight bare processes of 80 MB, and what they hold in each."""
    machine = Machine("a small machine", memory * MB, 8.0, PLENTY)
    wide = ["resources.workers=8", f"resources.pack_size={pack}", *MANY]
    error, advice = refused(machine, *wide)
    assert error.field == field
    assert f"{memory / 1000:.1f} GB of memory on a small machine; this run needs " in error.allowed
    fitting(machine, *wide, *advice)


def test_job_that_fits_no_machine_is_refused() -> None:
    toy = Machine("a toy", 400 * MB, 2.0, PLENTY)
    error, _ = refused(toy, "resources.workers=1")
    assert error.field == "model.path"
    fitting(toy, "resources.workers=0")  # Ray, libraries, coordinator and worker take 0.9 GB before they hold anything


@pytest.mark.slow
def test_too_small_gpu_is_refused() -> None:
    """A context alone takes 600 MB."""
    gpu = machine_named("640MB", Machine("here", PLENTY, 8.0, PLENTY))
    fitting(gpu)
    error, advice = refused(gpu, "resources.pack_size=128", *MANY)
    assert error.field == "resources.pack_size"
    fitting(gpu, *MANY, *advice)
    with pytest.raises(UserError, match="--on: got 'abacus'; allowed: t4, "):
        machine_named("abacus", gpu)


def test_pack_is_not_larger_than_a_cohort() -> None:
    """Eight clients make one pack of eight, whatever the largest pack is."""
    eight, more = (need(job_parts(prepare(small(f"resources.pack_size={n}")))) for n in (8, 512))
    assert eight.worker(8) == more.worker(512)


def test_states_that_fill_the_disk_are_refused() -> None:
    """FedAvg keeps two moments of two layers of 96 x 32: 2 * 2 * 3,072 * 4 = 49,152 bytes a client; the server half."""
    enough = 8 * 49_152 + 24_576
    fitting(Machine("here", PLENTY, 8.0, enough), "method.name=fedavg")
    full = Machine("here", PLENTY, 8.0, enough - 1)
    error, advice = refused(full, "method.name=fedavg")
    assert error.field == "federation.clients"
    fitting(full, "method.name=fedavg", *advice)


def test_best_checkpoint_takes_its_place_on_disk() -> None:
    """Another server, and another state of each of eight clients, while one best checkpoint replaces another."""
    best = ["early_stopping.metric=held_out_loss", "evaluation.split=validation", "task.validation_share=0.1"]
    plain, kept = (need(job_parts(prepare(small("method.name=fedavg", *more)))).disk for more in ([], best))
    assert kept - plain == 8 * 49_152 + 24_576


# --- the plan


def test_experts_are_planned_in_float32() -> None:
    """Six tokens of eight numbers for three experts of 8 x 4: the products have 6 x 4 numbers, their gradient 6 x 8."""
    x_Sk, weight_Ekn = torch.empty(6, 8, device="meta", requires_grad=True), torch.empty(3, 8, 4, device="meta")
    offs_E = torch.empty(3, dtype=torch.int32, device="meta")
    with Allocations([x_Sk, weight_Ekn, offs_E]) as seen:
        y_Sn = functional.grouped_mm(x_Sk, weight_Ekn, offs=offs_E)
        assert (y_Sn.shape, seen.live) == ((6, 4), 6 * 4 * 4)
        (d_Sk,) = torch.autograd.grad(y_Sn, x_Sk, torch.empty_like(y_Sn))
        assert d_Sk.shape == (6, 8)
        assert torch.empty(3, 2, device="meta").nonzero().shape == (6, 2)
        assert [len(part) for part in x_Sk.split([0, 0, 0])] == [6, 0, 0]  # nobody knows how many each expert takes


def test_plan_by_hand() -> None:
    """Two layers of 96 x 32 at rank 4, 8 clients: the figures of tests/end_to_end/test_runs.py, and an Adam state of
    two factors."""
    planned = plan_of(prepare(small("resources.workers=2")))
    up = 2 * 4 * (96 + 32) * 4
    assert [row.up_all for row in planned.rounds] == [8 * up, 8 * up]
    assert [row.down for row in planned.rounds] == [(0, 0), (2 * 96 * 32 * 4,) * 2]  # 8 blocks exceed the matrix
    # The cost of the first broadcast, and of all clients' two downloads.
    assert [row.down_counted for row in planned.rounds] == [(2 * 96 * 32 * 4,) * 2] * 2
    assert [row.down_counted_all for row in planned.rounds] == [8 * 2 * 96 * 32 * 4] * 2
    # The basis on the side of 32, two moments on the side of 96.
    assert planned.state == (2 * 4 * (32 + 2 * 96) * 4,) * 2
    # Both factors, two moments and the gradient of the trained one.
    assert planned.resident == (2 * 4 * (96 + 32 + 3 * 96) * 4,) * 2
    assert {row.method for row in planned.methods} == set(METHODS)
    assert {row.down[0] for row in planned.methods} == {0}
    assert next(row.down_counted for row in planned.methods if row.method == "fedit") == (up, up)
    dense = next(row for row in planned.ranks if row.method == "fedavg")
    assert (dense.state, dense.resident) == (2 * 2 * 3072 * 4, 4 * 2 * 3072 * 4)
    memory = [fit.worker for fit in planned.fits]
    assert memory == sorted(memory)
    assert json.loads(json.dumps(as_dict(planned)))["server"][0] == 2 * 96 * 32 * 4


TIMED = ["devices.classes={a: {seconds_per_step: 1}}", "federation.mode=async", "method={name: fedit, rank: 4}"]


@pytest.mark.parametrize(
    ("rule", "updates", "counted", "results"),
    [("buffer=3", 3, 6, 7), ("buffer=6", 6, 8, 8), ("rule=fedasync", 1, 2, 5)],
)
def test_round_of_an_asynchronous_run_has_the_buffer_s_updates(
    rule: str, updates: int, counted: int, results: int
) -> None:
    """Two steps of eight clients, five of them under way at a time: as many results wait at once as there are places,
    and in the buffer before its last one, at most one of each client.  A result is two factors of rank 4 of two layers
    of 96 x 32, and a state with two moments of each."""
    job = prepare(small("federation.sampled=5", f"federation.asynchronous.{rule}", *TIMED))
    planned, factors = plan_of(job), 2 * 4 * (96 + 32) * 4
    assert [(row.clients, row.up_all) for row in planned.rounds] == [(updates, updates * factors)] * 2
    assert [row.down_all for row in planned.rounds] == [0, updates * factors]
    assert planned.clients == (8, 5, counted)
    needed = need(job_parts(job))
    assert (needed.cohort, needed.waiting) == (5, results * 3 * factors)
    # Two checkpoints' states, and three servers' with the results of the clients under way.
    assert needed.disk == 2 * counted * 2 * factors + 3 * (factors + 5 * 3 * factors)
    assert any(f"with {updates} update" in note for note in planned.notes)


@pytest.mark.parametrize(
    ("names", "stat"),
    [
        (("memory.max", "memory.current", "memory.stat"), "anon 10\ninactive_file 300\n"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "inactive_file 7\ntotal_inactive_file 300\n",
        ),
    ],
    ids=["cgroups 2", "cgroups 1"],
)
@pytest.mark.parametrize(("used", "free"), [(900, 400), (1400, 0)])
def test_free_memory_of_a_container_has_what_files_were_read_into(
    names: tuple[str, ...], stat: str, used: int, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in zip(names, ("1000\n", f"{used}\n", stat), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machines, "_CGROUPS", tmp_path)
    assert machines.free_memory() == free


@pytest.mark.parametrize(("threads", "told"), [(1, "they grow where"), (2, "which stay so")])
def test_plan_says_whether_packs_grow(threads: int, told: str) -> None:
    notes = plan_of(prepare(small("resources.pack_size=auto", f"resources.cpus_per_worker={threads}"))).notes
    assert any(told in note for note in notes)


def test_no_worker_is_advised_where_the_model_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is quantised when it is loaded is dense at first."""
    parts, machine = job_parts(prepare(small())), Machine("m", 10**11, 2.0, 10**12)
    check_fits(parts, machine)
    monkeypatch.setattr(Need, "loading", 10**12)
    with pytest.raises(UserError, match=r"^model\.path: .*at least; take a smaller model, or one that bitsandbytes"):
        check_fits(parts, machine)
    assert {fit.workers for fit in plan(parts, machine).fits} == {0}


def test_coordinator_s_memory_has_the_layers_that_diagnostics_look_at() -> None:
    """Both layers of 96 x 32 side by side: three copies in float32, two in float64."""
    off, on = (need(job_parts(prepare(small(f"diagnostics.every={every}")))) for every in (0, 1))
    assert (off.compared, on.compared) == (0, 2 * 96 * 32 * (3 * 4 + 2 * 8))
    assert on.fixed(1, 1) - off.fixed(1, 1) == pytest.approx(HOLES * (on.compared + on.looked), abs=2)


@pytest.mark.parametrize(("method", "grows"), [("fedftg", True), ("fedit", False)])
def test_note_on_downloads_that_grow_with_the_cohort(method: str, grows: bool) -> None:
    planned = plan_of(prepare(small("federation.rounds=4", f"method={{name: {method}, rank: 4}}")))
    assert any("changes of the whole cohort" in note for note in planned.notes) == grows


STACKS = {"fedftg", "fedkrso", "flora", "florist", "fedex-lora", "fedmomentum"}
TWICE = [range(8), range(8)]


@pytest.mark.parametrize(
    ("method", "fields", "cohorts", "grows"),
    [
        *((method, {"rank": 2}, TWICE, method in STACKS) for method in METHODS if method != "fedavg"),
        ("fedavg", {}, TWICE, False),
        ("flora", {"rank": 8, "client_ranks": [1] * 8}, TWICE, True),
        ("frlora", {"rank": 2, "rank_pattern": {"up": 4}}, TWICE, False),
        ("fedftg", {"rank": 2}, [[0], [0]], False),
        ("fedftg", {"rank": 2}, [range(8)], False),
        ("fedftg", {"rank": 2}, [[], range(8)], False),
    ],
)
def test_downloads_that_grow_with_the_cohort(
    method: str, fields: dict[str, Any], cohorts: list[list[int]], grows: bool
) -> None:
    config = Config(method={"name": method, **fields})
    shape = ModelShape((Layer("up", 64, 32),))
    parts = Parts(config, build(config.method), Mock(shape=shape), Mock(), cohorts, lambda client: 1)
    assert parts.stacked == grows


@pytest.mark.slow
def test_neither_data_nor_plan_imports_ray() -> None:
    """Both in one process of their own, with JSON alone on stdout."""
    code = (
        "import sys; words = sys.argv[1:]\n"
        "from rayfed_sub.cli.main import _code\n"
        "for command in ('data', 'plan'):\n"
        "    sys.argv[1:] = [command, *words]\n"
        "    assert _code() == 0\n"
        "    print(command, 'ray' in sys.modules, file=sys.stderr)\n"
    )
    words = [sys.executable, "-c", code, str(TINY), *SMALL, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert {"data False", "plan False"} <= set(done.stderr.splitlines())
    data, end = json.JSONDecoder().raw_decode(done.stdout)
    assert data["column"] == "module"
    assert json.loads(done.stdout[end:])["method"] == "fedftg"


@pytest.mark.slow
def test_private_run_is_timed_with_its_clipping() -> None:
    """Workers clip with the server's own notes, which `fedftg` needs for its ranks, so they must be sent."""
    private = ["federation.sampled=4", "federation.client_weighting=uniform", "privacy.clip=0.5", "privacy.noise=1"]
    speed = probe(prepare(small(*private)), [1])
    assert [timed.pack_size for timed in speed.packs] == [1, 2]
    assert speed.round > 0


def test_classifier_is_planned_too(tmp_path: Path) -> None:
    table = tmp_path / "letters.csv"
    table.write_text("sentence,letter\n" + "\n".join(f"{x * n},{x}" for n in range(3, 40) for x in "az") + "\n")
    tree = {
        "model": {"path": "random", "random": BERT},
        "task": {"name": "table", "path": str(table), "prompt": "{sentence}", "label": "letter"},
        "federation": {"clients": 3, "partition": {"kind": "iid"}},
    }
    job = prepare(load_config(tree))
    planned = plan_of(job)
    assert (planned.rows.tokens, planned.rows.labels) == (41, 1)  # 39 letters between two marks, one class
    assert backbone_bytes(job.architecture) == wire_bytes(load_weights(job.config.model, job.architecture, seed=0))


# --- memory


def with_longest_rows(job: Job, clients: int) -> Job:
    """The job with the longest rows alone: a batch for each client, and one to evaluate."""
    data, size = job.dataset, job.config.federation.batch_size
    assert isinstance(data.train, Rows)
    assert isinstance(data.held_out, Rows)
    train = np.argsort(-data.train.lengths, kind="stable")[: clients * size]
    judged = np.argsort(-data.held_out.lengths, kind="stable")[: job.config.evaluation.batch_size]
    assert set(data.train.lengths[train].tolist()) == {job.config.task.max_length}
    longest = replace(
        data,
        train=data.train.take(train),
        train_keys=data.train_keys[train],
        client_rows=np.arange(len(train)),
        client_offsets=np.arange(0, len(train) + 1, size),
        held_out=data.held_out.take(judged),
        held_out_clients=data.held_out_clients[judged],
    )
    return replace(job, dataset=longest)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["method.name=fedit"], ["model.dtype=float32"]])
def test_worker_takes_the_planned_memory(overrides: list[str], tmp_path: Path) -> None:
    """SmolLM2-135M, 4 clients x 4 rows x 64 tokens, within 15 % of the growth of a real worker.

    Rows lie flat, so a pack of the task's own rows, 41 tokens on average, takes a fifth less than one of the longest
    rows, which the plan takes all to be."""
    job = prepare(load_config(ROOT / "experiments" / "quickstart.yaml", [*LIKE, *overrides]))
    planned = need(job_parts(job)).worker(4).process
    prepared(with_longest_rows(job, clients=4), tmp_path)
    command = [sys.executable, "-m", "tests.helpers.measured_worker", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280, cwd=ROOT)
    measured = int(done.stdout)
    print(f"{overrides}: measured {measured / MB:.0f} MB, planned {planned / MB:.0f} MB, {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.15)


def test_machine_is_measured(tmp_path: Path) -> None:
    machine = here(prepare(small()), tmp_path / "not" / "there" / "yet")
    assert 0 < machine.memory < PLENTY
    assert machine.disk > 0
    assert machine.gpu is None, "the job requests no GPU"
