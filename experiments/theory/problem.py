"""A convex problem whose optimum is known: multinomial logistic regression on scikit-learn's digits, with L2.

F(W) = 1/R sum_i CE(W x_i, y_i) + mu/2 ||W||_F^2 over W (10, 64), without bias; pixels divided by 16.  Client k has
F_k, the same over its own rows, and F = sum_k p_k F_k with p_k its share of the rows.  F is mu-strongly convex: one
optimum.

The engine's loss is cross-entropy alone, and weight decay would not do: on LoRA's factors it is another penalty than on
their product, and GaLore's basis would not see it.  So the model itself puts the L2 term into the cross-entropy, for
all methods alike, see `Classifier`.

Legend: R rows, m = 10 classes, n = 64 pixels, r rank, G clients of a pack, B rows of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Layer, ModelShape
from rayfed_sub.data.rows import Ints
from rayfed_sub.training.layers import PackLinear
from rayfed_sub.training.pass_rows import Run

Floats = NDArray[np.float64]

MU = 0.05
LIFT = 1.0
"""Added to every loss inside the model, where the lift must be above zero; no gradient sees it."""


@dataclass(frozen=True, eq=False)
class Problem:
    """x (R, n), y (R,), each row's weight w (R,), all above zero and 1 together, and mu.  All of it in float64."""

    x_Rn: Floats
    y_R: Ints
    w_R: Floats
    mu: float = MU
    classes: int = 10

    def loss(self, W_mn: Floats) -> float:
        z_Rm = self.x_Rn @ W_mn.T
        own_R = z_Rm[np.arange(len(z_Rm)), self.y_R]
        return float(self.w_R @ (logsumexp(z_Rm, axis=1) - own_R) + self.mu / 2 * (W_mn**2).sum())

    def gradient(self, W_mn: Floats) -> Floats:
        p_Rm = softmax(self.x_Rn @ W_mn.T, axis=1)
        p_Rm[np.arange(len(p_Rm)), self.y_R] -= 1
        slope: Floats = (self.w_R[:, None] * p_Rm).T @ self.x_Rn + self.mu * W_mn
        return slope

    @cached_property
    def optimum(self) -> Floats:
        """W* (m, n) by scikit-learn's Newton solver.  Raises ArithmeticError where its gradient is not zero."""
        # scikit-learn minimises C sum w CE + ||W||^2 / 2
        fit = LogisticRegression(C=1 / self.mu, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=1000)
        W_mn: Floats = fit.fit(self.x_Rn, self.y_R, sample_weight=self.w_R).coef_
        if not np.linalg.norm(self.gradient(W_mn)) < 1e-8:
            raise ArithmeticError(f"the solver stopped at a gradient of {np.linalg.norm(self.gradient(W_mn)):.1e}")
        return W_mn

    @cached_property
    def least(self) -> float:
        """F(W*)."""
        return self.loss(self.optimum)

    def excess(self, W_mn: Floats) -> float:
        return self.loss(W_mn) - self.least

    def of_rows(self, rows: Ints) -> Problem:
        """A client's own."""
        w_R = self.w_R[rows] / self.w_R[rows].sum()
        return Problem(self.x_Rn[rows], self.y_R[rows], w_R, self.mu, self.classes)

    def weighed(self, parts: Sequence[Ints], factors: Sequence[float]) -> Problem:
        """The same rows, those of part k `factors[k]` times as heavy."""
        w_R = self.w_R.copy()
        for rows, factor in zip(parts, factors, strict=True):
            w_R[rows] *= factor
        return Problem(self.x_Rn, self.y_R, w_R / w_R.sum(), self.mu, self.classes)

    def best_within(self, right_rn: Floats) -> float:
        """The lowest excess of any W = B A with this A, the limit of a frozen A.  Convex in B."""

        def at(v: Floats) -> tuple[float, Floats]:
            W_mn = v.reshape(self.classes, -1) @ right_rn
            return self.excess(W_mn), (self.gradient(W_mn) @ right_rn.T).ravel()

        return _lowest(at, np.zeros(self.classes * len(right_rn)))

    def best_of_rank(self, rank: int, starts: int = 4) -> float:
        """The lowest excess found of any W of this rank: L-BFGS over both factors from W*'s truncation and from random
        ones.  Not convex, so this is an upper bound of the true one; the README has its spread over the starts.
        """
        return min(self.ends_of_rank(rank, starts))

    def ends_of_rank(self, rank: int, starts: int) -> list[float]:
        """Excess at the end from each start, the truncation of W* first."""
        m, n = self.classes, self.x_Rn.shape[1]
        U, s, Vh = np.linalg.svd(self.optimum, full_matrices=False)
        root = np.sqrt(s[:rank])
        first = np.concatenate([(U[:, :rank] * root).ravel(), (root[:, None] * Vh[:rank]).ravel()])
        draws = [stream(k, "low-rank start", rank).standard_normal(first.size) for k in range(starts - 1)]

        def both(v: Floats) -> tuple[float, Floats]:
            B_mr, A_rn = v[: m * rank].reshape(m, rank), v[m * rank :].reshape(rank, n)
            W_mn = B_mr @ A_rn
            G_mn = self.gradient(W_mn)
            return self.excess(W_mn), np.concatenate([(G_mn @ A_rn.T).ravel(), (B_mr.T @ G_mn).ravel()])

        return [_lowest(both, v) for v in (first, *draws)]


def _lowest(at: Callable[[Floats], tuple[float, Floats]], start: Floats) -> float:
    """The value at which L-BFGS ends; `at` gives value and slope."""
    return float(minimize(at, start, jac=True, method="L-BFGS-B", options={"maxiter": 3000, "ftol": 1e-12}).fun)


def digits(mu: float = MU) -> Problem:
    """All 1,797 rows, of equal weight."""
    found = load_digits()
    x_Rn, y_R = found.data / 16, found.target.astype(np.int64)
    return Problem(x_Rn, y_R, np.full(len(y_R), 1 / len(y_R)), mu)


class Classifier(nn.Module):
    """W as the one linear layer, `layer`, and F's L2 term inside the cross-entropy.

    Beside its rows every client sends the n unit vectors through the layer; what comes out is W, so that gradients, and
    the bases that GaLore takes from them, hold mu W too.  An eleventh logit, logsumexp(z) + log(e^c - 1), raises every
    row's cross-entropy by exactly c = mu/2 ||W||^2 + LIFT and nothing else.
    """

    dtype = torch.float32

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.shape = ModelShape((Layer("layer", problem.classes, problem.x_Rn.shape[1]),))
        (target,) = self.shape.targets
        self.layer = nn.Linear(target.n, target.m, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.requires_grad_(False)
        self.mu, self.unit_nn = problem.mu, torch.eye(target.n)

    def forward(self, pixels: Tensor) -> Logits:
        """pixels (R, n), client by client.  Every row brings the unit matrix with it; a client's first one counts."""
        R = len(pixels)
        y_RNm = self.layer(torch.cat([pixels[:, None], self.unit_nn.expand(R, -1, -1)], dim=1))
        z_Rm, first_R = y_RNm[:, 0], self._first_rows(R)
        rows, client_R = first_R.unique(return_inverse=True)
        c_G = LIFT + self.mu / 2 * y_RNm[rows, 1:].square().sum((1, 2))
        lift_R1 = z_Rm.logsumexp(1, keepdim=True) + c_G.expm1().log()[client_R, None]
        return Logits(torch.cat([z_Rm, lift_R1], dim=1))

    def _first_rows(self, rows: int) -> Tensor:
        """The first row of each row's client."""
        bound = self.layer.bound if isinstance(self.layer, PackLinear) else None
        first_R = torch.zeros(rows, dtype=torch.int64)
        found: list[Run] = [] if bound is None else [run for terms in bound.stacks for run in terms.rows or ()]
        for run in found:
            for begin in range(run.begin, run.begin + (run.last - run.first) * run.count, run.count):
                first_R[begin : begin + run.count] = begin
        return first_R


@dataclass(frozen=True)
class Logits:
    """A model's answer as the engine reads it."""

    logits: Tensor
