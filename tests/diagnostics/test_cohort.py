"""Every diagnostic against its definition, computed on dense (m, n) matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayfed_sub.core.schemas import ClientLayer, CohortLayer
from rayfed_sub.core.types import Layer, Start
from rayfed_sub.diagnostics.client_change import ClientChange, client_change, rows
from rayfed_sub.diagnostics.cohort import diagnose
from tests.diagnostics.test_client_change import ended, lora
from tests.helpers.tiny_models import llama
from tests.methods.test_protocol import begun, clients_data, local_change, made, walk

EPS = 2.0**-23
Figures = dict[str, object]


@dataclass(frozen=True)
class Known:
    """A client with a fully known round: raw weight, dense change D and term E (m, n) float64, the term's factors and
    the change as the library represents it."""

    weight: float
    D: Tensor
    E: Tensor
    left: Tensor
    right: Tensor
    change: ClientChange


def known(layer: Layer, kind: str, r: int, weight: float, seed: int, step: float = 0.1) -> Known:
    """A random client.  kind: `galore`; `lora`, with both factors moved by `step`; `first`: LoRA from B = 0; `ffa`:
    only the left factor moved; `core`; `still`: LoRA without a change; `nothing`: zeros throughout."""
    rng = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    left, right = drawn(layer.m, r), drawn(r, layer.n)
    if kind == "nothing":
        left, right = 0 * left, 0 * right
    tensors = {"left": left, "right": right}
    if kind in ("lora", "core", "ffa", "still"):
        tensors |= {"before": left, "left": 0.0 * left if kind == "still" else step * drawn(layer.m, r)}
    if kind in ("lora", "core"):
        tensors["shift"] = step * drawn(r, layer.n)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    D = exact["left"] @ exact["right"]
    if "shift" in exact:
        D = D + exact["before"] @ exact["shift"]
    whole = exact["left"] + exact.get("before", torch.zeros(()))
    label = "lora" if kind in ("first", "ffa", "still") else "galore" if kind == "nothing" else kind
    change = ClientChange(label, tensors, float(D.norm()))  # type: ignore[arg-type]
    return Known(weight, D, whole @ exact["right"], whole, exact["right"], change)


def diagnosed(layer: Layer, clients: Sequence[Known]) -> tuple[list[ClientLayer], CohortLayer]:
    """Clients are numbered 10, 11, ... in round 3."""
    return diagnose(3, layer, [(10 + k, client.weight, client.change) for k, client in enumerate(clients)])


def brute(layer: Layer, clients: Sequence[Known]) -> tuple[list[Figures], Figures]:
    """The definitions, literally."""
    total = sum(client.weight for client in clients)
    p = [client.weight / total for client in clients]
    D = sum(w * client.D for w, client in zip(p, clients, strict=True))
    P = sum(w * client.E for w, client in zip(p, clients, strict=True))
    assert isinstance(D, Tensor)
    assert isinstance(P, Tensor)
    gaps = [float((client.D - D).norm()) for client in clients]
    own = [
        {
            **ranks(client.D),
            "cosine": cosine(client.D, D),
            "distance": gap / float(D.norm()) if D.any() else None,
            "spectrum": values(client.D, 16),
        }
        for client, gap in zip(clients, gaps, strict=True)
    ]
    moved = [client for client in clients if client.D.any()]
    pairs = list(combinations(moved, 2))
    r = max(client.right.shape[0] for client in clients)
    tail = torch.linalg.svdvals(P)[r:]
    B = sum(w * wide(client.left, r) for w, client in zip(p, clients, strict=True))
    A = sum(w * wide(client.right.T, r).T for w, client in zip(p, clients, strict=True))
    lora = all(client.change.kind == "lora" for client in clients)
    cohort = {
        **ranks(D),
        "clients": len(clients),
        "rank_sum": sum(int(str(ranks(client.D)["rank"])) for client in clients),
        "truncated": float(tail.norm() / P.norm()) if P.any() else None,
        "cross_term": float((P - B @ A).norm() / P.norm()) if lora and P.any() else None,
        "overlap": mean([overlap(layer, a, b) for a, b in pairs]),
        "agreement": mean([cosine(a.D, b.D) for a, b in pairs]),
        "drift": math.sqrt(sum(w * g * g for w, g in zip(p, gaps, strict=True))) / float(D.norm()) if D.any() else None,
        "spectrum": values(D, 64),
        "accumulated": None,
        "server_rank": None,
        "full_rank": min(layer.m, layer.n),
    }
    return own, cohort


def ranks(X: Tensor) -> Figures:
    if not X.any():
        return {"norm": 0.0, "rank": 0, "stable_rank": 0.0, "effective_rank": 0.0}
    sigma = torch.linalg.svdvals(X)
    share = sigma[sigma > max(X.shape) * EPS * sigma[0]]
    share = share / share.sum()
    return {
        "norm": float(X.norm()),
        "rank": int(torch.linalg.matrix_rank(X, rtol=max(X.shape) * EPS)),
        "stable_rank": float((X.norm() / sigma[0]) ** 2),
        "effective_rank": math.exp(-sum(x * math.log(x) for x in share.tolist())),
    }


def values(X: Tensor, most: int) -> tuple[float, ...]:
    sigma = torch.linalg.svdvals(X)
    return tuple(sigma[sigma > max(X.shape) * EPS * sigma[0]].tolist()[:most])


def cosine(X: Tensor, Y: Tensor) -> float | None:
    return float((X * Y).sum() / (X.norm() * Y.norm())) if X.any() and Y.any() else None


def overlap(layer: Layer, a: Known, b: Known) -> float:
    V, W = basis(layer, a), basis(layer, b)
    return float((V @ W.T).square().sum()) / min(len(V), len(W))


def basis(layer: Layer, client: Known) -> Tensor:
    """The strongest singular directions on the projected side, as rows."""
    U, sigma, Vh = torch.linalg.svd(client.D, full_matrices=False)
    count = min(int((sigma > max(layer.m, layer.n) * EPS * sigma[0]).sum()), client.right.shape[0])
    return Vh[:count] if layer.m >= layer.n else U[:, :count].T


def wide(left: Tensor, r: int) -> Tensor:
    return torch.nn.functional.pad(left, (0, r - left.shape[1]))


def mean(found: Sequence[float | None]) -> float | None:
    numbers = [x for x in found if x is not None]
    return sum(numbers) / len(numbers) if numbers else None


def compare(ours: object, theirs: Figures, tolerance: float = 1e-6) -> None:
    for name, value in theirs.items():
        got = getattr(ours, name)
        if value is None or isinstance(value, int):
            assert got == value, f"{name}: {got}, not {value}"
        else:
            assert got == pytest.approx(value, rel=tolerance, abs=tolerance), f"{name}: {got}, not {value}"


def check(layer: Layer, clients: Sequence[Known]) -> CohortLayer:
    """Compare every figure of every row, and require that none is missing."""
    own, cohort = diagnosed(layer, clients)
    theirs, together = brute(layer, clients)
    assert [(row.round, row.client, row.layer) for row in own] == [(3, 10 + k, "up") for k in range(len(clients))]
    for row, expected in zip(own, theirs, strict=True):
        compare(row, expected)
    compare(cohort, together)
    named = {"round", "client", "layer", "turned", "gradient_energy", "gradient_rank"}
    assert {field.name for field in fields(ClientLayer)} == set(theirs[0]) | named
    assert {field.name for field in fields(CohortLayer)} == set(together) | {"round", "layer"}
    return cohort


SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (14, 14)}
COHORTS = {
    "galore": [("galore", 3, 1.0), ("galore", 3, 2.0), ("galore", 3, 5.0)],
    "ragged": [("galore", 1, 1.0), ("galore", 4, 2.0), ("galore", 2, 0.5)],
    "several blocks": [("galore", 6, 1.0), ("galore", 3, 2.0)],
    "fedit": [("lora", 2, 1.0), ("lora", 2, 3.0), ("lora", 2, 2.0)],
    "hetlora": [("lora", 1, 1.0), ("lora", 3, 3.0), ("lora", 2, 2.0)],
    "first round": [("first", 2, 1.0), ("first", 3, 3.0)],
    "ffa": [("ffa", 2, 1.0), ("ffa", 2, 3.0), ("ffa", 3, 1.0)],
    "new beside old": [("lora", 2, 1.0), ("first", 2, 1.0), ("ffa", 2, 4.0)],
    "core": [("core", 2, 1.0), ("core", 2, 2.0)],
    "one": [("galore", 3, 7.0)],
    "one lora": [("lora", 2, 7.0)],
    "a client of zeros": [("galore", 3, 1.0), ("nothing", 2, 2.0), ("galore", 2, 3.0)],
    "a client that stood still": [("lora", 2, 1.0), ("still", 2, 2.0), ("lora", 2, 3.0)],
    "all zero": [("nothing", 2, 1.0), ("nothing", 1, 2.0)],
    "all still": [("still", 2, 1.0), ("still", 2, 2.0)],
    "more columns than the matrix": [("galore", 5, 1.0 + k) for k in range(4)],
    "more columns, lora": [("lora", 3, 1.0 + k) for k in range(4)],
    "of two kinds": [("lora", 2, 1.0), ("galore", 2, 2.0)],
    "weightless": [("galore", 3, 0.0), ("galore", 3, 2.0)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cohort", COHORTS)
def test_every_figure_matches_its_definition(cohort: str, shape: str) -> None:
    layer = Layer("up", *SHAPES[shape])
    clients = [known(layer, kind, r, weight, seed) for seed, (kind, r, weight) in enumerate(COHORTS[cohort])]
    check(layer, clients)


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(2, 24), st.integers(2, 24)),
    kind=st.sampled_from(["galore", "lora", "ffa", "core", "mixed"]),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    step=st.sampled_from([1.0, 1e-2, 1e-4]),
    seed=st.integers(0, 999),
)
def test_random_cohorts(size: tuple[int, int], kind: str, ranks: list[int], step: float, seed: int) -> None:
    layer = Layer("up", *size)
    kinds = ["lora", "first", "ffa", "still"] if kind == "mixed" else [kind]
    clients = [
        known(layer, kinds[(seed + k) % len(kinds)], min(r, *size), 1.0 + k % 3, 10 * seed + k, step)
        for k, r in enumerate(ranks)
    ]
    assume(not any(at_the_cut(client.D) for client in clients))
    assume(not at_the_cut(sum(client.weight * client.D for client in clients)))  # type: ignore[arg-type]
    check(layer, clients)


def at_the_cut(X: Tensor) -> bool:
    """True if rounding may decide on which side of the rank threshold a singular value falls."""
    sigma = torch.linalg.svdvals(X)
    return bool((sigma / (max(X.shape) * EPS * sigma[0]) - 1).abs().min() < 0.1) if X.any() else False


@pytest.mark.parametrize("core", [False, True])
def test_tiny_steps_far_from_zero(core: bool) -> None:
    """LoRA far from zero with a change of 1e-6 of itself, through `client_change`: drift and agreement are those of the
    steps, where differences of products in float32 would be only rounding."""

    layer = Layer("up", m=20, n=12)
    begin = lora(layer, 3, 0, core=core)
    start = Start(begin, (), scale=2.0)
    watched, changes = [], []
    for k in range(3):
        rng = torch.Generator().manual_seed(k)
        end = {name: x + 1e-6 * torch.randn(x.shape, generator=rng) for name, x in begin.items()}
        moved = client_change(layer, start, ended(start, end))
        assert moved is not None
        watched.append((k, 1.0, moved))
        middle = torch.eye(3, dtype=torch.float64)
        products = [
            x["up/left"].double() @ x.get("up/core", middle).double() @ x["up/right"].double() for x in (end, begin)
        ]
        changes.append(2.0 * (products[0] - products[1]))
    D = sum(changes) / 3
    assert isinstance(D, Tensor)
    own, cohort = diagnose(0, layer, watched)
    drift = math.sqrt(sum(float((x - D).norm()) ** 2 for x in changes) / 3) / float(D.norm())
    assert cohort.drift == pytest.approx(drift, rel=1e-5)
    assert cohort.norm == pytest.approx(float(D.norm()), rel=1e-5)
    assert cohort.agreement == pytest.approx(mean([cosine(x, y) for x, y in combinations(changes, 2)]), rel=1e-5)
    assert [row.rank for row in own] == [6, 6, 6]
    assert cohort.cross_term == (None if core else pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("m", [40, 64, 200])
def test_dense_changes(m: int) -> None:
    """Up to 64 rows everything is exact; beyond, cosines and distances are those of the sampled rows."""
    layer, weights = Layer("up", m=m, n=9), [1.0, 2.0, 5.0]
    changes = [torch.randn(m, 9, generator=torch.Generator().manual_seed(k)).double() for k in range(3)]
    clients = []
    for weight, D in zip(weights, changes, strict=True):
        sample = rows(layer, ClientChange("galore", {"left": D.float(), "right": torch.eye(9)}, 0.0))
        clients.append((weight, sample, ClientChange("dense", {"rows": sample.float()}, float(D.norm()))))
    own, cohort = diagnose(3, layer, [(k, weight, moved) for k, (weight, _, moved) in enumerate(clients)])
    samples = [sample for _, sample, _ in clients]
    D = sum(w / 8 * x for w, x in zip(weights, samples, strict=True))
    assert isinstance(D, Tensor)
    drift = math.sqrt(sum(w / 8 * float((x - D).norm()) ** 2 for w, x in zip(weights, samples, strict=True)))
    assert cohort.norm == pytest.approx(float(D.norm()), rel=1e-6)
    assert cohort.drift == pytest.approx(drift / float(D.norm()), rel=1e-6)
    assert cohort.agreement == pytest.approx(mean([cosine(x, y) for x, y in combinations(samples, 2)]), abs=1e-7)
    for row, sample, dense in zip(own, samples, changes, strict=True):
        assert row.norm == pytest.approx(float(dense.norm()))  # of all rows
        assert row.cosine == pytest.approx(cosine(sample, D), abs=1e-6)
        assert row.distance == pytest.approx(float((sample - D).norm() / D.norm()), rel=1e-6)
        assert (row.rank, row.stable_rank, row.effective_rank, row.spectrum) == (None, None, None, ())
    left_out = (cohort.rank, cohort.rank_sum, cohort.truncated, cohort.cross_term, cohort.overlap, cohort.spectrum)
    assert left_out == (None, None, None, None, None, ())
    if m <= 64:
        whole = sum(w / 8 * x for w, x in zip(weights, changes, strict=True))
        assert isinstance(whole, Tensor)
        assert cohort.norm == pytest.approx(float(whole.norm()), rel=1e-6)


def test_factors_beside_a_sample_are_sampled() -> None:
    """A client with many closed blocks is given as rows: the others are compared in the same rows."""
    layer = Layer("up", m=200, n=9)
    whole = known(layer, "galore", 3, 1.0, 0)
    sample = ClientChange("galore", {"rows": rows(layer, whole.change).float()}, float(whole.D.norm()))
    own, cohort = diagnose(0, layer, [(0, 1.0, whole.change), (1, 1.0, sample)])
    assert cohort.agreement == pytest.approx(1)
    assert cohort.drift == pytest.approx(0, abs=1e-6)
    assert [row.norm for row in own] == pytest.approx([float(whole.D.norm())] * 2)
    assert (cohort.rank, own[0].rank) == (None, None)


# Theory.


def test_rank_inflation() -> None:
    """Prop. 1: N = 4 changes of rank 3 in 40 x 30 have a mean of rank 12; the mean of 11 has rank 30 = min(m, n) <
    33."""
    layer = Layer("up", m=40, n=30)
    for N, rank in ((4, 12), (11, 30)):
        cohort = check(layer, [known(layer, "galore", 3, 1.0, k) for k in range(N)])
        assert (cohort.rank, cohort.rank_sum) == (rank, 3 * N)


def test_two_unit_directions() -> None:
    """e1 e1^T and e2 e2^T: the mean is diag(1/2, 1/2), rank 2, and rank 1 keeps half its square: sqrt(1/2) is lost.
    |D_k - D| = |D| = sqrt(1/2): drift and distances are 1, the cosine with the mean is (1/2) / sqrt(1/2)."""
    layer = Layer("up", m=2, n=2)
    unit = torch.eye(2)
    pair = [ClientChange("lora", {"left": unit[:, [k]], "right": unit[[k]]}, 1.0) for k in range(2)]
    own, cohort = diagnose(0, layer, [(k, 1.0, moved) for k, moved in enumerate(pair)])
    assert cohort.truncated == pytest.approx(math.sqrt(1 / 2))
    assert (cohort.rank, cohort.rank_sum, cohort.spectrum) == (2, 2, pytest.approx((0.5, 0.5)))
    assert (cohort.overlap, cohort.agreement) == pytest.approx((0, 0))
    assert (cohort.norm, cohort.drift) == pytest.approx((math.sqrt(1 / 2), 1))
    assert [row.cosine for row in own] == pytest.approx([math.sqrt(1 / 2)] * 2)
    assert [row.distance for row in own] == pytest.approx([1, 1])
    # B' = A'^T = (1/2, 1/2)^T: P - B'A' = [[1/4, -1/4], [-1/4, 1/4]], of norm 1/2.
    assert cohort.cross_term == pytest.approx(0.5 / math.sqrt(1 / 2))


@pytest.mark.parametrize("kind", ["galore", "lora", "core", "ffa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_clients_match_one_client(kind: str, shape: str) -> None:
    layer = Layer("up", *SHAPES[shape])
    own, cohort = diagnosed(layer, [known(layer, kind, 3, 1.0 + k, seed=5) for k in range(4)])
    alone, _ = diagnosed(layer, [known(layer, kind, 3, 1.0, seed=5)])
    assert cohort.drift == pytest.approx(0, abs=1e-7)
    assert cohort.agreement == pytest.approx(1)
    assert cohort.overlap == pytest.approx(1)
    assert cohort.rank == alone[0].rank == (6 if kind in ("lora", "core") else 3)
    assert cohort.rank_sum == 4 * alone[0].rank
    assert cohort.truncated == pytest.approx(0, abs=1e-6)
    if kind in ("lora", "ffa"):
        assert cohort.cross_term == pytest.approx(0, abs=1e-7)
    assert all(row.distance == pytest.approx(0, abs=1e-6) and row.cosine == pytest.approx(1) for row in own)


def test_frozen_right_factor_has_no_cross_term_and_one_subspace() -> None:
    """FFA-LoRA: sum p_k B_k A = B'A for any B_k; on the right side all clients are in A's row space."""
    layer = Layer("up", m=20, n=12)
    right = torch.randn(3, 12)
    clients = []
    for k in range(3):
        tensors = {"left": torch.randn(20, 3), "before": torch.randn(20, 3), "right": right}
        clients.append((k, 1.0 + k, ClientChange("lora", tensors, 0.0)))
    _, cohort = diagnose(0, layer, clients)
    assert cohort.cross_term == pytest.approx(0, abs=1e-8)
    assert cohort.truncated == pytest.approx(0, abs=1e-6)
    assert cohort.overlap == pytest.approx(1)
    assert cohort.rank == 3
    assert cohort.agreement is not None
    assert cohort.agreement < 0.9


def test_orthogonal_clients_drift_by_the_root_of_n_minus_1() -> None:
    """Equal norms and weights: |D|^2 = 1 / N, |D_k - D|^2 = 1 - 1 / N, their ratio N - 1."""
    layer, unit = Layer("up", m=8, n=8), torch.eye(8)
    for N in (2, 5):
        pair = [(k, 1.0, ClientChange("galore", {"left": unit[:, [k]], "right": unit[[k]]}, 1.0)) for k in range(N)]
        assert diagnose(0, layer, pair)[1].drift == pytest.approx(math.sqrt(N - 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [1.0, 3.1])
def test_opposite_clients_have_a_mean_of_zero(factor: float) -> None:
    """D = 0, or the residue of float32's rounding: no cosine with it, no share of it; the clients still share a
    subspace."""
    layer = Layer("up", m=20, n=12)
    one = known(layer, "galore", 3, 1.0, 0).change
    opposite = {"left": -factor * one.tensors["left"], "right": one.tensors["right"] / factor}
    other = ClientChange("galore", opposite, one.norm)
    own, cohort = diagnose(0, layer, [(0, 1.0, one), (1, 1.0, other)])
    assert (cohort.norm, cohort.rank, cohort.rank_sum, cohort.spectrum) == (0.0, 0, 6, ())
    assert (cohort.drift, cohort.truncated) == (None, None)
    assert (cohort.agreement, cohort.overlap) == pytest.approx((-1, 1))
    assert [(row.cosine, row.distance, row.rank) for row in own] == [(None, None, 3)] * 2


def test_mean_product_is_product_of_means_plus_cross_term() -> None:
    """sum p_k B_k A_k - B'A' = sum p_k (B_k - B')(A_k - A'), of which cross_term is the share of the first."""
    layer = Layer("up", m=20, n=12)
    clients = [known(layer, "first", 3, weight, k) for k, weight in enumerate((1.0, 2.0, 5.0))]
    p = [1 / 8, 2 / 8, 5 / 8]
    B, A = (sum(w * getattr(c, side) for w, c in zip(p, clients, strict=True)) for side in ("left", "right"))
    P = sum(w * c.E for w, c in zip(p, clients, strict=True))
    cross = sum(w * (c.left - B) @ (c.right - A) for w, c in zip(p, clients, strict=True))
    assert isinstance(P, Tensor)
    assert isinstance(cross, Tensor)
    assert torch.allclose(P - B @ A, cross)
    assert diagnosed(layer, clients)[1].cross_term == pytest.approx(float(cross.norm() / P.norm()))


@pytest.mark.parametrize("name", ["fedftg", "fedit", "flora", "fed-sb", "fedavg"])
def test_rows_of_a_trained_round(name: str) -> None:
    """Through real local training, on layers with m > n, m < n and m = n, against dense changes of the weights."""
    method, tiny = made(name), llama()
    server = begun(method, tiny)
    done = walk(method, tiny, server, clients_data(tiny, 3), weights=[1, 2, 5])
    for target in tiny.shape.targets:
        moved = [client_change(target, done.starts[k], done.results[k]) for k in range(3)]
        own, cohort = diagnose(
            0, target, [(k, w, x) for k, (w, x) in enumerate(zip((1, 2, 5), moved, strict=True)) if x]
        )
        changes = [local_change(tiny, server, done, k, target.name).double() for k in range(3)]
        D = changes[0] / 8 + changes[1] / 4 + changes[2] * 5 / 8
        gaps = [float((x - D).norm()) for x in changes]
        drift = math.sqrt(gaps[0] ** 2 / 8 + gaps[1] ** 2 / 4 + gaps[2] ** 2 * 5 / 8) / float(D.norm())
        assert cohort.norm == pytest.approx(float(D.norm()), rel=1e-3)
        assert cohort.drift == pytest.approx(drift, rel=1e-3)
        assert cohort.agreement == pytest.approx(mean([cosine(a, b) for a, b in combinations(changes, 2)]), abs=1e-3)
        assert [row.cosine for row in own] == pytest.approx([cosine(x, D) for x in changes], abs=1e-3)
        if name == "fedftg":
            assert ([row.rank for row in own], cohort.rank) == ([2, 2, 2], 6)
        if name == "fedavg":
            assert cohort.rank is None
