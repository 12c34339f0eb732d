"""GaLore's projection bases, against torch's SVD of the gradient, which they never form."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rayfed_sub.core.lowrank import signed
from rayfed_sub.core.rng import stream
from rayfed_sub.planning.allocations import Allocations
from rayfed_sub.training import projectors
from rayfed_sub.training.projectors import bases, basis, single

RANK = 4
# N < min(m, n) takes the token Grams, N >= min(m, n) the Gram of the gradient's short side; on the left m < n.
SIZES = [(40, 24, 10), (24, 40, 10), (40, 24, 60), (24, 40, 60), (40, 24, 24), (30, 30, 12)]


def factors(m: int, n: int, N: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, n) and d (N, m) whose gradient G = d^T x has clearly separated singular values: token i weighs 0.6^i."""
    rng = torch.Generator().manual_seed(seed)
    x, d = torch.randn(N, n, generator=rng), torch.randn(N, m, generator=rng)
    return x, d * 0.6 ** torch.arange(N)[:, None]


def rows(kind: str, x: torch.Tensor, d: torch.Tensor, rank: int = RANK, old=None, seed: int = 0) -> torch.Tensor:
    """The basis of the projected side as rows, for either side, as the pack requests it."""
    right = d.shape[1] >= x.shape[1]
    near, far = (x, d) if right else (d, x)
    return basis(kind, near, far, rank, old, stream(seed, "test"), swapped=not right)


def truth(x: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and vectors (rows) of the projected side, by torch's SVD in float64."""
    G = d.double().T @ x.double()
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    return s, (V if len(G) >= G.shape[1] else U.T)


def cosines(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours.double() * theirs.double()).sum(1).abs()


def assert_exact(x: torch.Tensor, d: torch.Tensor, rank: int = RANK) -> None:
    """Row by row the singular vectors, orthonormal, float32."""
    s, vectors = truth(x, d)
    assert (s[:rank] / s[1 : rank + 1]).min() > 1.01  # otherwise the basis is not unique
    ours = rows("exact", x, d, rank)
    assert ours.dtype == torch.float32
    assert cosines(ours, vectors[:rank]).min() > 0.9999
    assert torch.allclose(ours @ ours.T, torch.eye(rank), atol=1e-5)


@pytest.mark.parametrize(("m", "n", "N"), SIZES)
def test_exact_gives_the_singular_vectors(m, n, N):
    assert_exact(*factors(m, n, N))


@pytest.mark.parametrize(("m", "n", "N"), SIZES)
def test_exact_ignores_padding(m, n, N):
    """Rows without an output gradient are no tokens, whatever x contains: same bits as without them."""
    x, d = factors(m, n, N)
    order = torch.randperm(N + 7, generator=torch.Generator().manual_seed(1))
    padded_x, padded_d = torch.cat([x, torch.randn(7, n)]), torch.cat([d, torch.zeros(7, m)])
    padded = rows("exact", padded_x[order], padded_d[order])
    assert torch.allclose(padded, rows("exact", x, d), atol=1e-5)


def test_padding_costs_nothing():
    """8 tokens of 64 carry a gradient: no Gram is larger than 8 x 8, on the right side and on the left."""
    for m, n in ((40, 24), (24, 40)):
        x, d = factors(m, n, 64)
        d[8:] = 0
        assert max(side for shape in shapes("exact", x, d) for side in shape[-2:] if side not in (m, n, 64)) <= 8
        assert not any(shape == (side, side) for shape in shapes("exact", x, d) for side in (m, n, 64))


@pytest.mark.parametrize("kind", ["exact", "randomized"])
@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40)])
@pytest.mark.parametrize("N", [3, 30, 60])
def test_rows_beyond_the_gradient_s_rank_are_zero(kind, m, n, N):
    """Only two different tokens: rank(G) = 2 of 4 requested; the other tokens repeat them (d is dependent)."""
    x, d = factors(m, n, 2)
    repeat = torch.arange(N) % 2
    ours = rows(kind, x[repeat], d[repeat])
    _, vectors = truth(x[repeat], d[repeat])
    assert not ours[2:].any()
    assert cosines(ours[:2], vectors[:2]).min() > 0.9999


@pytest.mark.parametrize(("m", "n", "N"), SIZES)
def test_linearly_dependent_output_gradients(m, n, N):
    """d has rank 5 in exact arithmetic (small integers), so d d^T has no Cholesky factor; G's rank is 5, and 4 rows are
    requested."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(N, n, generator=rng)
    d = torch.randint(-2, 3, (N, 5), generator=rng).float() @ torch.randint(-2, 3, (5, m), generator=rng).float()
    assert torch.linalg.matrix_rank(d.double()) == 5
    assert_exact(x, d)


@pytest.mark.parametrize("kind", ["exact", "svd", "randomized"])
def test_zero_gradient_has_a_basis_of_zeros(kind):
    for m, n, N in SIZES:
        x, d = factors(m, n, N)
        for zeroed in ((x, 0 * d), (0 * x, d)):
            ours = rows(kind, *zeroed)
            assert ours.shape == (RANK, min(m, n))
            assert not ours.any()


@pytest.mark.parametrize("size", [1e-20, 1e15])
@pytest.mark.parametrize("kind", ["exact", "randomized"])
@pytest.mark.parametrize(("m", "n", "N"), SIZES)
def test_gradient_scale_does_not_matter(kind, m, n, N, size):
    x, d = factors(m, n, N)
    assert torch.allclose(rows(kind, x, size * d), rows(kind, x, d), atol=1e-5)
    assert torch.allclose(rows(kind, size * x, d), rows(kind, x, d), atol=1e-5)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.seen += [tensor.shape for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return out


def shapes(kind: str, x: torch.Tensor, d: torch.Tensor) -> list[torch.Size]:
    with Shapes() as mode:
        rows(kind, x, d)
    return mode.seen


@pytest.mark.parametrize("kind", ["exact", "randomized", "random"])
@pytest.mark.parametrize(("m", "n"), [(96, 48), (48, 96), (64, 64)])
def test_gradient_is_never_formed(kind, m, n):
    x, d = factors(m, n, min(m, n) - 16)
    assert max(shape.numel() for shape in shapes(kind, x, d)) < m * n
    dependent = d.clone()
    dependent[1:3] = dependent[:1]
    assert max(shape.numel() for shape in shapes(kind, x, dependent)) < m * n
    assert torch.Size((m, n)) in shapes("svd", x, d)  # the recorder does detect it


def test_new_rows_have_the_signs_of_the_old_ones():
    x, d = factors(40, 24, 10)
    first = rows("exact", x, d)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None]
    for kind in ("exact", "randomized"):
        assert torch.allclose(rows(kind, x, d, old=flips * first), flips * first, atol=1e-4)
    moved = rows("exact", x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), d, old=first)
    assert ((moved * first).sum(1) > 0).all()


def test_signs_without_an_old_row_come_from_a_fixed_reference():
    x, d = factors(40, 24, 10)
    new = rows("exact", x, d)
    reference = torch.from_numpy(stream(0, "sign reference").standard_normal(24)).float()
    assert (new @ reference > 0).all()
    assert torch.equal(rows("exact", x, d), new)
    # An old row of zeros (a gradient of smaller rank), or an orthogonal one, does not determine the sign.
    old = torch.stack([-new[0], torch.zeros(24), new[3], -new[3]])
    old[2] -= new[2] * (new[2] @ old[2])
    assert torch.equal(signed(new, old)[0], -new[0])
    assert torch.equal(signed(new, old)[1], new[1])
    assert torch.equal(signed(new, old)[3], -new[3])


@pytest.mark.parametrize("kind", ["randomized", "random"])
@pytest.mark.parametrize(("m", "n", "N"), SIZES)
def test_random_projectors_are_orthonormal_and_reproducible(kind, m, n, N):
    x, d = factors(m, n, N)
    once = rows(kind, x, d)
    assert torch.allclose(once @ once.T, torch.eye(RANK), atol=1e-5)
    assert torch.equal(once, rows(kind, x, d))
    if kind == "random":
        assert (once - rows(kind, x, d, seed=1)).abs().max() > 0.01
        assert torch.equal(once, rows(kind, x + 1, d))  # independent of the gradient


@pytest.mark.parametrize("warm", [False, True])
def test_randomized_finds_the_top_of_a_decaying_spectrum(warm):
    """Singular values 1, 1/2, 1/4, ...: two power steps omit at most 1 % of the top four directions."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((size, 30)))[0] for size in (60, 40))
    x = torch.from_numpy(V.T).float()
    d = torch.from_numpy((U * 0.5 ** np.arange(30)).T).float()
    old = torch.from_numpy(V.T[:RANK]).float() if warm else None
    ours = rows("randomized", x, d, old=old)
    captured = (torch.from_numpy(V.T[:RANK]).float() @ ours.T).square().sum(1)
    assert captured.min() > 0.99
    if warm:
        assert cosines(ours, torch.from_numpy(V.T[:RANK])).min() > 0.9999


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "N", "least", "times"), [(1536, 576, 256, 4.0, 5), (5632, 2048, 512, 15.0, 2)])
@pytest.mark.usefixtures("one_thread")
def test_exact_is_faster_than_the_svd_of_the_gradient(m, n, N, least, times):
    """The fastest of several runs each, in turns, on one thread: other work on the machine slows both alike."""
    rng = torch.Generator().manual_seed(0)
    x, d = torch.randn(N, n, generator=rng), torch.randn(N, m, generator=rng)
    pairs = [
        (
            seconds(lambda: rows("exact", x, d, 8)),
            seconds(lambda: torch.linalg.svd(d.T @ x, full_matrices=False)),
        )
        for _ in range(times)
    ]
    ours, theirs = (min(column) for column in zip(*pairs, strict=True))
    print(f"{m} x {n}, {N} tokens: {ours:.3f} s against {theirs:.3f} s, {theirs / ours:.1f} times faster")
    assert theirs / ours > least


def test_plan_counts_every_token_of_a_refresh() -> None:
    """The tokens with a gradient are unknown before a run: a plan takes all 64 of each client.  The float64 copies of x
    and d alone are 2 clients x 64 tokens x (24 + 16) numbers x 8 bytes."""
    x_GNn, d_GNm = torch.empty(2, 64, 24, device="meta"), torch.empty(2, 64, 16, device="meta")
    old_Grn = torch.empty(2, 4, 24, device="meta")
    with Allocations([x_GNn, d_GNm, old_Grn]) as seen:
        bases("exact", x_GNn, d_GNm, old_Grn, lambda g: stream(0))
    assert seen.peak >= 2 * 64 * (24 + 16) * 8


def test_clients_share_factorisations_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five clients, three of which use all 6 tokens: in groups of any size, each gets its result alone."""
    rng = torch.Generator().manual_seed(0)
    x_GNn, d_GNm = torch.randn(5, 6, 8, generator=rng), torch.randn(5, 6, 10, generator=rng)
    d_GNm[1, 4:] = 0
    d_GNm[3, 4:] = 0
    old_Grn = torch.zeros(5, 3, 8)

    def found() -> torch.Tensor:
        return bases("exact", x_GNn, d_GNm, old_Grn, lambda g: stream(0))

    together = found()
    monkeypatch.setattr("rayfed_sub.training.projectors._TOGETHER", 6 * (8 + 10))  # one at a time
    torch.testing.assert_close(found(), together, rtol=0, atol=1e-6)
    for g in range(5):
        alone = basis("exact", x_GNn[g], d_GNm[g], 3, None, stream(0))
        torch.testing.assert_close(together[g], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("last", [0.3, 0.03, 0.003])
@pytest.mark.parametrize(("m", "n", "N"), [(96, 64, 40), (64, 96, 40), (96, 64, 128), (64, 96, 128)])
def test_float32_s_eigenproblem_is_close_to_the_exact_one(m, n, N, last):
    """Singular values that fall from 1 to `last` at the eighth, and on from there: float32, as GPUs have it, spans the
    same space to 1e-4, in which R = G Q^T does the same."""
    x, d = spectrum(m, n, N, last)
    rows_1rn, close = single(x[None], d[None], 8)
    assert close.all()
    exact_rn = basis("exact", x, d, 8, None, stream(0))
    signs = (rows_1rn[0] * exact_rn).sum(1).sign()[:, None]
    assert torch.allclose(signs * rows_1rn[0], exact_rn, atol=1e-4)
    G = d.double().T @ x.double()
    ours, theirs = (G @ rows.double().T @ rows.double() for rows in (rows_1rn[0], exact_rn))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_float32_refuses_what_it_cannot_tell_apart():
    """A last singular value of 1e-4 of the first, fewer directions than the rank, and a gradient of zero."""
    for x, d in (spectrum(96, 64, 40, 1e-4), spectrum(96, 64, 5, 0.1), (torch.randn(40, 64), torch.zeros(40, 96))):
        assert not single(x[None], d[None], 8)[1].any()


@pytest.mark.parametrize("kind", ["exact", "svd", "randomized", "random"])
def test_device_that_is_not_asked_has_the_same_bases(kind, monkeypatch):
    """On a processor: no token left out, float32 where it does, float64 for a client where it does not."""
    pairs = [spectrum(96, 64, 40, 0.1, seed=1), spectrum(96, 64, 40, 1e-5, seed=2), factors(96, 64, 40)]
    x, d = (torch.stack(side) for side in zip(*pairs, strict=True))
    d[2, 30:] = 0
    old = torch.zeros(3, RANK, 64)
    soon = bases(kind, x, d, old, lambda g: stream(g, "test"))
    monkeypatch.setattr(projectors, "free_to_read", lambda device: False)
    monkeypatch.setattr(projectors, "eigen_dtype", lambda device: torch.float32)
    late = bases(kind, x, d, old, lambda g: stream(g, "test"))
    assert torch.allclose(soon.abs(), late.abs(), atol=1e-4 if kind != "randomized" else 1e-2)


def spectrum(
    m: int, n: int, N: int, last: float, seed: int = 0, tail: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, n) and d (N, m) whose gradient's singular values fall evenly, on a scale of logarithms, to `last` at the
    eighth, and go on falling, by the factor `tail` from one to the next if it is given."""
    rng = np.random.default_rng(seed)
    k = min(m, n, N)
    values = last ** (np.minimum(np.arange(k), k if tail is None else 7) / 7)
    if tail is not None:
        values = values * tail ** np.maximum(0, np.arange(k) - 7)
    values = torch.from_numpy(values).clamp_min(1e-12)
    mix_NN = torch.linalg.qr(torch.from_numpy(rng.standard_normal((N, N)))).Q[:, :k]
    left_mk = torch.linalg.qr(torch.from_numpy(rng.standard_normal((m, k)))).Q
    right_nk = torch.linalg.qr(torch.from_numpy(rng.standard_normal((n, k)))).Q
    return (mix_NN @ right_nk.T).float(), (mix_NN @ (values[:, None] * left_mk.T)).float()


@pytest.mark.parametrize("ratio", [0.99, 0.9, 0.5])
def test_float32_knows_when_directions_beyond_the_last_are_as_strong(ratio):
    """Eight singular values fall to 0.002, others follow closely: what is taken is right."""
    for seed in range(6):
        x, d = spectrum(96, 64, 40, 0.002, seed, tail=ratio)
        rows_1rn, close = single(x[None], d[None], 8)
        exact_rn = basis("exact", x, d, 8, None, stream(0))
        apart = (rows_1rn[0].abs() - exact_rn.abs()).abs().max()
        assert apart < 1e-4 or not close.any()
