"""DP-SGD for single rows: sums by hand and against gradients of rows alone, draws, the account, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from rayfed_sub import load_config, run
from rayfed_sub.config.schema import Config, Optimizer
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import LocalStep, Start, Tensors
from rayfed_sub.data.batching import Batch, ClientBatches, poisson_rows
from rayfed_sub.methods import METHODS
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.planning.plan import plan_of
from rayfed_sub.planning.sampling import cohort, draws
from rayfed_sub.planning.traffic import first_start
from rayfed_sub.privacy.accountant import account, epsilon, noise_of, spent
from rayfed_sub.privacy.examples import RowPrivacy
from rayfed_sub.training import private_rows
from rayfed_sub.training.private_rows import add_clipped, rows_of
from tests.helpers.tiny_models import (
    Tiny,
    bert,
    distance,
    draw_batches,
    llama,
    lora_start,
    run_pack,
    run_reference,
    start_of,
    vit,
)
from tests.methods.test_protocol import OPTIMIZER, clients_data, made, same, walk

TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
SGD = Optimizer(name="sgd", lr=1.0, weight_decay=0.0)
NEARLY_NONE = 1e-12


def test_rows_are_clipped_together_over_all_tensors_and_added_to_their_client_s_sum() -> None:
    """Clip 1.  Row 0, (3, 0) and (4), has norm 5: (0.6, 0) and (0.8).  Row 1, (0, 0.3) and (0.4), has norm 0.5 and
    stays.  Row 2, of the other client, (0, 0) and (-2): (0, 0) and (-1)."""
    sums = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 1)}
    gradients = {"a": torch.tensor([[3.0, 0], [0, 0.3], [0, 0]]), "b": torch.tensor([[4.0], [0.4], [-2]])}
    add_clipped(sums, gradients, [0, 0, 1], 1.0)
    assert torch.allclose(sums["a"], torch.tensor([[0.6, 0.3], [0, 0]]))
    assert torch.allclose(sums["b"], torch.tensor([[1.2], [-1.0]]))


def gradient(tiny: Tiny, start: Start, row: Batch) -> dict[str, Tensor]:
    """The gradient of a row alone with respect to the trained tensors: a step of SGD at rate 1, taken back, by peft; by
    a pack of this one row where the start has a subspace, whose step is (1 / scale) dLoss/dL."""
    alone = run_reference if start.subspace is None else run_pack
    (after,) = alone(tiny, [start], [[row]], SGD, lr=1.0)
    factor = {name: start.scale if of_subspace(start, name) else 1.0 for name in start.trained}
    return {name: factor[name] * (start.tensors[name] - after.tensors[name]) for name in start.trained}


def of_subspace(start: Start, name: str) -> bool:
    return start.subspace is not None and name.endswith(("/left", "/right"))


@pytest.mark.parametrize(
    ("tiny", "kind"),
    [(llama, "lora"), (llama, "core"), (llama, "shared"), (bert, "ffa"), (bert, "dense"), (vit, "lora")],
)
def test_step_is_the_sum_of_rows_clipped_one_by_one_and_noise(tiny: Callable[[], Tiny], kind: str) -> None:
    """Against a loop over rows with the libraries' executor, and numpy's sums: five rows of 9 to 5 tokens at client 4,
    none at client 7; the clip is the median of the norms, 3 rows are expected, the noise is half a clip."""
    model = tiny()
    start, batch = start_of(kind, model), draw_batches(model, 0, 1, rows=5)[0]
    alone = [gradient(model, start, row) for row in rows_of(batch)]
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in own.values())) for own in alone]
    privacy = RowPrivacy(sorted(norms)[2], 0.5)
    none = {name: tensor[:0] for name, tensor in batch.items()}
    both = run_pack(model, [start] * 2, [[batch], [none]], SGD, lr=1.0, clients=[4, 7], privacy=privacy, expected=3)
    for client, own, result in ((4, list(zip(alone, norms, strict=True)), both[0]), (7, [], both[1])):
        noise = privacy.drawn(0, client, 0, {name: start.tensors[name] for name in start.trained})
        for name in start.trained:
            clipped = [min(1.0, privacy.clip / norm) * g[name].double() for g, norm in own]
            step = (sum(clipped, torch.zeros(())) + noise[name].double()) / 3
            step = step / start.scale if of_subspace(start, name) else step
            assert distance(start.tensors[name] - result.tensors[name], step) < 2e-5, (client, name)


@pytest.mark.parametrize("tiny", [llama, bert])
def test_bits_are_the_same_in_any_pack_and_for_any_number_of_rows_at_a_time(
    tiny: Callable[[], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four clients of two ranks, one of them without rows in its second step; dropout and AdamW."""
    model, privacy = tiny(), RowPrivacy(0.01, 1.0)
    starts = [replace(lora_start(model, rank), dropout=0.2) for rank in (2, 3, 2, 2)]
    batches = [draw_batches(model, seed, 2, rows=3 + seed % 2) for seed in range(4)]
    batches[3][1] = {name: tensor[:0] for name, tensor in batches[3][1].items()}
    how = {"lr": 0.01, "privacy": privacy, "expected": 3}
    whole = run_pack(model, starts, batches, Optimizer(), clients=range(4), **how)
    monkeypatch.setattr(private_rows, "_NUMBERS", 1)  # one row at a time
    for k in range(4):
        (alone,) = run_pack(model, [starts[k]], [batches[k]], Optimizer(), clients=[k], **how)
        assert same(alone.tensors, whole[k].tensors)
        assert same(alone.moments, whole[k].moments)


# --- every method: nothing but clipped rows and noise reaches what a client sends


def test_a_hook_s_steps_and_the_loss_are_those_of_steps_with_rows() -> None:
    """Number 0 is a round's first step, and a step without rows has no loss that would count as 0."""
    tiny, seen = llama(), list[int]()

    def correct(memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        seen.append(step.number)
        return step.gradients, memory

    start = replace(start_of("lora", tiny), correct=correct)
    (batch,) = draw_batches(tiny, 0, 1, rows=3)
    none = {name: x[:0] for name, x in batch.items()}
    (result,) = run_pack(
        tiny, [start], [[batch, none]], SGD, lr=0.0, clients=[0], privacy=RowPrivacy(1.0, 1.0), expected=3
    )
    assert seen == [0, 1]
    assert result.metrics["steps"] == 2.0
    assert result.metrics["loss_last"] == result.metrics["loss"] > 1.0


def refreshed(name: str, tiny: Tiny) -> bool:
    """Whether the method's bases come from a client's gradients, as `_check_examples` in planning/job.py asks."""
    subspace = first_start(made(name), tiny.shape, Config(), 0).subspace
    return subspace is not None and bool(subspace.refresh_every)


def test_fedftg_alone_computes_bases_from_gradients_without_noise() -> None:
    assert [name for name in METHODS if refreshed(name, llama())] == ["fedftg"]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fedftg"])
def test_uploads_and_states_follow_from_clipped_rows_and_noise_alone(name: str) -> None:
    """With a clip of 1e-12 and noise of deviation 1, rows are lost in rounding: two rounds of two clients end with the
    same bits whatever their rows are.  Whatever else of the rows reached them would show."""
    tiny, method = llama(), made(name)
    private = partial(run_pack, privacy=RowPrivacy(NEARLY_NONE, 1 / NEARLY_NONE), expected=3)
    found = []
    for seed in (0, 50):
        server, states, sent = method.init_server(tiny.weights, tiny.shape, seed=0), None, []
        for _ in range(2):
            data = clients_data(tiny, 2, seed=seed)
            done = walk(
                method, tiny, server, data, weights=[1, 2], states=states, lr=1e-3, trainer=private, optimizer=OPTIMIZER
            )
            server, states = done.server, done.states
            sent += [*(update.tensors for update in done.updates), *(state.tensors for state in states)]
        found.append([*sent, server.tensors])
    assert all(any(bool(t.any()) for t in tensors.values()) for tensors in found[0][:2])
    for one, other in zip(*found, strict=True):
        assert same(one, other)


# --- draws of rows


def test_rows_are_drawn_independently_with_the_expected_number() -> None:
    """2,000 steps of 40 rows at 1/5: 8 a step, variance 40 * 0.2 * 0.8 = 6.4; a row comes 400 times, deviation 18."""
    drawn = [poisson_rows(0, 3, np.arange(40), 8, step) for step in range(2000)]
    sizes = np.array([len(rows) for rows in drawn])
    assert abs(sizes.mean() - 8) < 4 * math.sqrt(6.4 / 2000)
    assert abs(((sizes - 8) ** 2).mean() - 6.4) < 4 * 6.4 * math.sqrt(2 / 2000)
    assert abs(np.bincount(np.concatenate(drawn), minlength=40) - 400).max() < 5 * 18
    assert all((np.diff(rows) > 0).all() for rows in drawn)


def test_batches_of_drawn_rows_follow_from_the_step_and_may_be_empty() -> None:
    job = prepared("federation.batch_size=2")

    def batches(cursor: int, steps: int) -> ClientBatches:
        rows = (job.dataset.train, job.dataset.rows_of(0)[:6], 0, 0, 2, cursor, steps, True, 0, "shuffled")
        return ClientBatches(*rows, poisson=True)

    whole, later = batches(0, 40), batches(30, 10)
    assert whole.expected == 2
    sizes = [len(batch["labels"]) for batch in whole]  # type: ignore[index]
    assert 0 in sizes
    assert max(sizes) > 3
    for t in range(10):
        assert same(dict(whole[30 + t]), dict(later[t]))  # type: ignore[call-overload]


# --- the account


def private(*overrides: str, **privacy: object) -> Config:
    keys = {"unit": "example", "clip": 1.0, "delta": 1e-3, **privacy}
    base = ["federation.clients=4", "federation.rounds=3", "federation.local_steps=2", "task.max_rows=120"]
    return load_config(
        TINY, [*base, "method={name: ffa-lora, rank: 2}", *(f"privacy.{k}={v}" for k, v in keys.items()), *overrides]
    )


def prepared(*overrides: str, **privacy: object) -> Job:
    return prepare(private(*overrides, **({"noise": 1.0} | privacy)))


def test_draws_by_hand() -> None:
    """Clients of 30, 10, 20 and 10 rows, batches of 5: chances 1/6, 1/2, 1/4 and 1/2.  Two clients a round, one step
    each but client 3, which takes 4: a client's steps are those of the rounds that it was drawn for."""
    config = private("federation.sampled=2", "federation.local_steps=[1,1,1,4]", "federation.batch_size=5", noise=1.0)
    dataset = Sized(np.array([0, 30, 40, 60, 70]))
    assert draws(config, dataset, 0) == ()  # type: ignore[arg-type]
    for rounds in (1, 3):
        times = np.zeros(4, int)
        for n in range(rounds):
            times[cohort(config, n)] += 1
        times *= [1, 1, 1, 4]
        every = {(q, int(t)) for q, t in zip((1 / 6, 1 / 2, 1 / 4, 1 / 2), times, strict=True) if t}
        found = draws(config, dataset, rounds)  # type: ignore[arg-type]
        assert set(found) <= every
        for q, t in every:  # each is no worse than one that stays
            assert any(p >= q and s >= t for p, s in found)
        worst = max(epsilon(1.0, q, t, 1e-3) for q, t in every)
        assert spent(config, 1.0, partial(draws, config, dataset, rounds)) == worst  # type: ignore[arg-type]


class Sized:
    """Offsets of clients' rows, as a data set has them."""

    def __init__(self, offsets: np.ndarray) -> None:  # type: ignore[type-arg]
        self.client_offsets = offsets


def test_account_is_the_worst_client_s() -> None:
    """Client A, 10 steps at 1/2, and B, 2 steps with all rows, of which neither is below the other by its numbers."""
    config = private(noise=1.0)
    of = {pair: epsilon(1.0, *pair, 1e-3) for pair in ((0.5, 10), (1.0, 2))}
    figures = account(config, 1.0, lambda: tuple(of))
    assert figures is not None
    assert (figures["epsilon"], figures["unit"]) == (max(of.values()), "example")
    assert spent(config, 1.0, tuple) == 0.0  # nothing was released


def test_noise_for_a_budget_keeps_it_for_every_client() -> None:
    config = private(epsilon=2.0)
    asked = ((0.9, 2), (1.0, 1))
    found = noise_of(config, lambda: asked)
    assert found is not None
    assert max(epsilon(found, *pair, 1e-3) for pair in asked) <= 2.0
    assert max(epsilon(0.999 * found, *pair, 1e-3) for pair in asked) > 2.0


def test_plan_says_what_will_be_spent() -> None:
    """Four clients with at least 30 rows, batches of 4, two steps in each of three rounds."""
    job = prepared()
    of_all = draws(job.config, job.dataset, 3)
    assert of_all == ((4 / np.diff(job.dataset.client_offsets).min(), 6),)
    planned = plan_of(job)
    assert planned.privacy == account(job.config, job.noise, lambda: of_all)
    assert planned.worker.tensors > 0


# --- a run, and refusals


@pytest.mark.slow
def test_run_says_what_it_spent_round_by_round(tmp_path: Path) -> None:
    """Clients by rows and not by Poisson sampling, with weights by rows, a server optimizer and a hook."""
    overrides = ["resources.workers=0", "evaluation.eval_rows=8", "federation.rounds=2", "server.optimizer=momentum"]
    config = private(*overrides, "federation.sampled=3", "hook.name=scaffold", noise=0.7)
    summary = run(config, tmp_path / "run")
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds.clients.tolist() == [3, 3]
    assert summary.privacy is not None
    assert summary.privacy["unit"] == "example"
    assert 0 < rounds.epsilon[0] < rounds.epsilon[1] == summary.privacy["epsilon"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["method={name: fedftg, rank: 2}"], r"privacy\.unit: got 'example'; .*bases come from a client's gradients"),
        (["federation.batching=bucketed"], r"federation\.batching: got 'bucketed'; allowed: shuffled with"),
        (["resources.executor=reference"], r"resources\.executor: got 'reference'; .*gradients of single rows"),
        (["privacy.clip=null", "privacy.noise=null"], r"privacy\.clip: got None; .*privacy\.unit=example"),
        (
            [
                "model.random={type: mixtral, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
                "num_attention_heads: 2, num_key_value_heads: 2, num_local_experts: 2}"
            ],
            r"privacy\.unit: got 'example'; .*experts",
        ),
    ],
)
def test_what_the_mechanism_does_not_cover_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        prepared(*overrides)
    assert "\n" not in str(caught.value)
