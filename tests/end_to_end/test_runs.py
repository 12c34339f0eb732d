"""The engine on Ray: the same bits for any number of workers and after a death; shared memory, placement."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

from rayfed_sub import load_config, run
from rayfed_sub.config.schema import Config
from rayfed_sub.core.arrays import packed
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.methods import METHODS, build
from rayfed_sub.planning import plan
from rayfed_sub.privacy.accountant import epsilon
from rayfed_sub.storage import checkpoints
from rayfed_sub.telemetry.events import PackDone, Summary
from tests.helpers import packings
from tests.methods.checks import upload_numbers

TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
SMALL = [
    "model.random.hidden_size=32",
    "model.random.intermediate_size=96",
    "model.random.num_hidden_layers=2",
    "optimizer.lr=0.01",
    "task.max_rows=240",  # of 1,180, which take longer to tokenise than to train on
]
BERT = {
    **{"type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"max_position_embeddings": 128, "initializer_range": 0.2},
}
FOUR_PACKS = ["resources.pack_size=2", "resources.cpus_per_worker=0.5", "evaluation.batch_size=8"]


def small(*overrides: str) -> Config:
    """Without workers unless requested: they cost seconds to start, and change no bits."""
    return load_config(TINY, [*SMALL, *FOUR_PACKS, "resources.workers=0", "federation.rounds=2", *overrides])


@pytest.fixture(scope="module")
def records() -> list[object]:
    """Events of the undisturbed run, in the order in which its listener received them."""
    return []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, records: list[object]) -> Summary:
    return run(small(), tmp_path_factory.mktemp("run") / "one", records.append)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_final_weights_do_not_depend_on_the_number_of_workers(
    ray_session: None, undisturbed: Summary, workers: int, tmp_path: Path
) -> None:
    summary = run(small(f"resources.workers={workers}"), tmp_path / "run")
    assert summary.weights_sha256 == undisturbed.weights_sha256
    assert summary.metrics == undisturbed.metrics


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 3, 100])
def test_final_weights_and_scores_do_not_depend_on_which_clients_train_side_by_side(
    undisturbed: Summary, most: int, tmp_path: Path
) -> None:
    summary = run(small(f"resources.pack_size={most}", f"evaluation.batch_size={most}"), tmp_path / "run")
    assert summary.weights_sha256 == undisturbed.weights_sha256
    assert summary.metrics == undisturbed.metrics


def case_of(most: str, workers: str, trouble: str) -> packings.Case:
    """The case of `make chaos` with these values."""
    wanted = {"most": most, "workers": workers, "trouble": trouble}
    return next(case for case in packings.cases() if wanted.items() <= case.items())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case_of("8", "2", "none"), id="quiet"),
        pytest.param(case_of("100", "1", "resumed with another size"), id="resumed", marks=pytest.mark.slow),
    ],
)
def test_ways_of_packing_under_ray_give_the_bits_of_a_run_without_it(
    ray_session: None, case: packings.Case, tmp_path: Path
) -> None:
    """Two of the thirty of `make chaos`; `test_recovery.py` has one whose worker is killed."""
    quiet = packings.quiet(case, tmp_path / "quiet").weights_sha256
    assert packings.packed(case, tmp_path / "packed").weights_sha256 == quiet


def test_run_of_one_process_has_a_default_dtype_of_its_own(undisturbed: Summary, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        summary = run(small(), tmp_path / "run")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert summary.weights_sha256 == undisturbed.weights_sha256


def test_run_of_one_process_builds_no_model_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers sets torch's default dtype meanwhile, for all threads."""
    events = list[str]()
    real = plan.memory
    monkeypatch.setattr(plan, "memory", lambda job: events.append("planned") or real(job))
    run(small("federation.rounds=1"), tmp_path / "run", lambda record: events.append(type(record).__name__))
    assert events.index("planned") > events.index("RoundDone")


@pytest.mark.slow
def test_other_seed_gives_other_weights(undisturbed: Summary, tmp_path: Path) -> None:
    assert run(small("seed=1"), tmp_path / "run").weights_sha256 != undisturbed.weights_sha256


@pytest.mark.slow
def test_worker_killed_in_the_middle_of_a_round_changes_nothing(
    ray_session: None, undisturbed: Summary, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(record: Any) -> None:
        if isinstance(record, PackDone) and not killed:  # one pack of four is accumulated
            workers = [p for p in psutil.Process().children(recursive=True) if "ray::Worker" in p.name() + _title(p)]
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)

    summary = run(small("resources.workers=2"), tmp_path / "run", kill_one)
    assert killed
    assert summary.weights_sha256 == undisturbed.weights_sha256
    assert summary.metrics == undisturbed.metrics
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    assert sorted(clients.client) == sorted(list(range(8)) * 2)  # every client once a round: none lost, none twice


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def test_run_folder(undisturbed: Summary) -> None:
    folder = Path(undisturbed.folder)
    assert {p.name for p in folder.iterdir()} == {
        *("rounds.parquet", "clients.parquet", "packs.parquet", "scores.parquet"),
        *("layers.parquet", "client_layers.parquet"),
        *("config.yaml", "summary.json", "log.jsonl", "checkpoints", "tensorboard", "report.html"),
    }
    summary = json.loads((folder / "summary.json").read_text())
    for key in (
        *("method", "rounds", "weights_sha256", "uplink_bytes", "downlink_bytes", "wall_seconds", "train_seconds"),
        *("peak_memory_bytes", "metrics", "versions"),
    ):
        assert key in summary
    assert load_config(folder / "config.yaml") == load_config(folder / "config.yaml", ["federation.rounds=2"])


def test_diagnostics_change_no_bits(undisturbed: Summary, tmp_path: Path) -> None:
    without = run(small("diagnostics.every=0"), tmp_path / "run")
    assert without.weights_sha256 == undisturbed.weights_sha256
    assert (without.change_rank, undisturbed.change_rank) == (None, 32.0)  # 8 clients of rank 4
    assert pd.read_parquet(tmp_path / "run" / "rounds.parquet")["change_rank"].isna().all()
    assert len(pd.read_parquet(tmp_path / "run" / "layers.parquet")) == 0


def test_diagnostics_cover_every_layer_round_and_client(undisturbed: Summary) -> None:
    """Two layers of 96 x 32, two rounds of 8 clients, whose changes have rank 4 each."""
    folder = Path(undisturbed.folder)
    layers, clients, packs = (
        pd.read_parquet(folder / f"{name}.parquet") for name in ("layers", "client_layers", "packs")
    )
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert list(zip(layers["round"], layers["layer"], strict=True)) == [(n, name) for n in range(2) for name in names]
    assert layers["clients"].tolist() == [8] * 4
    assert layers["rank_sum"].tolist() == [8 * 4] * 4
    assert layers["rank"].tolist() == layers["server_rank"].tolist(), "fedftg applies the mean change as it is"
    assert (layers["accumulated"] > 0).all()
    assert len(clients) == 2 * 2 * 8
    assert clients["rank"].eq(4).all()
    # One of four of the eight clients, in both layers.
    assert clients["gradient_energy"].notna().sum() == 2 * 2 * 2
    assert clients["gradient_energy"].dropna().between(0, 1).all()
    assert list(zip(packs["round"], packs["pack"], packs["clients"], strict=True)) == [
        (n, i, 2) for n in range(2) for i in range(4)
    ]
    assert packs["first"].tolist()[:4] == packs["first"].tolist()[4:]
    assert (packs["tokens"] / packs["computed"]).between(0.9, 1).all()
    assert packs["attempts"].eq(1).all()
    assert packs["seconds"].gt(0).all()


def test_wire_bytes_of_fedftg_by_hand(undisturbed: Summary) -> None:
    """Two layers of 96 x 32, rank 4, 8 clients, 2 rounds of 4 steps, a refresh every 8 steps: one period a round."""
    up = 2 * 4 * (96 + 32) * 4  # layers x r x (m + n) x bytes
    assert undisturbed.uplink_bytes == 2 * 8 * up
    # Before round 0 a client has everything; before round 1 it misses 8 clients' blocks of rank 4: rank 32 in all,
    # 32 * (96 + 32) = 4,096 numbers, but the matrix itself has only 96 * 32 = 3,072.
    assert undisturbed.downlink_bytes == 8 * 2 * 96 * 32 * 4


def test_training_lowers_the_loss(undisturbed: Summary) -> None:
    assert undisturbed.metrics["held_out_loss"] < undisturbed.metrics["held_out_loss_before"] - 0.02


QUICK = ("fedavg", "fedsa-lora")  # dense, personal
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS if name != "fedftg"]


@pytest.mark.parametrize("name", EACH)
def test_every_method_runs_by_name_and_counts_its_bytes(name: str, tmp_path: Path) -> None:
    """With only the name replaced: two rounds, 8 clients, two layers of 96 x 32, rank 4; `undisturbed` is fedftg."""
    config = small(f"method.name={name}")
    summary = run(config, tmp_path / "run")
    method = build(config.method)
    sizes = {"m": 96, "n": 32, "r": 4, "k": 1, "h": getattr(method, "heads", 1)}
    numbers = sum(upload_numbers(method.wire, round, **sizes) for round in range(2))
    assert summary.uplink_bytes == 8 * 2 * 4 * numbers  # clients x layers x bytes
    assert summary.metrics["held_out_loss"] < summary.metrics["held_out_loss_before"]


@pytest.mark.slow
def test_centralized_training_is_local_training_of_fedftg(ray_session: None, tmp_path: Path) -> None:
    summary = run(small("federation.clients=1", "federation.partition={kind: pool, largest: 8}"), tmp_path / "run")
    assert summary.uplink_bytes == 2 * 2 * 4 * 4 * (96 + 32)  # rounds x layers x bytes x r (m + n)
    assert summary.metrics["held_out_loss"] < summary.metrics["held_out_loss_before"]


@pytest.mark.parametrize("room", ["training", "storage", "telemetry", "runtime", "privacy"])
def test_engine_names_no_method(room: str) -> None:
    files = list((Path(__file__).parents[2] / "rayfed_sub" / room).glob("*.py"))
    assert files
    words = "\n".join(path.read_text() for path in files)
    assert not [name for name in METHODS if f'"{name}"' in words]


def test_reference_executor_agrees_with_packs(undisturbed: Summary, tmp_path: Path) -> None:
    summary = run(small("resources.executor=reference"), tmp_path / "run")
    assert summary.metrics["held_out_loss"] == pytest.approx(undisturbed.metrics["held_out_loss"], rel=1e-4)
    assert summary.uplink_bytes == undisturbed.uplink_bytes


@pytest.mark.parametrize("method", ["fedftg", pytest.param("fedit", marks=pytest.mark.slow)])
def test_classifier_trains_its_head_with_its_targets(method: str, tmp_path: Path) -> None:
    """Rows of one letter or the other, classified by a random BERT: starts at ln 2 = 0.69 nats."""
    table = tmp_path / "letters.csv"
    rows = [f"{letter * length},{letter}" for length in range(3, 83) for letter in "az"]
    table.write_text("sentence,letter\n" + "\n".join(rows) + "\n")
    config = load_config(
        {
            "model": {"path": "random", "random": BERT},
            "task": {"name": "table", "path": str(table), "prompt": "{sentence}", "label": "letter"},
            "federation": {"clients": 3, "rounds": 4, "local_steps": 6, "partition": {"kind": "iid"}},
            "method": {"name": method, "rank": 4},
            "optimizer": {"lr": 0.01},
            "resources": {"workers": 0},
        }
    )
    summary = run(config, tmp_path / "run")
    assert summary.metrics["held_out_loss_before"] == pytest.approx(0.69, abs=0.2)
    assert summary.metrics["held_out_loss"] < 0.3


def test_client_of_one_row_trains_and_validation_rows_are_evaluated(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    rows = [
        f"{who} {n},answer {n} of {who},{who}" for who, count in (("a", 60), ("b", 20), ("c", 1)) for n in range(count)
    ]
    table.write_text("q,a,by\n" + "\n".join(rows) + "\n")
    task = f"task={{name: table, path: {table}, prompt: '{{q}}', answer: a, test_share: 0.2, validation_share: 0.1}}"
    column = "federation.partition={kind: column, column: by}"
    settings = [task, column, "federation.clients=3", "resources.pack_size=3", "evaluation.generate_rows=4"]
    run(small(*settings, "evaluation.split=validation"), tmp_path / "run")
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet").set_index(["round", "client"])
    # "c" has one row, which each of its 4 steps learns: "answer 0 of c" and its end are 14 bytes.
    assert clients.loc[(0, 2), ["weight", "steps", "labels"]].tolist() == [1, 4, 4 * 14]
    scores = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    answered = scores[(scores.metric == "rouge_l") & scores.client.isna()]
    assert list(zip(answered.rounds, answered["count"], strict=True)) == [(0, 4), (2, 4)]  # before and after
    # Of 60 and 20 rows a tenth is for validation: 6 and 2, of which every answer but "answer 0 of a" is as long.
    judged = scores[(scores.metric == "held_out_loss") & (scores.rounds == 1)].set_index("client")["count"]
    assert 6 * 14 <= judged.loc[0] <= 6 * 15
    assert 2 * 14 <= judged.loc[1] <= 2 * 15


def test_sampled_cohort_trains_only_its_clients(tmp_path: Path) -> None:
    run(small("federation.sampled=3", "federation.rounds=3"), tmp_path / "run")
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    assert (clients.groupby("round").client.nunique() == 3).all()
    first_time = clients.sort_values("round").drop_duplicates("client")
    # A new client has the pretrained weights: it needs all blocks of earlier rounds, 3 clients x rank 4 each.
    for row in first_time.itertuples():
        assert row.downlink_bytes == 2 * min(96 * 32, row.round * 3 * 4 * (96 + 32)) * 4


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_failing_client_is_named_with_round_and_stage(workers: int, ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"round \d+, client \d+, local training: non-finite"):
        run(small("optimizer={lr: 3.0e+38}", f"resources.workers={workers}"), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()  # an unfinished run does not look finished


def test_run_does_not_overwrite_another(undisturbed: Summary) -> None:
    with pytest.raises(UserError, match="--out"):
        run(small(), undisturbed.folder)


@pytest.mark.slow
def test_workers_share_a_gpu_by_fractions(ray_session: None) -> None:
    """Four workers of a quarter GPU are placed at once on the only GPU (a counter here), a fifth waits."""
    import ray

    from rayfed_sub.runtime.ray_workers import worker_options

    class Probe:
        def visible(self) -> str:
            return os.environ["CUDA_VISIBLE_DEVICES"]

    actors = [ray.remote(Probe).options(**worker_options(0.25, 0.25)).remote() for _ in range(5)]
    calls = [actor.visible.remote() for actor in actors]
    done, waiting = ray.wait(calls, num_returns=4, timeout=60)
    assert ray.get(done) == ["0"] * 4
    assert ray.wait(waiting, timeout=2) == ([], waiting)
    assert len(waiting) == 1
    for actor in actors:
        ray.kill(actor)


def test_backbone_takes_no_private_memory_of_a_worker(ray_session: None) -> None:
    """400 MB of weights: USS after loading minus USS before grows by less than 15 % of them (60 MB)."""
    import ray

    class Reader:
        def uss(self) -> int:
            return int(psutil.Process().memory_full_info().uss)

        def load(self, references: list[Any]) -> float:
            from torch import nn

            from rayfed_sub.core.arrays import unpacked
            from rayfed_sub.models.weights import assemble  # the worker's own imports, before measuring

            self.before = self.uss()
            tensors = unpacked(ray.get(references[0]))
            with torch.device("meta"):
                self.module = nn.ModuleList([nn.Linear(1000, 10_000, bias=False) for _ in range(10)])
            self.module.load_state_dict(tensors, assign=True)
            assert assemble
            return float(sum(parameter.sum() for parameter in self.module.parameters()))  # every page is touched

        def grown(self) -> int:
            return self.uss() - self.before

    weights = {f"{i}.weight": torch.full((10_000, 1000), 1e-7 * (i + 1)) for i in range(10)}
    reference = ray.put(packed(weights))
    actors = [ray.remote(num_cpus=1)(Reader).remote() for _ in range(2)]
    ray.get([actor.load.remote([reference]) for actor in actors], timeout=120)
    grown = ray.get([actor.grown.remote() for actor in actors], timeout=60)
    print(f"private growth of two workers with 400 MB: {[f'{g / 1e6:.1f} MB' for g in grown]}")
    assert max(grown) < 0.15 * 400e6
    for actor in actors:
        ray.kill(actor)


@contextmanager
def own_method(start_client: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a method that is FedAvg except for the given body of `start_client`."""
    from ray import cloudpickle

    (folder / "own.py").write_text(
        f"""
from dataclasses import dataclass, replace
from rayfed_sub.methods.fedavg import FedAvg
@dataclass(frozen=True)
class Own(FedAvg):
    def start_client(self, broadcast, state, client, shape):{start_client}
"""
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    own = importlib.import_module("own")
    cloudpickle.register_pickle_by_value(own)  # the actors cannot import a file of this test
    try:
        yield "own:Own"
    finally:
        cloudpickle.unregister_pickle_by_value(own)


@pytest.mark.parametrize(
    ("write", "workers", "message"),
    [
        # torch's version counters detect it in the worker, by name
        (".mul_(2.0)", 0, r"tensor model\.layers\.0\.mlp\.up_proj/weight was written in place"),
        # bypasses torch: the coordinator's checksum detects it before the round counts
        (".numpy().__imul__(2.0)", 1, r"round 0, shared memory: the broadcast's bytes changed"),
    ],
)
def test_in_place_write_to_shared_memory_stops_the_run(
    write: str, workers: int, message: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that writes to the broadcast."""
    start_client = f"""
        next(iter(broadcast.tensors.values())){write}
        return super().start_client(broadcast, state, client, shape)"""
    with own_method(start_client, tmp_path, monkeypatch) as name, pytest.raises(RunError, match=message):
        run(small(f"method={{name: '{name}'}}", f"resources.workers={workers}"), tmp_path / "run")
    assert checkpoints.newest(tmp_path / "run") is None  # the server is in that memory: nothing of it is kept


def test_listener_gets_every_stage_pack_and_round(undisturbed: Summary, records: list[object]) -> None:
    kinds = [type(record).__name__ for record in records]
    assert kinds[:3] == ["Stage"] * 3
    assert kinds[kinds.index("Started") + 1 :] == (["PackDone"] * 4 + ["RoundDone"]) * 2


def test_exported_result_is_loaded_by_transformers(undisturbed: Summary, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from rayfed_sub.export.exported import export_hf
    from rayfed_sub.storage.checkpoints import read

    export_hf(Path(undisturbed.folder), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = read(Path(undisturbed.folder))
    assert found is not None
    weight = found.server["model.layers.0.mlp.up_proj/weight"]
    assert torch.equal(model.get_parameter("model.layers.0.mlp.up_proj.weight"), weight)
    assert sorted(client for client, _ in found.state_files) == list(range(8))
    assert {file.cursor for file in found.state_files.values()} == {8}  # 2 rounds x 4 steps


PRIVATE = [
    *("federation.sampled=3", "federation.client_weighting=uniform"),
    "privacy={clip: 0.1, noise: 50, delta: 1.0e-3}",
]


@pytest.mark.slow
def test_noise_does_not_depend_on_the_workers(ray_session: None, tmp_path: Path) -> None:
    one, two = (run(small(*PRIVATE, f"resources.workers={w}"), tmp_path / f"{w}") for w in (0, 2))
    assert one.weights_sha256 == two.weights_sha256


def test_privacy_adds_noise_and_reports_the_spent_budget(tmp_path: Path) -> None:
    """Poisson cohorts of 3 of 8 on average, noise above the signal."""
    one = run(small(*PRIVATE), tmp_path / "0")
    assert one.metrics["held_out_loss"] > one.metrics["held_out_loss_before"]
    rounds = pd.read_parquet(tmp_path / "0" / "rounds.parquet")
    assert rounds.epsilon.tolist() == [epsilon(50, 3 / 8, n, 1e-3) for n in (1, 2)]
    assert one.privacy is not None
    assert (one.privacy["epsilon"], one.privacy["delta"], one.privacy["noise"]) == (rounds.epsilon[1], 1e-3, 50)
    assert one.privacy["epsilon"] <= one.privacy["epsilon_rdp"]
    assert one.environment["noise"] == 50
    clients = pd.read_parquet(tmp_path / "0" / "clients.parquet")
    assert (clients.weight < 1).any()  # at least one client was clipped


def test_client_that_always_fails_is_skipped_if_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 3 starts with factors that are not finite; the others' rounds count."""
    start_client = """
        start = super().start_client(broadcast, state, client, shape)
        spoiled = {name: tensor * float("nan") for name, tensor in start.tensors.items()}
        return replace(start, tensors=spoiled) if client.id == 3 else start"""
    with own_method(start_client, tmp_path, monkeypatch) as name:
        named = f"method={{name: '{name}'}}"
        skipping = [named, "federation.on_client_failure=skip"]
        run(small(*skipping), tmp_path / "skip")
        message = r"round 0, client 3, local training: non-finite loss.*federation.on_client_failure=skip would"
        with pytest.raises(RunError, match=message):
            run(small(named), tmp_path / "stop")
    rounds, clients = (pd.read_parquet(tmp_path / "skip" / f"{name}.parquet") for name in ("rounds", "clients"))
    assert rounds.failed.tolist() == [1, 1]
    failed = clients[clients.client == 3]
    assert failed.weight.tolist() == failed.uplink_bytes.tolist() == [0, 0]
    assert failed.failure.str.startswith("non-finite loss at local step 0").all()
    others = clients[clients.client != 3]
    assert len(others) == 14
    assert others.failure.isna().all()


@pytest.mark.slow
def test_run_leaves_no_thread_behind(undisturbed: Summary, tmp_path: Path) -> None:
    """Many runs in one process, as in a sweep."""
    before = set(threading.enumerate())
    run(small("federation.rounds=1"), tmp_path / "run")
    assert {thread.name for thread in threading.enumerate() if thread not in before} == set()
