"""What a GPU's memory has room for: activation checkpointing and micro-batches in the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rayfed_sub import load_config
from rayfed_sub.core.errors import UserError
from rayfed_sub.planning import machines, needs, plan
from rayfed_sub.planning.fit import check_fits, settled
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.planning.machines import Machine
from rayfed_sub.planning.needs import CUDA, Need, need
from rayfed_sub.planning.over_gpus import over_gpus
from rayfed_sub.planning.packs import most_clients
from rayfed_sub.planning.plan import job_parts
from rayfed_sub.planning.worker_memory import Lengths
from tests.end_to_end.test_runs import small

ON_GPU = ["resources.workers=1", "resources.gpus_per_worker=1", "task.max_rows=40", "federation.partition.kind=iid"]
WIDE = ["federation.batch_size=32", "model.random.num_hidden_layers=4", "evaluation.generate_rows=0"]


def job(*overrides: str) -> Job:
    return prepare(small(*ON_GPU, *WIDE, "evaluation.batch_size=1", *overrides))


def card(gpu: float) -> Machine:
    return Machine("card", 10**12, 8, 10**12, round(gpu))


def needed(one: Job) -> Need:
    return need(job_parts(one), rounds=1, most=2)


@pytest.mark.slow
def test_auto_keeps_activations_where_they_fit() -> None:
    """A card between the two needs computes blocks twice, a larger one does not, a smaller one refuses the run."""
    auto, never = job(), job("resources.activation_checkpointing=none")
    plain = needed(auto)
    pack = plain.config.resources.first_pack
    kept, twice = (replace(plain, recompute=on).worker(pack).tensors for on in (False, True))
    assert twice < 0.6 * kept
    more, less = (plain.on_gpu(tensors) for tensors in (kept, twice))
    assert [settled(plain, card(gpu)).recompute for gpu in (1.01 * more, 1.01 * less)] == [False, True]
    assert not settled(needed(never), card(less)).recompute
    check_fits(job_parts(auto), card(1.01 * less))
    with pytest.raises(UserError, match="this run needs"):
        check_fits(job_parts(auto), card(CUDA / 2))


def test_advised_batch_fits_the_worker_s_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a card has room for 8 rows and not for 16, which the whole card would have."""
    monkeypatch.setattr(needs, "CUDA", 0)  # else the context takes nearly all
    quarter = ("resources.gpus_per_worker=0.25", "resources.pack_size=1", "resources.activation_checkpointing=none")
    one, eight, sixteen = (job(*quarter, f"federation.batch_size={rows}") for rows in (32, 8, 16))
    less, more = (plain.on_gpu(plain.worker(1).tensors) for plain in map(needed, (eight, sixteen)))
    assert 1.5 * less < more < 4 * less
    with pytest.raises(UserError, match=r"^federation.batch_size: got 32; .*set federation.batch_size=8 "):
        check_fits(job_parts(one), card(1.01 * 4 * less))


def test_micro_batches_take_less() -> None:
    whole, parts = (needed(job(f"resources.micro_batch={rows}")).worker(1).tensors for rows in ("null", 2))
    assert parts < 0.3 * whole


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["resources.micro_batch=0"], "resources.micro_batch: got 0"),
        (["resources.executor=reference", "resources.micro_batch=2"], "resources.micro_batch: got 2"),
        (
            ["resources.executor=reference", "resources.activation_checkpointing=blocks"],
            "resources.activation_checkpointing: got 'blocks'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: Sequence[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        prepare(small("task.max_rows=40", "federation.partition.kind=iid", *overrides))


@pytest.mark.slow
def test_model_wider_than_a_gpu_is_planned_over_several() -> None:
    """Blocks in their order on the fewest cards, embeddings on the first and the output layer on the last; no cut into
    as many parts loads its fullest card less."""
    four = prepare(small(*ON_GPU, "evaluation.generate_rows=0", "model.random.num_hidden_layers=4"))
    whole = needed(four)
    tensors = whole.worker(1).tensors
    one = whole.on_gpu(tensors)
    assert over_gpus(whole, tensors, one) == ()
    (half, rest) = over_gpus(whole, tensors, CUDA + (one - CUDA) * 7 // 10)
    assert (half.first, half.last + 1, rest.last) == (1, rest.first, 4)
    assert half.taken + rest.taken - 2 * CUDA == pytest.approx(one - CUDA, rel=1e-3)
    fullest = max(half.taken, rest.taken)
    assert len(over_gpus(whole, tensors, fullest)) == 2
    assert len(over_gpus(whole, tensors, fullest - 1)) != 2  # three, or none
    assert over_gpus(whole, tensors, CUDA) == ()
    (note,) = plan._over_gpus(whole, tensors, card(fullest))
    assert f"over 2 of them: blocks 1 to {half.last} with" in note
    assert list(plan._over_gpus(whole, tensors, card(one))) == []


def test_plan_asks_a_child_for_the_gpu_and_opens_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that starts a run computes nothing: a context on a GPU would take half a gigabyte of it."""

    def opened(*_: object) -> None:
        raise AssertionError("a context on the GPU")

    class Answered:
        returncode, stdout = 0, "Card 9000\n25000000000\n"

    asked = list[Sequence[str]]()
    monkeypatch.setattr(torch.cuda, "_lazy_init", opened)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run = SimpleNamespace(run=lambda command, **_: asked.append(command) or Answered())
    monkeypatch.setattr(machines, "subprocess", run)  # the rows may still have to be read by another process
    machines.gpu_here.cache_clear()
    one = prepare(small(*ON_GPU, "evaluation.generate_rows=0", "model.random.num_hidden_layers=1"))
    try:
        here = plan.here(one)
        plan.check(one)
        found = plan.memory(one)
    finally:
        machines.gpu_here.cache_clear()
    assert (here.name, here.gpu) == ("Card 9000", 25_000_000_000)
    assert len(asked) == 1
    assert "mem_get_info" in asked[0][-1]
    assert not torch.cuda.is_initialized()
    needs = needed(one)
    tensors = needs.worker(most_clients(one.config, needs.cohort, free=one.any_pack)).tensors
    assert found is not None
    assert found.on_gpu == needs.backbone + needs.traffic.broadcast + tensors
    assert found.on_gpu < needs.on_gpu(tensors) - CUDA


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answered:
        returncode, stdout, stderr = 1, "", "Traceback\nRuntimeError: the driver is too old\n"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machines, "subprocess", SimpleNamespace(run=lambda *_, **__: Answered()))
    machines.gpu_here.cache_clear()
    with pytest.raises(UserError, match=r"^resources.gpus_per_worker: got 0.5; .* the driver is too old"):
        machines.gpu_here(0.5)


@pytest.mark.slow
def test_flowertune_is_planned_for_its_cards() -> None:
    """Mistral-7B's shapes, rank 32 on q and v, 16 rows of 512 tokens, one client at a time: activations alone are more
    than a 24 GB or a 48 GB card has beside 14 GB of weights; with blocks that are computed twice, or with four rows at
    a time, they fit, and auto finds that out."""
    config = load_config(
        {
            "model": {
                "path": "random",
                "dtype": "bfloat16",
                "targets": "(q_proj|v_proj)$",
                "random": {"type": "mistral", "num_key_value_heads": 8},
            },
            "task": {"name": "python-docs", "max_length": 512, "max_rows": 100},
            "federation": {"clients": 20, "sampled": 2, "rounds": 1, "batch_size": 16, "partition": {"kind": "iid"}},
            "method": {"name": "fedit", "rank": 32},
            "evaluation": {"generate_rows": 0},
            "resources": {"workers": 1, "gpus_per_worker": 1, "pack_size": 1},
        }
    )
    whole = replace(needed(prepare(config)), size=Lengths(512, 512, 256))
    found = {gpu: settled(whole, card(gpu * 2**30)) for gpu in (23, 47, 79)}
    assert {gpu: one.recompute for gpu, one in found.items()} == {23: True, 47: True, 79: False}
    for gpu, one in found.items():
        assert one.on_gpu(one.worker(1).tensors) < gpu * 2**30
