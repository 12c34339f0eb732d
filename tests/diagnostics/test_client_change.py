"""A client's change of a layer in a round, as factors, against dense effective weights before and after."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rayfed_sub.core.types import Layer, LocalResult, Start, Tensors
from rayfed_sub.diagnostics.client_change import ROWS, WIDEST, ClientChange, client_change, rows
from tests.helpers.tiny_models import distance, llama
from tests.methods.test_protocol import begun, clients_data, local_change, made, walk

TALL, WIDE = Layer("up", m=20, n=12), Layer("down", m=12, n=20)


def dense(measured: ClientChange) -> Tensor:
    """D = left @ right + before @ shift, (m, n) float64."""
    got = {name: tensor.double() for name, tensor in measured.tensors.items()}
    change = got["left"] @ got["right"]
    return change + got["before"] @ got["shift"] if "shift" in got else change


def term(measured: ClientChange) -> Tensor:
    """E = (left + before) @ right, (m, n) float64."""
    got = {name: tensor.double() for name, tensor in measured.tensors.items()}
    return (got["left"] + got.get("before", torch.zeros(()))) @ got["right"]


def ended(start: Start, tensors: Tensors, **fields: object) -> LocalResult:
    """The end of a round of client 0, with the given tensors in place of the initial ones."""
    return LocalResult(
        client=0,
        tensors={**start.tensors, **tensors},
        moments={},
        step=start.step + 1,
        blocks=fields.get("blocks", {}),  # type: ignore[arg-type]
        base_scale=1.0,
        periods=1,
        metrics={},
        failure=fields.get("failure"),  # type: ignore[arg-type]
    )


def lora(layer: Layer, r: int, seed: int, *, core: bool = False) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    left, right = torch.randn(layer.m, r, generator=rng), torch.randn(r, layer.n, generator=rng)
    tensors = {f"{layer.name}/left": left, f"{layer.name}/right": right}
    return tensors | ({f"{layer.name}/core": torch.randn(r, r, generator=rng)} if core else {})


def moved(layer: Layer, start: Start, tensors: Tensors, **fields: object) -> ClientChange:
    measured = client_change(layer, start, ended(start, tensors, **fields))
    assert measured is not None
    return measured


METHODS = {
    "fedftg": ("galore", {"refresh_every": 2}),  # two periods in three steps: the round's blocks are wider than r
    "fedit": ("lora", {}),
    "ffa-lora": ("lora", {}),
    "rolora": ("lora", {}),
    "flora": ("lora", {"client_ranks": [1, 2]}),
    "hetlora": ("lora", {"client_ranks": [1, 2]}),
    "fed-sb": ("core", {}),
    "fedavg": ("dense", {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_trained_round_matches_the_dense_change(name: str) -> None:
    """Real local training on layers with m > n, m < n and m = n, from a server whose factors are no longer zero.  The
    dense changes for the comparison are differences of float32 products, with errors of about 1e-5."""
    kind, fields = METHODS[name]
    method, tiny = made(name, **fields), llama()
    server = begun(method, tiny)
    done = walk(method, tiny, server, clients_data(tiny, 2), weights=[1, 2])
    for target in tiny.shape.targets:
        for k in range(2):
            measured = client_change(target, done.starts[k], done.results[k])
            assert measured is not None
            assert measured.kind == kind
            theirs = local_change(tiny, server, done, k, target.name).double()
            ours = rows(target, measured) if kind == "dense" else dense(measured)
            assert distance(ours, theirs) < 1e-4
            assert measured.norm == pytest.approx(float(theirs.norm()), rel=1e-4)
            assert all(tensor.dtype == torch.float32 for tensor in measured.tensors.values())
            if name == "fedftg":
                assert measured.tensors["right"].shape == (4, target.n)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("layer", [TALL, WIDE])
def test_tiny_step_does_not_cancel(layer: Layer, core: bool) -> None:
    """A step of 1e-5 is lost in the difference of the two float32 products, but not in the factors."""
    start = Start(lora(layer, 3, 0, core=core), (), scale=2.0)
    end = {name: tensor + 1e-5 * torch.randn(tensor.shape) for name, tensor in start.tensors.items()}

    def product(tensors: Tensors, kind: torch.dtype) -> Tensor:
        left, middle, right = (tensors.get(f"{layer.name}/{role}") for role in ("left", "core", "right"))
        assert left is not None
        assert right is not None
        folded = left.to(kind) if middle is None else left.to(kind) @ middle.to(kind)
        return 2.0 * folded @ right.to(kind)

    exact = product(end, torch.float64) - product(start.tensors, torch.float64)
    measured = moved(layer, start, end)
    assert distance(dense(measured), exact) < 3e-7  # float32 stores the factors to 6e-8
    assert distance(product(end, torch.float32) - product(start.tensors, torch.float32), exact) > 1e-3
    assert distance(term(measured), product(end, torch.float64)) < 1e-6
    assert measured.norm == pytest.approx(float(exact.norm()), rel=1e-6)
    assert measured.kind == ("core" if core else "lora")


def test_only_the_needed_factors_are_kept() -> None:
    """B = 0 before: the right factor's own change has no effect; A at rest: it has no change."""
    start = Start(lora(TALL, 3, 0), (), scale=0.5)
    left, right = (start.tensors[f"up/{role}"] for role in ("left", "right"))
    first = replace(start, tensors={"up/left": torch.zeros(20, 3), "up/right": right})
    assert set(moved(TALL, first, {"up/left": left, "up/right": right + 1}).tensors) == {"left", "right"}
    frozen = moved(TALL, start, {"up/left": left + 1})
    assert set(frozen.tensors) == {"left", "right", "before"}
    assert torch.allclose(frozen.tensors["left"], torch.full((20, 3), 0.5))
    assert distance(term(frozen), 0.5 * (left + 1).double() @ right.double()) < 1e-6
    both = moved(TALL, start, {"up/left": left + 1, "up/right": right + 1})
    assert set(both.tensors) == {"left", "right", "before", "shift"}


def test_unchanged_client_has_no_norm() -> None:
    still = moved(TALL, Start(lora(TALL, 3, 0), ()), {})
    assert still.norm == 0.0
    assert not dense(still).any()
    assert distance(term(still), lora(TALL, 3, 0)["up/left"].double() @ lora(TALL, 3, 0)["up/right"].double()) < 1e-6


@pytest.mark.parametrize("m", [40, ROWS, 200])
def test_dense_changes_are_sampled_by_rows(m: int) -> None:
    """Up to 64 rows all of them; beyond, the same 64 for every client, scaled to keep the mean square norm."""
    layer = Layer("up", m=m, n=12)
    start = Start({"up/weight": torch.randn(m, 12)}, ())
    change = torch.arange(1.0, m + 1)[:, None] * torch.ones(12)
    measured = moved(layer, start, {"up/weight": start.tensors["up/weight"] + change})
    assert measured.norm == pytest.approx(float(change.norm()), rel=1e-5)
    sample = rows(layer, measured)
    assert sample.shape == (min(m, ROWS), 12)
    scale = max(1.0, m / ROWS) ** 0.5
    drawn = (sample[:, 0] / scale).round()  # row i consists of i + 1
    assert len(set(drawn.tolist())) == min(m, ROWS)
    assert torch.equal(drawn, drawn.sort().values)
    assert float(sample.norm()) == pytest.approx(measured.norm, rel=0.15 if m > ROWS else 1e-5)
    twice = moved(layer, start, {"up/weight": start.tensors["up/weight"] + 2 * change})
    assert torch.allclose(rows(layer, twice), 2 * sample, rtol=1e-4)


def test_factored_change_gives_the_same_rows() -> None:
    layer = Layer("up", m=200, n=12)
    start, end = Start(lora(layer, 3, 0), ()), lora(layer, 3, 1)
    measured = moved(layer, start, end)
    as_dense = Start({"up/weight": torch.zeros(200, 12)}, ())
    sampled = moved(layer, as_dense, {"up/weight": dense(measured).float()})
    assert torch.allclose(rows(layer, measured), rows(layer, sampled), atol=1e-5)


def test_many_closed_blocks_are_sampled() -> None:
    layer = Layer("up", m=300, n=200)
    start = Start(lora(layer, 2, 0), ())
    left, right = torch.randn(300, WIDEST), torch.randn(WIDEST, 200)
    assert set(moved(layer, start, {}, blocks={"up": (left, right)}).tensors) == {"left", "right"}
    left, right = torch.randn(300, WIDEST + 1), torch.randn(WIDEST + 1, 200)
    measured = moved(layer, start, {}, blocks={"up": (left, right)})
    assert (measured.kind, set(measured.tensors)) == ("galore", {"rows"})
    assert measured.tensors["rows"].shape == (ROWS, 200)
    assert measured.norm == pytest.approx(float((left.double() @ right.double()).norm()), rel=1e-6)


@pytest.mark.parametrize("layer", [TALL, WIDE])
def test_subspace_overlap_compares_the_projected_side_before_and_after(layer: Layer) -> None:
    """Rows (or columns, m < n) e1, e2 against e2, (e3 + e4) / sqrt 2: one of two directions is shared; scaled and mixed
    rows span the same space."""
    k, right = min(layer.m, layer.n), layer.m >= layer.n
    unit = torch.eye(k)
    before, after = unit[:2], torch.stack([unit[1], (unit[2] + unit[3]) / 2**0.5])
    mixed = torch.tensor([[3.0, 1.0], [0.0, -2.0]]) @ before

    def factors(basis: Tensor, other: float) -> dict[str, Tensor]:
        r, free = len(basis), torch.full((max(layer.m, layer.n), len(basis)), other)
        left, side = (free, basis) if right else (basis.T, free.T)
        assert side.shape[0] == r
        return {f"{layer.name}/left": left, f"{layer.name}/right": side}

    start = Start(factors(before, 1.0), ())
    assert moved(layer, start, factors(after, 2.0)).turned == pytest.approx(0.5)
    assert moved(layer, start, factors(mixed, 2.0)).turned == pytest.approx(1.0)
    assert moved(layer, start, factors(before, 2.0)).turned == 1.0
    assert moved(layer, start, factors(unit[2:3].repeat(2, 1), 2.0)).turned == 0.0
    assert moved(layer, Start(factors(0 * before, 1.0), ()), factors(after, 2.0)).turned is None


def test_rank_one_basis_within_a_rank_two_basis_overlaps_fully() -> None:
    unit = torch.eye(12)
    start = Start({"up/left": torch.ones(20, 2), "up/right": unit[:2]}, ())
    one = torch.stack([unit[0], torch.zeros(12)])  # GaLore's missing rows are zero
    assert moved(TALL, start, {"up/right": one}).turned == pytest.approx(1.0)


def test_galore_keeps_its_basis_within_a_period() -> None:
    """Refresh every 2 steps, 3 steps a round: round 0 begins without a basis, round 1 (steps 3 to 5) renews it."""
    method, tiny = made("fedftg", refresh_every=2), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    data = clients_data(tiny, 2)
    first = walk(method, tiny, server, data, weights=[1, 1])
    again = walk(method, tiny, first.server, data, weights=[1, 1], states=first.states)
    calm = made("fedftg", refresh_every=99)
    begin = walk(calm, tiny, server, data, weights=[1, 1])
    after = walk(calm, tiny, begin.server, data, weights=[1, 1], states=begin.states)
    for target in tiny.shape.targets:
        turns = [client_change(target, done.starts[0], done.results[0]) for done in (first, again, after)]
        assert turns[0] is not None
        assert turns[1] is not None
        assert turns[2] is not None
        assert turns[0].turned is None
        assert turns[1].turned is not None
        assert 0 <= turns[1].turned < 0.99
        assert turns[2].turned == 1.0


def test_gradient_figures_are_passed_on() -> None:
    start = Start(lora(TALL, 3, 0), ())
    measured = client_change(TALL, start, ended(start, {}), (0.75, 3.5))
    assert measured is not None
    assert (measured.energy, measured.gradient_rank) == (0.75, 3.5)
    assert (moved(TALL, start, {}).energy, moved(TALL, start, {}).gradient_rank) == (None, None)


def test_failed_clients_and_other_layers_have_none() -> None:
    start = Start(lora(TALL, 3, 0), ())
    assert client_change(TALL, start, ended(start, {}, failure="non-finite loss")) is None
    assert client_change(WIDE, start, ended(start, {})) is None
