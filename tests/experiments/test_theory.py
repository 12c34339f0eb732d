"""The theory's experiments: the objective is the trained one, the optimum is unique, exponents and tables match the raw
rows."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime

from experiments.theory import (
    excess_risk,
    exponents,
    federation,
    memory,
    projection,
    rank_inflation,
    sheets,
    uneven_clients,
)
from experiments.theory import problem as convex
from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.rng import stream
from rayfed_sub.methods import build

THEORY = Path(__file__).parents[2] / "experiments" / "theory"
SCRIPTS = (excess_risk, rank_inflation, projection, memory, uneven_clients)
SGD = Optimizer(name="sgd", lr=0.1)


def small(rows: int = 60, columns: int = 5, classes: int = 3) -> convex.Problem:
    rng = stream(0, "small problem")
    x, y = rng.standard_normal((rows, columns)), rng.integers(classes, size=rows)
    w = rng.uniform(0.5, 1.5, rows)
    return convex.Problem(x, y, w / w.sum(), 0.05, classes)


def drawn(problem: convex.Problem) -> convex.Floats:
    return stream(0, "W").standard_normal((problem.classes, problem.x_Rn.shape[1]))


def equal(problem: convex.Problem) -> convex.Problem:
    return convex.Problem(problem.x_Rn, problem.y_R, np.full(60, 1 / 60), problem.mu, problem.classes)


def after_round(
    problem: convex.Problem, name: str, parts: list[np.ndarray], steps: list[int], *, nova: bool = False, **own: object
) -> tuple[convex.Floats, federation.Round]:
    """W after one round from `drawn`, and the round."""
    model, method = convex.Classifier(problem), build({"name": name, **own})
    model.layer.weight.copy_(torch.from_numpy(drawn(problem)))
    shape = model.shape
    going = federation.rounds(model, shape, problem, method, parts, steps, SGD, seed=0, normalise_steps=nova)
    done = next(going)
    return method.model(done.server, shape)["layer"].apply(model.layer.weight).double().numpy(), done


# --- the objective


def test_gradient_matches_the_loss() -> None:
    problem, W = small(), drawn(small())
    slope = approx_fprime(W.ravel(), lambda v: problem.loss(v.reshape(W.shape)), 1e-7)
    assert np.allclose(problem.gradient(W).ravel(), slope, atol=1e-5)


@pytest.mark.parametrize(("name", "own"), [("fedavg", {}), ("fedftg", {"rank": 3})])
def test_engine_step_follows_the_same_gradient(name: str, own: dict[str, int]) -> None:
    """W1 = W0 - lr grad F(W0), L2 included; GaLore of full rank is plain SGD, with the L2 term in its basis too."""
    problem = equal(small())
    after, _ = after_round(problem, name, [np.arange(60)], [1], **own)
    step = (drawn(problem) - after) / SGD.lr
    assert np.linalg.norm(step - problem.gradient(drawn(problem))) < 1e-5 * np.linalg.norm(step)


def test_engine_reports_the_loss_itself() -> None:
    problem = equal(small())
    _, done = after_round(problem, "fedavg", [np.arange(60)], [1])
    assert done.results[0].metrics["loss"] - convex.LIFT == pytest.approx(problem.loss(drawn(problem)), rel=1e-5)


def test_clients_train_on_their_own_rows_alone() -> None:
    """One step each from W0: the mean of the changes, by rows 20 and 40, is the step of all rows together."""
    problem = equal(small())
    after, done = after_round(problem, "fedavg", [np.arange(20), np.arange(20, 60)], [1, 1])
    own = [problem.of_rows(rows).gradient(drawn(problem)) for rows in (np.arange(20), np.arange(20, 60))]
    for D, slope in zip(federation.changes(done), own, strict=True):
        assert np.allclose(D, -SGD.lr * slope, atol=1e-6)
    assert np.allclose(after, drawn(problem) - SGD.lr * problem.gradient(drawn(problem)), atol=1e-6)


@pytest.mark.parametrize("name", ["fedit", "ffa-lora", "flexlora"])
def test_lora_client_s_change_is_that_of_its_product(name: str) -> None:
    """One client: the server's W - W0 = s B A, B from zero, so the change is the product itself."""
    problem = equal(small())
    after, done = after_round(problem, name, [np.arange(60)], [3], rank=2, alpha=4.0)
    assert np.allclose(federation.changes(done)[0], after - drawn(problem), atol=1e-5)
    assert np.linalg.norm(federation.changes(done)[0]) > 1e-3


# --- the optimum


def test_optimum_is_unique() -> None:
    """A gradient of zero, and from it the loss rises by at least mu / 2 |W - W*|^2, since F is mu-strongly convex."""
    for problem in (small(), convex.digits()):
        best = problem.optimum
        assert np.linalg.norm(problem.gradient(best)) < 1e-8
        for k in range(3):
            away = 0.1 * stream(k, "away").standard_normal(best.shape)
            assert problem.excess(best + away) >= problem.mu / 2 * (away**2).sum() > 0


def test_row_weights_move_the_optimum_and_equal_weights_do_not() -> None:
    problem, parts = small(), [np.arange(20), np.arange(20, 60)]
    assert np.allclose(problem.weighed(parts, [3, 3]).optimum, problem.optimum, atol=1e-7)
    tilted = problem.weighed(parts, [1, 9])
    assert tilted.w_R[20:].sum() == pytest.approx(
        9 * problem.w_R[20:].sum() / (problem.w_R @ np.repeat([1, 9], [20, 40]))
    )
    assert problem.excess(tilted.optimum) > 1e-4


def test_best_of_rank_one_matches_an_exhaustive_search() -> None:
    """Two columns: W of rank 1 is b a^T with a on the half circle; for each a the best b is a convex problem."""
    problem = small(columns=2)
    angles = np.linspace(0, np.pi, 721)
    tried = min(problem.best_within(np.array([[np.cos(t), np.sin(t)]])) for t in angles)
    assert tried > 1e-4
    assert problem.best_of_rank(1) == pytest.approx(tried, abs=1e-5)
    assert problem.best_of_rank(2) == pytest.approx(0, abs=1e-7)
    assert problem.best_within(np.eye(2)) == pytest.approx(0, abs=1e-7)


# --- federated rounds


def test_fednova_matters_only_for_unequal_steps() -> None:
    problem, parts = equal(small()), [np.arange(20), np.arange(20, 60)]
    for steps, same in (([3, 3], True), ([1, 5], False)):
        plain, nova = (after_round(problem, "fedavg", parts, steps, nova=nova)[0] for nova in (False, True))
        assert np.allclose(plain, nova, atol=1e-6) == same


def test_fednova_weighs_changes_by_rows_over_steps() -> None:
    """tau_eff sum p_k D_k / tau_k with p = (1, 2) / 3, tau = (1, 5): tau_eff = 1/3 + 10/3 = 11/3."""
    problem, parts = equal(small()), [np.arange(20), np.arange(20, 60)]
    after, done = after_round(problem, "fedavg", parts, [1, 5], nova=True)
    first, second = federation.changes(done)
    assert np.allclose(after - drawn(problem), 11 / 3 * (first / 3 + 2 / 3 * second / 5), atol=1e-6)


def test_too_large_learning_rate_is_a_failure_and_not_a_number() -> None:
    problem = equal(small())
    model = convex.Classifier(problem)
    rest = (problem, build({"name": "fedavg"}), [np.arange(60)], [200], Optimizer(name="sgd", lr=1e6))
    with pytest.raises(ArithmeticError, match="non-finite"):
        next(federation.rounds(model, model.shape, *rest, seed=0))


# --- exponents


def test_planted_exponent_is_found() -> None:
    rng = stream(0, "planted")
    points = [
        (seed, x, 5 * x**-1.5 * np.exp(0.1 * rng.standard_normal())) for seed in range(5) for x in (1, 2, 4, 8, 16)
    ]
    found = exponents.exponent(points)
    assert found.low <= -1.5 <= found.high
    assert found.slope == pytest.approx(-1.5, abs=0.1)
    assert found.explained > 0.98


def test_interval_is_over_seeds() -> None:
    """Slopes 1 and 3: mean 2, deviation sqrt 2, so 12.706 sqrt 2 / sqrt 2 either way (Student's t, one degree)."""
    found = exponents.exponent([(seed, x, float(x) ** (2 * seed + 1)) for seed in (0, 1) for x in (1, 2, 4)])
    assert (found.slope, found.low, found.high) == pytest.approx((2, 2 - 12.706, 2 + 12.706), abs=1e-3)
    assert found.explained == pytest.approx(1 - (1 + 1) / (1 + 9))  # slopes 1 and 3 of the same x, a line of slope 2


def test_doctests() -> None:
    for module in (exponents, sheets):
        assert doctest.testmod(module).failed == 0


# --- the documents


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_tables_of_the_readme_match_the_raw_rows(script: object) -> None:
    readme = (THEORY / "README.md").read_text(encoding="utf-8")
    for name, table in script.tables().items():  # type: ignore[attr-defined]
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- end -->" in readme


def test_pictures_and_scripts_are_named_in_the_readme() -> None:
    readme = (THEORY / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert f"python -m {script.__name__}" in readme
        name = script.__name__.rpartition(".")[2]
        assert f"(../results/theory/{name}.svg)" in readme
        assert (sheets.RESULTS / f"{name}.svg").exists()


def test_plan_bytes_match_the_formulas_and_the_papers_sizes() -> None:
    """Numbers of all target layers at rank 16: LoRA's A and B, FFA's B, GaLore's basis and moments."""
    sizes = {
        "gemma-2b": (5_308_416, 4_718_592, 10_027_008),
        "tinyllama": (2_703_360, 1_982_464, 4_685_824),
        "siglip": (2_356_992, 1_859_328, 4_216_320),
    }
    rows = sheets.read("memory")
    assert [row for row in rows if row["off"]] == []
    at = {(row["model"], row["method"]): row for row in rows if (row["rank"], row["clients"]) == (16, 1)}
    for model, (lora, ffa, galore) in sizes.items():
        assert at[model, "fedit"]["up"] == 4 * lora
        assert at[model, "ffa-lora"]["up"] == 4 * ffa
        assert at[model, "fedftg"]["kept"] == 4 * galore
    grown = {
        row["clients"]: row["down"]
        for row in rows
        if (row["method"], row["model"]) == ("fedftg", "tinyllama") and row["rank"] == 16
    }
    assert grown[4] == 4 * grown[1]
    assert grown[64] == 64 * grown[1]
    assert grown[128] == 4 * 22 * 5632 * 2048  # the matrices themselves are smaller
