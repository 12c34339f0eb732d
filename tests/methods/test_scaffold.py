"""SCAFFOLD by hand: Algorithm 1 of arXiv 1910.06378 with Option II, written out in the tests' own arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Client, ClientState, Layer, LocalResult, LocalStep, ModelShape, ServerState
from rayfed_sub.methods import build
from rayfed_sub.methods.hooked import hooked
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.scaffold import Scaffold
from rayfed_sub.training import optimizers
from tests.helpers.tiny_models import distance, draw_batches, llama, run_pack
from tests.methods.hook_checks import hooked_as, starts_of

SHAPE = ModelShape((Layer("up", 1, 1),))
SGD = Optimizer(name="sgd")
A, B = (1.0, 3.0), (0.0, 1.0)
"""Client i has the loss A_i / 2 (y - B_i)^2, so the gradient A_i (y - B_i).  The mean loss is least at 3 / 4."""


def quadratic(
    method: Method,
    cohorts: Sequence[Sequence[int]],
    steps: Sequence[int],
    lr: float,
    optimizer: Optimizer = SGD,
) -> tuple[list[float], list[float], ServerState, dict[int, ClientState]]:
    """Rounds of our own method and optimizer from y = 0: after each the server's weight, and how far apart the clients
    ended; then server and states."""
    server = method.init_server({"up/weight": torch.zeros(1, 1)}, SHAPE, seed=0)
    states, path, spread = dict[int, ClientState](), list[float](), list[float]()
    for n, cohort in enumerate(cohorts):
        broadcast, total, ends = method.broadcast(server), method.accumulator(server, SHAPE), list[float]()
        for k in cohort:
            start = method.start_client(broadcast, states.get(k), Client(k, 0), SHAPE)
            y, memory = start.tensors["up/weight"].clone()[None], start.memory
            held = {f"up/weight/{role}": torch.zeros(1, 1) for role in optimizers.moment_roles(optimizer)}
            moments = {name.rpartition("/")[2]: [x.clone()[None]] for name, x in {**held, **start.moments}.items()}
            for t in range(steps[k]):
                gradient = A[k] * (y[0] - B[k])
                if start.correct is not None:
                    at = LocalStep({"up/weight": y[0].clone()}, {"up/weight": gradient}, t, lr)
                    given, memory = start.correct(memory, at)
                    gradient = given["up/weight"]
                optimizers.step(optimizer, lr, [y], [gradient[None]], moments, [[start.step + t]])
            metrics, end = {"steps": float(steps[k])}, start.step + steps[k]
            kept = {f"up/weight/{role}": x[0] for role, (x,) in moments.items()}
            result = LocalResult(
                k, {"up/weight": y[0]}, kept, end, {}, 1.0, 1, metrics, trained=start.trained, memory=memory
            )
            total = method.accumulate(total, method.upload(broadcast, result, 1.0, SHAPE), SHAPE)
            states[k] = ClientState(n + 1, 0, end, method.client_state(broadcast, result, SHAPE))
            ends.append(float(y))
        server = method.aggregate(server, total, SHAPE)
        path.append(float(server.tensors["up/weight"]))
        spread.append(max(ends) - min(ends))
    return path, spread, server, states


def algorithm(cohorts: Sequence[Sequence[int]], steps: Sequence[int], lr: float, of: int) -> tuple[list[float], float]:
    """Algorithm 1 with Option II and a global step of 1, line by line: x after each round, and c."""
    x, c, own, path = 0.0, 0.0, [0.0] * of, list[float]()
    for cohort in cohorts:
        moved, changed = [], []
        for i in cohort:
            y = x
            for _ in range(steps[i]):
                y -= lr * (A[i] * (y - B[i]) - own[i] + c)
            plus = own[i] - c + (x - y) / (steps[i] * lr)
            moved.append(y - x)
            changed.append(plus - own[i])
            own[i] = plus
        x += sum(moved) / len(cohort)
        c += len(cohort) / of * sum(changed) / len(cohort)
        path.append(x)
    return path, c


def scaffold(of: int = 2) -> Method:
    return hooked(build({"name": "fedavg"}), Scaffold(), of)


def test_two_rounds_on_a_quadratic_by_hand() -> None:
    """lr 1/10, two steps.  Round 0 from x = 0, control variates 0: y_1 stays at 0 with gradients 0, 0; y_2 = 3/10, then
    3/10 + (3 * 7/10) / 10 = 51/100 with gradients -3, -21/10.  x = 51/200; c_1 = 0, c_2 = -51/20, c = -51/40.
    Round 1, client 1: shift c - c_1 = -51/40; y = .255 - .1 (.255 - 1.275) = .357, then .357 - .1 (.357 - 1.275) =
    .4488.  Client 2: shift 51/40; y = .255 - .1 (3 (-.745) + 1.275) = .351, then .351 - .1 (3 (-.649) + 1.275) =
    .4182.  x = .4335."""
    path, spread, server, states = quadratic(scaffold(), [[0, 1]] * 2, [2, 2], lr=0.1)
    assert path == pytest.approx([0.255, 0.4335], abs=1e-6)
    assert spread == pytest.approx([0.51, 0.0306], abs=1e-6)
    # c_1 = (.255 + .357) / 2, c_2 = -3 (.745 + .649) / 2, c their mean.
    assert float(states[0].tensors["hook/up/weight/c"]) == pytest.approx(0.306, abs=1e-6)
    assert float(states[1].tensors["hook/up/weight/c"]) == pytest.approx(-2.091, abs=1e-6)
    assert float(server.tensors["hook/up/weight/c"]) == pytest.approx((0.306 - 2.091) / 2, abs=1e-6)


def test_scaffold_reaches_the_minimum_that_averaging_misses() -> None:
    """Two steps of 1/10 take y to B_i + r_i (x - B_i) with r = (9/10)^2 = .81 and (7/10)^2 = .49.  FedAvg rests where x
    is the mean of these: x (.19 + .51) = .51, x = .7286, clients .19 x + .51 (1 - x) = .2769 apart.  SCAFFOLD rests at
    the minimum, 3/4, and no client moves there."""
    rounds = [[0, 1]] * 60
    drifting, apart, *_ = quadratic(build({"name": "fedavg"}), rounds, [2, 2], lr=0.1)
    assert drifting[-1] == pytest.approx(0.51 / 0.70, abs=1e-5)
    assert apart[-1] == pytest.approx(0.19 * 0.51 / 0.70 + 0.51 * 0.19 / 0.70, abs=1e-5)
    corrected, together, *_ = quadratic(scaffold(), rounds, [2, 2], lr=0.1)
    assert corrected[-1] == pytest.approx(0.75, abs=1e-5)
    assert together[-1] < 1e-5


def test_adamw_gets_the_corrected_gradients() -> None:
    """Adam's steps have the length of the rate whatever the gradients, so averaged clients pull against each other and
    stay near where the first round left them; with gradients that agree they go to the minimum, 3/4."""
    rounds, steps = [[0, 1]] * 60, [5, 5]
    drifting, apart, *_ = quadratic(build({"name": "fedavg"}), rounds, steps, 0.03, Optimizer())
    corrected, together, *_ = quadratic(scaffold(), rounds, steps, 0.03, Optimizer())
    assert drifting[-1] < 0.3
    assert corrected[-1] == pytest.approx(0.75, abs=1e-3)
    assert apart[-1] > 0.25  # of 2 * 5 * 0.03 = 0.3 at most
    assert together[-1] < 0.01


@pytest.mark.parametrize("steps", [[2, 2], [1, 4]])
def test_rounds_of_some_of_the_clients_match_the_algorithm(steps: list[int]) -> None:
    """N = 3, of which one client is never sampled; clients with equal and with unequal steps."""
    cohorts = [[0], [0, 1], [1], [1], [0, 1], [0]]
    path, _, server, states = quadratic(scaffold(3), cohorts, steps, lr=0.1)
    expected, c = algorithm(cohorts, steps, 0.1, of=3)
    assert path == pytest.approx(expected, abs=1e-6)
    assert float(server.tensors["hook/up/weight/c"]) == pytest.approx(c, abs=1e-5)
    assert set(states) == {0, 1}


def test_round_without_clients_changes_nothing() -> None:
    method = scaffold()
    server = method.init_server({"up/weight": torch.ones(1, 1)}, SHAPE, seed=0)
    after = method.aggregate(server, method.accumulator(server, SHAPE), SHAPE)
    assert {name: float(tensor) for name, tensor in after.tensors.items()} == {
        "up/weight": 1.0,
        "hook/up/weight/c": 0.0,
    }


@pytest.mark.parametrize("method", ["fedavg", "fedit", "ffa-lora", "fed-sb", "shared-galore"])
def test_mean_of_the_gradients_is_option_ii(method: str) -> None:
    """On a real model with SGD: c_i+ = c_i - c + (x - y_i) / (K eta), in a later round, K = 3 and eta = 1/2."""
    tiny, hook = llama(), Scaffold()
    start = starts_of(hook, method, tiny, 2)[1]
    (result,) = run_pack(tiny, [start], [draw_batches(tiny, 0, 3, rows=6)], SGD, lr=0.5)
    kept = hook.client_state(result.memory, {name: result.tensors[name] for name in start.trained}, 3)
    for name in start.trained:
        shift = start.memory[f"{name}/shift"]
        assert shift.norm() > 0
        literal = (start.tensors[name] - result.tensors[name]) / (3 * 0.5) - shift  # shift = c - c_i
        assert distance(kept[f"{name}/c"], literal) < 1e-4


def test_control_variates_begin_anew_in_another_basis() -> None:
    """Shared GaLore with a basis for two rounds: after round 1 the server's are zero, and those of a client that comes
    back in round 2 do not count; one that comes back in round 1 has its own."""
    tiny = llama()
    method = hooked_as("shared-galore", Scaffold(), refresh_every=2)
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    state = None
    for n in range(3):
        broadcast = method.broadcast(server)
        start = method.start_client(broadcast, state, Client(0, 0), tiny.shape)
        own = [start.memory[f"{name}/c"] for name in start.trained]
        shared = [server.tensors[f"hook/{name}/c"] for name in start.trained]
        assert all(bool(c.any()) == (n == 1) for c in (*own, *shared)), f"round {n}"
        (result,) = run_pack(tiny, [start], [draw_batches(tiny, n, 2)], SGD, lr=0.1)
        update = method.upload(broadcast, result, 1.0, tiny.shape)
        state = ClientState(n + 1, 2, 2, method.client_state(broadcast, result, tiny.shape))
        total = method.accumulate(method.accumulator(server, tiny.shape), update, tiny.shape)
        server = method.aggregate(server, total, tiny.shape)


def test_clipped_gradients_are_clipped_before_the_correction() -> None:
    """A first step with clip_norm 1/100: c_i is the clipped gradient, of norm 1/100 over all tensors."""
    tiny, method = llama(), hooked_as("fedit", Scaffold())
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    start = method.start_client(method.broadcast(server), None, Client(0, 0), tiny.shape)
    optimizer = Optimizer(name="sgd", clip_norm=0.01)
    (result,) = run_pack(tiny, [start], [draw_batches(tiny, 0, 1)], optimizer, lr=0.0)
    square = sum(float(result.memory[f"{name}/sum"].square().sum()) for name in start.trained)
    assert square**0.5 == pytest.approx(0.01, rel=1e-3)
