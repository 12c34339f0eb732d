"""Differential privacy: clipping, noise and the accountant against arithmetic, and the engine's refusals."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from rayfed_sub import load_config
from rayfed_sub.config.loading import yaml_text
from rayfed_sub.config.schema import Config, Optimizer, Server
from rayfed_sub.core.arrays import packed
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.types import Accumulator, Broadcast, Client, Layer, LocalResult, ModelShape, ServerState, Update
from rayfed_sub.methods import METHODS, build
from rayfed_sub.methods.fedit import FedIT
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import advance, moved
from rayfed_sub.models.weights import load_weights, target_weights
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.planning.plan import plan_of
from rayfed_sub.planning.sampling import cohort, draws, pack_work
from rayfed_sub.privacy.accountant import NOISES, account, epsilon, noise_for, renyi_epsilons, spent
from rayfed_sub.privacy.mechanism import at_rest, change, clipped, noise
from rayfed_sub.runtime.worker import Spec, Worker
from tests.helpers.tiny_models import Tiny, bert
from tests.methods.test_protocol import begun, clients_data, made, walk

TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
LINEAR = [name for name in METHODS if made(name).supports_server_optimizer]
every_linear = pytest.mark.parametrize("name", LINEAR)

# One target 3 x 2, and a head 1 x 2 with a bias.
SHAPE = ModelShape((Layer("up", 3, 2),), (Layer("top", 1, 2, bias=True),))
WEIGHTS = {
    "up/weight": torch.tensor([[4.0, 0.0], [0.0, 6.0], [0.0, 0.0]]),
    "top/weight": torch.zeros(1, 2),
    "top/bias": torch.zeros(1),
}


def update_of(
    method: Method,
    server: ServerState,
    ends: Mapping[str, Tensor],
    blocks: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    base_scale: float = 1.0,
) -> Update:
    """The update of a client that returns the tensors `ends`."""
    broadcast = method.broadcast(server)
    start = method.start_client(broadcast, None, Client(0, 0), SHAPE)
    tensors = {**start.tensors, **ends}
    result = LocalResult(0, tensors, {}, 1, blocks or {}, base_scale, 1, {}, trained=start.trained)
    return method.upload(broadcast, result, 1.0, SHAPE)


# --- clipping, by hand


def test_sent_factor_is_clipped() -> None:
    """FFA-LoRA: B moves by (3, 4, 0), the head by (0, 12) and its bias by 0: |d| = sqrt(9 + 16 + 144) = 13."""
    method = made("ffa-lora", rank=1)
    server = method.init_server(WEIGHTS, SHAPE, seed=0)
    ends = {"up/left": torch.tensor([[3.0], [4.0], [0.0]]), "top/weight": torch.tensor([[0.0, 12.0]])}
    sent = update_of(method, server, ends)
    assert clipped(method, server, sent, SHAPE, clip=6.5).weight == pytest.approx(0.5)
    assert clipped(method, server, sent, SHAPE, clip=13.0).weight == 1.0
    assert clipped(method, server, sent, SHAPE, clip=100.0).weight == 1.0
    assert clipped(method, server, sent, SHAPE, clip=6.5).tensors is sent.tensors


def test_both_factors_count_together() -> None:
    """FedIT: B moves by (2, 0, 0), A by (1, 2): |d| = sqrt(4 + 1 + 4) = 3."""
    method = made("fedit", rank=1)
    server = method.init_server(WEIGHTS, SHAPE, seed=0)
    ends = {
        "up/left": torch.tensor([[2.0], [0.0], [0.0]]),
        "up/right": server.tensors["up/right"] + torch.tensor([[1.0, 2.0]]),
    }
    sent = update_of(method, server, ends)
    assert clipped(method, server, sent, SHAPE, clip=1.5).weight == pytest.approx(0.5)


def test_blocks_are_clipped_as_their_dense_change() -> None:
    """FedFTG with decay: W halves, [[-2, 0], [0, -3], [0, 0]], and a block adds 6: |d| = sqrt(4 + 9 + 36) = 7."""
    method = made("fedftg", rank=1)
    server = method.init_server(WEIGHTS, SHAPE, seed=0)
    block = (torch.tensor([[2.0], [0.0], [0.0]]), torch.tensor([[0.0, 3.0]]))
    sent = update_of(method, server, {}, {"up": block}, base_scale=0.5)
    assert change(method, server, sent, SHAPE)["up/weight"].tolist() == [[-2.0, 6.0], [0.0, -3.0], [0.0, 0.0]]
    assert clipped(method, server, sent, SHAPE, clip=3.5).weight == pytest.approx(0.5)


class Chatty(FedIT):
    """Also releases the number of clients."""

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        after = super().aggregate(server, total, shape)
        return ServerState(after.round, {**after.tensors, "clients": torch.tensor(total.weight)})


def test_release_without_noise_ends_the_run() -> None:
    method = Chatty(rank=1)
    server = method.init_server(WEIGHTS, SHAPE, seed=0)
    with pytest.raises(RunError, match="client 0, privacy: the server's clients would be released without noise"):
        clipped(method, server, update_of(method, server, {}), SHAPE, clip=1.0)


# --- a round by hand


def released(method: Method, server: ServerState, updates: list[Update], shape: ModelShape, expected: float):
    """The server without its noise: the sum begins with a client at rest and ends over the fixed denominator."""
    total = method.accumulator(server, shape)
    for update in [at_rest(method, server, shape, seed=0), *updates]:
        total = method.accumulate(total, update, shape)
    after = method.aggregate(server, total, shape)
    return advance(Server(), server, after, {}, total.weight / expected, lambda _, size: torch.zeros(size))[0]


def test_round_is_the_clipped_sum_over_the_fixed_denominator() -> None:
    """B moves by (3, 4, 0), clipped to (1.5, 2, 0), and by (0, 0, 2), left alone; the expected cohort is 4."""
    method = made("ffa-lora", rank=1)
    server = method.init_server(WEIGHTS, SHAPE, seed=0)
    ends = [torch.tensor([[3.0], [4.0], [0.0]]), torch.tensor([[0.0], [0.0], [2.0]])]
    sent = [clipped(method, server, update_of(method, server, {"up/left": end}), SHAPE, clip=2.5) for end in ends]
    after = released(method, server, sent, SHAPE, expected=4)
    assert after.tensors["up/left"].flatten().tolist() == pytest.approx([1.5 / 4, 2.0 / 4, 2.0 / 4])


@every_linear
def test_empty_cohort_releases_noise_alone(name: str) -> None:
    tiny = bert()
    method = made(name)
    server = begun(method, tiny)
    total = method.accumulate(
        method.accumulator(server, tiny.shape), at_rest(method, server, tiny.shape, seed=0), tiny.shape
    )
    after = method.aggregate(server, total, tiny.shape)
    ones, _ = advance(Server(), server, after, {}, total.weight / 5, lambda _, size: torch.ones(tuple(size)))
    names = moved(server, ones)
    assert set(tiny.shape.head_names) < set(names)
    assert all(torch.equal(ones.tensors[key], server.tensors[key] + 1) for key in names)


def test_noise_is_added_before_the_server_s_rule() -> None:
    """d = [1, 0]; half of it and the noise [10, 20] make [10.5, 20], which momentum then stores."""
    before = ServerState(0, {"up/weight": torch.tensor([[1.0, 2.0]]), "step": torch.tensor(3.0)})
    after = before.advance({"up/weight": torch.tensor([[2.0, 2.0]]), "step": torch.tensor(4.0)})
    drawn = {"up/weight": torch.tensor([[10.0, 20.0]])}
    plain, _ = advance(Server(), before, after, {}, 0.5, lambda name, _: drawn[name])
    assert plain.tensors["up/weight"].tolist() == [[11.5, 22.0]]
    assert float(plain.tensors["step"]) == 4.0
    whole, _ = advance(Server(), before, after, {}, 1.0, lambda name, _: drawn[name])
    assert whole.tensors["up/weight"].tolist() == [[12.0, 22.0]]  # nothing to scale, but noise to add
    rule = Server(optimizer="momentum", momentum=0.5, lr=2.0)
    moved, memory = advance(rule, before, after, {}, 0.5, lambda name, _: drawn[name])
    assert memory["up/weight/v"].tolist() == [[10.5, 20.0]]
    assert moved.tensors["up/weight"].tolist() == [[1 + 2 * 10.5, 2 + 2 * 20.0]]


def test_non_finite_change_has_no_weight() -> None:
    """Finite factors whose product overflows float32: 1e30 * 1e30."""
    method, shape = build({"name": "fedftg", "rank": 1}), ModelShape((Layer("up", 2, 1),))
    server = method.init_server({"up/weight": torch.zeros(2, 1)}, shape, 0)
    huge = {"up/left": torch.full((2, 1), 1e30), "up/right": torch.full((1, 1), 1e30)}
    assert math.isnan(clipped(method, server, Update(0, 1.0, huge), shape, 1.0).weight)


# --- invariants of every linear method


def clients(name: str, tiny: Tiny, lr: float = 0.01) -> tuple[Method, ServerState, list[Update]]:
    """Two clients' updates of a second round, with decay, so that GaLore's base scale is not 1."""
    method = made(name)
    server = begun(method, tiny)
    optimizer = Optimizer(weight_decay=0.1)
    done = walk(method, tiny, server, clients_data(tiny, 2), weights=[1, 1], lr=lr, optimizer=optimizer)
    return method, server, done.updates


def folded(method: Method, server: ServerState, updates: list[Update], weights: list[float], tiny: Tiny) -> ServerState:
    total = method.accumulator(server, tiny.shape)
    for update, weight in zip(updates, weights, strict=True):
        total = method.accumulate(total, Update(update.client, weight, update.tensors), tiny.shape)
    return method.aggregate(server, total, tiny.shape)


@every_linear
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 1.0), (1.0, 1e-3)])
def test_mean_of_updates_is_the_mean_of_their_changes(name: str, weights: tuple[float, float]) -> None:
    """aggregate = server + (a d1 + b d2) / (a + b): the reason that clipping a weight clips a change.  float32 weights
    hold the d."""
    tiny = bert()
    method, server, updates = clients(name, tiny)
    changes = [change(method, server, update, tiny.shape) for update in updates]
    after = folded(method, server, updates, list(weights), tiny)
    assert changes[0].keys() == changes[1].keys()
    for key in changes[0]:
        mean = sum(w / sum(weights) * d[key].double() for w, d in zip(weights, changes, strict=True))
        assert mean.norm() > 0
        assert (after.tensors[key] - server.tensors[key] - mean).abs().max() < 1e-6


@every_linear
def test_client_at_rest_changes_nothing_and_names_all_trainable_tensors(name: str) -> None:
    tiny = bert()
    method, server, updates = clients(name, tiny)
    still = change(method, server, at_rest(method, server, tiny.shape, seed=0), tiny.shape)
    assert still.keys() == change(method, server, updates[0], tiny.shape).keys()
    assert all(not d.any() for d in still.values())


@every_linear
def test_one_client_changes_the_release_by_clip_at_most(name: str) -> None:
    """The accountant's neighbours: a cohort with and without its second client, clip 1/100, denominator 5.  The client
    would go further, so the gap is the whole of clip / 5, up to float32's rounding of the weights."""
    tiny, clip, expected = bert(), 0.01, 5.0
    method, server, updates = clients(name, tiny, lr=0.05)
    sent = [clipped(method, server, update, tiny.shape, clip) for update in updates]
    assert all(update.weight < 0.5 for update in sent)
    both, one = (released(method, server, cut, tiny.shape, expected) for cut in (sent, sent[:1]))
    square = sum(
        float((both.tensors[n] - one.tensors[n]).double().square().sum())
        for n in both.tensors
        if n in moved(server, both)
    )
    assert math.sqrt(square) == pytest.approx(clip / expected, rel=1e-3)


# --- noise


def test_noise_has_the_configured_deviation_and_is_new_for_every_round_and_tensor() -> None:
    """200,000 draws: the sample's deviation errs by 1 / sqrt(2 * 200,000) of itself, mean and correlations by
    1 / sqrt(200,000); five times that is allowed."""
    draws = [noise(0, n, 0.5, name, (400, 500)).double() for n, name in ((0, "a"), (1, "a"), (0, "b"))]
    for draw in draws:
        assert float(draw.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * 200_000))
        assert abs(float(draw.mean())) < 0.5 * 5 / math.sqrt(200_000)
    for other in draws[1:]:
        assert abs(float((draws[0] * other).mean()) / 0.25) < 5 / math.sqrt(200_000)
    assert torch.equal(noise(0, 1, 0.5, "a", (400, 500)).double(), draws[1])
    assert not torch.equal(noise(1, 1, 0.5, "a", (400, 500)).double(), draws[1])
    assert noise(0, 0, 1.0, "a", (2, 3)).dtype == torch.float32


# --- the accountant


def gaussian_delta(eps: float, mu: float) -> float:
    """The exact delta of a Gaussian mechanism whose sensitivity is mu deviations (Balle and Wang, arXiv 1805.06530)."""
    below, above = (math.erfc((eps / mu + side * mu / 2) / math.sqrt(2)) / 2 for side in (-1, 1))
    return below - math.exp(eps) * above


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (4.0, 10), (20.0, 100), (1.0, 500), (1e3, 1)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-12])
def test_epsilon_without_sampling_is_exact(z: float, rounds: int, delta: float) -> None:
    """All clients in every round: `rounds` Gaussian mechanisms are one with mu = sqrt(rounds) / z."""
    mu, got = math.sqrt(rounds) / z, epsilon(z, 1.0, rounds, delta)
    assert (got == 0 and gaussian_delta(0.0, mu) <= delta) or gaussian_delta(0.999 * got, mu) > delta
    assert gaussian_delta(got, mu) <= delta * (1 + 1e-6)


@pytest.mark.parametrize(("z", "q"), [(1.0, 0.1), (0.5, 0.01), (3.0, 0.7)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_epsilon_of_one_sampled_round_is_exact(z: float, q: float, delta: float) -> None:
    """P = N(0, z^2), Q = (1 - q) P + q N(1, z^2).  Q > e^eps P above x with (2x - 1) / (2 z^2) = t, and P > e^eps Q
    below such an x, e^t = (e^(+-eps) - 1 + q) / q; delta is the larger of the two gaps."""
    below = NormalDist(0, z).cdf

    def delta_of(eps: float) -> float:
        gaps = [0.0]
        for sign in (1, -1):
            ratio = (math.exp(sign * eps) - 1 + q) / q
            x = z**2 * math.log(ratio) + 0.5 if ratio > 0 else -math.inf
            in_P, in_Q = (below(x), (1 - q) * below(x) + q * below(x - 1)) if x > -math.inf else (0.0, 0.0)
            gaps.append((1 - in_Q) - math.exp(eps) * (1 - in_P) if sign == 1 else in_P - math.exp(eps) * in_Q)
        return max(gaps)

    got = epsilon(z, q, 1, delta)
    assert delta_of(got) <= delta * (1 + 1e-6)
    assert got == 0 or delta_of(0.999 * got) > delta


def test_pld_is_below_rdp_and_rdp_matches_the_sum_over_coalitions() -> None:
    """For whole alpha the sampled Gaussian's divergence is a sum (arXiv 1908.10530, section 3.3):
    log(sum_k C(alpha, k) (1 - q)^(alpha - k) q^k exp(k (k - 1) / (2 z^2))) / (alpha - 1)."""
    z, q, rounds, delta = 1.1, 0.01, 1000, 1e-5
    bounds = []
    for alpha in range(2, 32):
        terms = (
            math.comb(alpha, k) * (1 - q) ** (alpha - k) * q**k * math.exp(k * (k - 1) / (2 * z**2))
            for k in range(alpha + 1)
        )
        divergence = rounds * math.log(math.fsum(terms)) / (alpha - 1)
        bounds.append(divergence + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1))
    got, (by_renyi,) = epsilon(z, q, rounds, delta), renyi_epsilons(z, q, rounds, (delta,))
    assert 0.99 * min(bounds) < by_renyi <= min(bounds) + 1e-9  # between integer alphas there is a slightly better one
    assert 0.8 * by_renyi < got < by_renyi
    assert got < epsilon(z, 0.02, rounds, delta) < epsilon(z, 1.0, rounds, delta)


def test_accountant_is_the_tighter_one() -> None:
    """dp-accounting 0.6's PLDAccountant on its own grid of 1e-4 gives 4.78435; RDP 5.65505."""
    config = private({"clients": 50, "sampled": 5, "rounds": 100}, noise=1.0, delta=1e-3)
    figures = account(config, 1.0, lambda: ((0.1, 100),))
    assert figures is not None
    assert figures["epsilon"] == pytest.approx(4.78435, rel=1e-4)
    assert figures["epsilon_rdp"] == pytest.approx(5.65505, rel=1e-5)
    assert (figures["accountant"], figures["delta"], figures["noise"], figures["epsilon_asked"]) == (
        "PLD",
        1e-3,
        1.0,
        None,
    )
    assert account(load_config(TINY), None, tuple) is None


@pytest.mark.parametrize(
    ("z", "q", "rounds"),
    [(1.0, 1e-6, 100), (0.02, 0.1, 10), (0.1, 1e-4, 10), (1.0, 0.01, 1_000_000), (1e4, 0.1, 100), (1e6, 0.5, 3)],
)
def test_extreme_settings_stay_below_rdp(z: float, q: float, rounds: int) -> None:
    """On the default grid the second takes minutes and gigabytes.  A client that never takes part costs nothing: if
    rounds * q <= delta, epsilon is 0."""
    got, (by_renyi,) = epsilon(z, q, rounds, 1e-3), renyi_epsilons(z, q, rounds, (1e-3,))
    assert got >= 0
    assert got == 0 or rounds * q > 1e-3
    # Only RDP's bound is available where it is 0, and where nothing is protected.
    assert got < by_renyi if 0 < by_renyi < 1e6 else got == by_renyi


@pytest.mark.parametrize(
    ("target", "q", "rounds"),
    [(1.0, 1.0, 3), (8.0, 0.05, 50), pytest.param(0.5, 0.01, 100, marks=pytest.mark.slow)],
)
def test_found_noise_is_nearly_the_smallest_that_keeps_the_budget(target: float, q: float, rounds: int) -> None:
    found = noise_for(target, 1e-5, q, rounds)
    assert found == float(f"{found:.5g}")
    assert epsilon(found, q, rounds, 1e-5) <= target < epsilon(0.999 * found, q, rounds, 1e-5)


def test_budgets_beyond_the_accountant_s_range() -> None:
    with pytest.raises(UserError, match=r"privacy\.epsilon: got 1e-07; .* 1000 rounds .*raise it"):
        noise_for(1e-7, 1e-9, 1.0, 1000)
    assert noise_for(1e15, 1e-5, 1.0, 1) == NOISES[0]


def test_accountant_neither_warns_nor_sets_up_logging(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At q = 0.1, z = 1 it omits the orders below 1.6, which it would report with a handler of its own."""
    monkeypatch.setattr(logging.root, "handlers", [])
    assert 0 < epsilon(1.0, 0.1, 10, 1e-5) < 10
    assert capfd.readouterr() == ("", "")
    assert logging.root.handlers == []


# --- cohorts


def private(federation: Mapping[str, object] | None = None, *overrides: str, **privacy: float) -> Config:
    tree = {"federation": {"client_weighting": "uniform", **(federation or {})}, "privacy": {"clip": 1.0, **privacy}}
    return load_config(
        TINY, [f"{section}.{k}={v}" for section, keys in tree.items() for k, v in keys.items()] + [*overrides]
    )


def test_clients_take_part_independently_at_the_configured_rate() -> None:
    """400 rounds of 50 clients at 10 / 50: 4,000 expected, standard deviation sqrt(20,000 * 0.2 * 0.8) = 57.  A size
    has variance 50 * 0.2 * 0.8 = 8, the mean of 400 squared deviations an error of about 8 sqrt(2 / 400) = 0.57."""
    config = private({"clients": 50, "sampled": 10}, noise=1.0)
    drawn = [cohort(config, n) for n in range(400)]
    sizes = np.array([len(clients) for clients in drawn])
    assert abs(sizes.sum() - 4000) < 4 * 57
    assert abs(((sizes - 10) ** 2).mean() - 8) < 4 * 0.57
    held = np.bincount([client for clients in drawn for client in clients], minlength=50)  # 80 each, deviation 8
    assert abs(held - 80).max() < 5 * 8
    assert all(clients == sorted(set(clients)) for clients in drawn)


def test_cohorts_follow_the_seed_and_not_the_workers() -> None:
    config = private({"clients": 50, "sampled": 10}, noise=1.0)
    drawn = [cohort(config, n) for n in range(5)]
    assert drawn == [
        cohort(private({"clients": 50, "sampled": 10}, "resources.workers=4", noise=1.0), n) for n in range(5)
    ]
    assert drawn != [cohort(private({"clients": 50, "sampled": 10}, "seed=1", noise=1.0), n) for n in range(5)]
    assert cohort(private({"clients": 5}, noise=1.0), 0) == [0, 1, 2, 3, 4]  # all: q = 1


# --- the engine


@pytest.fixture(scope="module")
def job() -> Job:
    """FedFTG with a budget of 8 over 3 rounds of 2 of 4 clients."""
    federation = {"clients": 4, "sampled": 2, "local_steps": 2}
    return prepare(private(federation, "task.max_rows=120", clip=0.1, epsilon=8.0, delta=1e-3))


def test_budget_stays_in_the_configuration_and_becomes_noise_in_the_job(job: Job) -> None:
    config, noise = job.config, job.noise
    assert (config.privacy.epsilon, config.privacy.noise) == (8.0, None)
    assert noise == noise_for(8.0, 1e-3, 0.5, 3)
    one, three, four = (spent(config, noise, partial(draws, config, job.dataset, rounds)) for rounds in (1, 3, 4))
    assert one < three <= 8.0 < four
    assert spent(load_config(TINY), None, tuple) is None


def test_resolved_configuration_has_the_same_meaning_when_loaded_again(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml_text(job.config.model_dump(mode="json")), encoding="utf-8")
    again = prepare(load_config(file))
    assert again.config == job.config
    assert again.noise == job.noise


@pytest.mark.slow
def test_plan_shows_the_budget_to_be_spent(job: Job) -> None:
    figures = plan_of(job).privacy
    assert figures is not None
    assert figures == account(job.config, job.noise, partial(draws, job.config, job.dataset, 3))
    assert figures["epsilon"] <= figures["epsilon_asked"] == 8.0


def test_workers_send_updates_at_their_clip_factor(job: Job) -> None:
    """A pack of three clients with the server's own tensors as broadcast."""
    method, shape, config = job.method, job.architecture.shape, job.config
    torch.set_num_threads(1)
    backbone = load_weights(config.model, job.architecture, config.seed)
    server = method.init_server(target_weights(shape, job.architecture.transposed, backbone), shape, config.seed)
    worker = Worker(Spec(config, method, job.architecture, job.processor), packed(backbone), job.dataset)
    broadcast = Broadcast(server.round, server.tensors)
    outcome = worker.train(pack_work(config, job.dataset, 0, [0, 1, 3]), [None] * 3, broadcast)
    for sent in outcome.updates:
        alone = change(method, server, replace(sent, weight=1.0), shape)
        norm = math.sqrt(sum(float(d.double().square().sum()) for d in alone.values()))
        assert norm > config.privacy.clip  # so that there is something to clip
        assert sent.weight == pytest.approx(config.privacy.clip / norm)
