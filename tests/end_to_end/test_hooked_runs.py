"""Runs with SCAFFOLD: the same bits in any pack and after an interruption, bytes as planned, and its control variates
in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rayfed_sub import UserError, load_config, run
from rayfed_sub.config.schema import Config
from rayfed_sub.methods.scaffold import Scaffold
from rayfed_sub.planning.job import prepare
from rayfed_sub.planning.plan import job_parts
from rayfed_sub.storage import checkpoints, client_states
from rayfed_sub.telemetry.events import PackDone, Summary
from tests.end_to_end.test_runs import SMALL, TINY

SCAFFOLD = [
    *("method={name: fedit, rank: 2}", "hook.name=scaffold", "optimizer.name=sgd", "optimizer.lr=0.3"),
    *("federation.sampled=5", "federation.rounds=2", "federation.local_steps=[4, 2, 3]", "federation.batch_size=2"),
    *("federation.client_weighting=uniform", "resources.workers=0", "evaluation.every=2", "evaluation.eval_rows=16"),
]


def hooked(*overrides: str) -> Config:
    return load_config(TINY, [*SMALL, *SCAFFOLD, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hooked") / "run"


@pytest.fixture(scope="module")
def whole(folder: Path) -> Summary:
    """The run in packs of three."""
    return run(hooked("resources.pack_size=3"), folder)


def test_run_in_other_packs_has_the_same_bits(whole: Summary, tmp_path: Path) -> None:
    assert run(hooked("resources.pack_size=8"), tmp_path / "run").weights_sha256 == whole.weights_sha256


def test_object_stands_for_its_name(whole: Summary, tmp_path: Path) -> None:
    done = run(hooked("hook={}"), tmp_path / "run", hooks=Scaffold())
    assert (done.weights_sha256, done.uplink_bytes) == (whole.weights_sha256, whole.uplink_bytes)
    assert load_config(tmp_path / "run" / "config.yaml").hook == {"name": "scaffold"}


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ([Scaffold(), Scaffold()], "hooks: got '2 hooks'; allowed: one hook"),
        (
            Scaffold,
            "hooks: got 'Scaffold'; allowed: an instance of a dataclass with a hook's functions, such as correct",
        ),
        (7, "hooks: got 'int'; allowed: an instance of a dataclass with a hook's functions, such as correct"),
    ],
)
def test_what_is_no_hook_is_one_line(hooks: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(hooked("hook={}"), tmp_path / "run", hooks=hooks)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


def test_interrupted_run_ends_with_the_same_bits(whole: Summary, tmp_path: Path) -> None:
    """In packs of two up to the middle of round 1, then alone; states read back from their files."""

    def interrupt(record: object) -> None:
        if isinstance(record, PackDone) and record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(hooked("resources.pack_size=2"), tmp_path / "run", interrupt)
    resumed = run(hooked("resources.pack_size=1"), tmp_path / "run", resume=True)
    assert (resumed.weights_sha256, resumed.rounds) == (whole.weights_sha256, 2)
    assert resumed.planned_memory_bytes is not None


def test_bytes_are_as_planned(whole: Summary) -> None:
    """Twice those without the hook: control variates have the shapes of the factors."""
    rounds = job_parts(prepare(hooked())).traffic().rounds
    for way, summed in (("up", whole.uplink_bytes), ("down", whole.downlink_bytes)):
        assert sum(getattr(client, way) for walked in rounds for client in walked.values()) == summed
    bare = job_parts(prepare(hooked("hook={}"))).traffic().rounds
    assert 2 * sum(client.up for walked in bare for client in walked.values()) == whole.uplink_bytes


def test_server_s_control_variate_is_the_mean_of_all_clients(whole: Summary, folder: Path) -> None:
    """A client that was never sampled has no state and counts as zero; 8 clients in all."""
    found = checkpoints.read(folder)
    assert found is not None
    states = [
        client_states.read(checkpoints.clients(folder), key, entry).tensors for key, entry in found.state_files.items()
    ]
    assert 5 <= len(states) <= 8
    names = [name for name in found.server if name.startswith("hook/")]
    assert len(names) == 2 * len(prepare(hooked()).architecture.shape.targets)
    for name in names:
        mean = torch.stack([state[name] for state in states]).sum(0) / 8
        torch.testing.assert_close(found.server[name], mean, rtol=1e-3, atol=1e-6)
