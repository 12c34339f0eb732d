"""The GaLore step and refresh of rayfed_sub against galore_torch's GaLoreAdamW: time, memory and the same update.

    python -m experiments.benchmarks.galore [SHAPE ...] [--out FILE.csv]

SHAPE: a weight's size such as 1536x576.  Without any, all of `SHAPES`: some eight minutes, in which galore_torch
factorises.  --out: rows are appended as they come, so that shapes may be measured one call at a time.

Both are given the same: N inputs x of a layer and the N gradients d of its outputs, for each of G clients.

rayfed_sub   One pack of G.  Every step: the open block forward and backward (the trained factor's gradient, and the
             block's part of the input's), then Adam on the trained factor.  A refresh comes on top of that: the hook's
             basis and projected gradient out of x and d, the old block closed.
galore_torch G optimisers in turn.  Every step: the dense gradient d^T x, projected, Adam, projected back, added to the
             weight.  A refresh adds the singular value decomposition of the dense gradient.

Outside, since both have it: x W^T and d W of the frozen weight; x, d and the output that the block is added to.
Outside too: the dense weight that galore_torch changes, one for all clients in turn.  rayfed_sub's change stays in its
factors and meets the dense weight once a round: `merge`, of one client, which galore_torch has done in every step.

The updates are compared before a row counts, over a refresh and two steps, so that Adam's moments count.  A singular
vector's sign is anyone's choice and no part of an update before the next refresh: rows are compared up to sign.
galore_torch factorises in float32, rayfed_sub takes Grams in float64; Adam's first step is a sign, and so turns over
where an entry of the projected gradient is as small as that rounding.

Times: medians, warmed up, one thread; malloc keeps what is freed as in rayfed_sub's workers, though never a tensor of
more than 32 MiB, such as large dense gradients.  What takes more than `SLOW` seconds is run once, where memory is
measured; galore_torch's then for one client, and multiplied by eight for eight.
Memory: `state`, bytes that the optimiser's own tensors hold from step to step (galore_torch's basis is a view that
keeps all singular vectors of its side alive); `peak`, how far the process's resident memory rose meanwhile above what
it was, inputs and state included, with malloc giving back all that is freed.  Nothing else sees what LAPACK takes for
itself, neither torch's profiler nor its dispatcher.  Pages and the libraries' own buffers blur it by about 0.1 MB.
Each is measured in a process of its own, forked before torch has begun to compute.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from galore_torch import GaLoreAdamW
from torch import Tensor

from experiments.benchmarks.cases import BETAS, EPS, LR, SCALE
from experiments.benchmarks.harness import machine
from rayfed_sub.cli.run_view import print_table, size
from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.lowrank import sides
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Block, Change, Layer, Subspace
from rayfed_sub.telemetry.process_memory import MMAP_THRESHOLD, TRIM_THRESHOLD, give_back, keep_freed
from rayfed_sub.training import optimizers
from rayfed_sub.training.blocks import Closed, add_product, multiplied
from rayfed_sub.training.galore import Refresh, renew

SLOW = 3.0
UPDATE_TOLERANCE = 1e-3  # of the update's own length
BASIS_TOLERANCE = 1e-3  # sine of the angle between two rows
_NEVER = 10**9

Factors = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]
"""A change of a weight, left (m, r) and right (r, n); one of the two is the basis."""


@dataclass(frozen=True)
class Case:
    """A layer (m, n), its rank, G clients with N tokens each."""

    m: int
    n: int
    rank: int
    tokens: int
    clients: int


@dataclass(frozen=True)
class Found:
    """Figures of one contestant: seconds of forming the gradient, of a whole step with it, of a whole step with a
    refresh, and of the merge; bytes of the state, and of the two peaks.  timed: clients that were run, of the case's.

    change: each of those clients' after a refresh and two steps.
    """

    gradient_s: float
    step_s: float
    refresh_s: float
    merge_s: float
    state_bytes: int
    step_peak_bytes: int
    refresh_peak_bytes: int
    timed: int
    change: list[Factors]


@dataclass(frozen=True)
class Risen:
    """Seconds that something took, and bytes by which the process grew at most meanwhile."""

    seconds: float
    bytes: int


_REHEARSAL = Case(172, 64, 8, 64, 1)


def cases(m: int, n: int) -> list[Case]:
    """The cases of a shape: rank 8 over tokens, larger ranks on two shapes; the largest matrix once."""
    tokens = [256] if m * n > 2**25 else [64, 256, 1024]
    pairs = [(8, N) for N in tokens]
    if (m, n) in [(1536, 576), (5632, 2048)]:
        pairs += [(64, 256), (128, 256)]
    return [Case(m, n, rank, N, G) for rank, N in pairs for G in (1, 8)]


SHAPES = ["172x64", "384x128", "768x288", "1536x576", "5632x2048", "16384x2048", "14336x4096"]


def batch(case: Case, number: int) -> tuple[Tensor, Tensor]:
    """x (G, N, n) and d (G, N, m).  Tokens matter less and less, by t^-1/2, so that singular values differ as real
    gradients' do; client g's are the same however many clients there are."""
    xs, ds = [], []
    for g in range(case.clients):
        rng = stream(0, "galore", case.m, case.n, case.tokens, g, number)
        weight_N1 = np.arange(1, case.tokens + 1, dtype=np.float32)[:, None] ** -0.5 / np.float32(case.tokens)
        xs.append(rng.standard_normal((case.tokens, case.n), dtype=np.float32))
        ds.append(rng.standard_normal((case.tokens, case.m), dtype=np.float32) * weight_N1)
    return torch.from_numpy(np.stack(xs)), torch.from_numpy(np.stack(ds))


class Ours:
    """A pack of G clients with one layer, as `training.pack` steps it."""

    def __init__(self, case: Case) -> None:
        self.case, self.layer = case, Layer("up", case.m, case.n)
        self.fixed, self.trained = sides(self.layer)
        G, r = case.clients, case.rank
        self.tensors = {"up/left": torch.zeros(G, case.m, r), "up/right": torch.zeros(G, r, case.n)}
        self.moments = {role: {self.trained: torch.zeros_like(self.tensors[self.trained])} for role in ("m1", "m2")}
        self.scale_G, self.steps = torch.full((G,), SCALE), 0
        self.output_GNm = torch.zeros(G, case.tokens, case.m)
        self.rule = Optimizer(lr=LR, betas=BETAS, eps=EPS)
        self.subspaces = [Subspace(r, _NEVER)] * G
        self.weight_mn: Tensor | None = None  # only for the merge

    def gradient(self, x_GNn: Tensor, d_GNm: Tensor, refresh: Refresh | None = None) -> Tensor:
        """The projected gradient, shaped like the trained factor: `PackLinear`'s products but the frozen one."""
        left_Gmr, right_Grn, scale_G11 = self.tensors["up/left"], self.tensors["up/right"], self.scale_G[:, None, None]
        z_GrN = multiplied(right_Grn, x_GNn.mT).mul_(scale_G11)
        add_product(self.output_GNm, z_GrN.mT, left_Gmr.mT)
        if refresh is not None:
            refresh.capture(self.layer)([(0, x_GNn, d_GNm)])
        dz_GrN = multiplied(left_Gmr.mT, d_GNm.mT).mul_(scale_G11)
        multiplied(dz_GrN.mT, right_Grn)  # the gradient for the layers below
        trains_left = self.trained.endswith("/left")
        gradient = multiplied(z_GrN, d_GNm).mT if trains_left else multiplied(dz_GrN, x_GNn)
        return gradient / scale_G11

    def step(self, x_GNn: Tensor, d_GNm: Tensor) -> None:
        """A step within a period."""
        self._adam(self.gradient(x_GNn, d_GNm))

    def refresh(self, x_GNn: Tensor, d_GNm: Tensor) -> None:
        """The first step of a period."""
        G, name = self.case.clients, self.layer.name
        draws = [(0, g, self.steps) for g in range(G)]
        refresh = Refresh(self.subspaces, {name: [True] * G}, {name: draws}, self.tensors)
        gradients = {self.trained: self.gradient(x_GNn, d_GNm, refresh)}
        if self.steps:
            Closed().close(self.tensors["up/left"], self.tensors["up/right"], self.scale_G, [True] * G)
        renew(self.layer, refresh, self.tensors, gradients, self.moments, [True] * G, [self.steps] * G, self.rule)
        self._adam(gradients[self.trained])

    def _adam(self, gradient: Tensor) -> None:
        moments = {role: [named[self.trained]] for role, named in self.moments.items()}
        taken_G = [self.steps] * self.case.clients
        optimizers.step(self.rule, LR, [self.tensors[self.trained]], [gradient], moments, [taken_G])
        self.steps += 1

    def merge(self) -> None:
        """One client's change added to a dense weight, as the server does it once a round: into a new one."""
        if self.weight_mn is None:
            self.weight_mn = torch.zeros(self.case.m, self.case.n)
        Change(blocks=(Block(self.tensors["up/left"][0], self.tensors["up/right"][0], SCALE),)).apply(self.weight_mn)

    def state_bytes(self) -> int:
        """Both factors and the moments."""
        held = [*self.tensors.values(), *(named[self.trained] for named in self.moments.values())]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def change(self) -> list[Factors]:
        """Every client's, as factors."""
        lefts, rights = SCALE * self.tensors["up/left"], self.tensors["up/right"]
        return [(left.numpy().copy(), right.numpy().copy()) for left, right in zip(lefts, rights, strict=True)]


class Theirs:
    """GaLoreAdamW for each of G clients in turn, each with a weight of its own, so that its change can be read."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.weights = [torch.nn.Parameter(torch.zeros(case.m, case.n)) for _ in range(case.clients)]
        galore = {"rank": case.rank, "update_proj_gap": _NEVER, "scale": SCALE, "proj_type": "std"}
        rest: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "no_deprecation_warning": True}
        self.optimizers = [GaLoreAdamW([{"params": [weight], **galore}], **rest) for weight in self.weights]

    def gradient(self, x_GNn: Tensor, d_GNm: Tensor) -> None:
        """The dense gradients, one after the other."""
        for x_Nn, d_Nm in zip(x_GNn, d_GNm, strict=True):
            d_Nm.T @ x_Nn

    def step(self, x_GNn: Tensor, d_GNm: Tensor) -> None:
        """A step within a period; the very first is a refresh whatever its name."""
        for weight, optimizer, x_Nn, d_Nm in zip(self.weights, self.optimizers, x_GNn, d_GNm, strict=True):
            weight.grad = d_Nm.T @ x_Nn
            optimizer.step()
            weight.grad = None

    def refresh(self, x_GNn: Tensor, d_GNm: Tensor) -> None:
        """The first step of a period."""
        begun = [state["projector"] for state in self._states() if state]
        for projector in begun:
            projector.update_proj_gap = 1
        self.step(x_GNn, d_GNm)
        for projector in begun:
            projector.update_proj_gap = _NEVER

    def merge(self) -> None:
        """Nothing: every step changes the dense weight."""

    def state_bytes(self) -> int:
        """Bases, with what they are views of, and moments."""
        held = [x for s in self._states() for x in (s["projector"].ortho_matrix, s["exp_avg"], s["exp_avg_sq"])]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def change(self) -> list[Factors]:
        """Every client's, as factors: within a period it lies in the basis."""
        found = []
        for weight, state in zip(self.weights, self._states(), strict=True):
            W_mn, basis = weight.detach(), state["projector"].ortho_matrix
            left, right = (W_mn @ basis.T, basis) if self.case.m >= self.case.n else (basis, basis.T @ W_mn)
            assert (W_mn - left @ right).norm() < 1e-5 * W_mn.norm()
            found.append((left.numpy().copy(), right.numpy().copy()))
        return found

    def _states(self) -> list[dict[str, Any]]:
        return [optimizer.state[weight] for weight, optimizer in zip(self.weights, self.optimizers, strict=True)]


def measured(contestant: type[Ours] | type[Theirs], case: Case) -> Found:
    """All of one contestant in one case, in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_measured, (contestant, case))


def _measured(contestant: type[Ours] | type[Theirs], case: Case) -> Found:
    torch.set_num_threads(1)
    _give_all_back()
    _passed(contestant(_REHEARSAL), _REHEARSAL, [batch(_REHEARSAL, 0), batch(_REHEARSAL, 1)])
    batches = [batch(case, 0), batch(case, 1)]
    own = contestant(case)
    refresh, step = _passed(own, case, batches)
    slow = refresh.seconds > SLOW
    if not slow:  # again, with the libraries' own buffers in place
        del own
        own = contestant(case)
        refresh, step = _passed(own, case, batches)
    change = own.change()
    keep_freed()
    return Found(
        gradient_s=_median(lambda: own.gradient(*batches[1])),
        step_s=_median(lambda: own.step(*batches[1])),
        refresh_s=refresh.seconds if slow else _median(lambda: own.refresh(*batches[0])),
        merge_s=_median(own.merge),
        state_bytes=own.state_bytes(),
        step_peak_bytes=step.bytes,
        refresh_peak_bytes=refresh.bytes,
        timed=case.clients,
        change=change,
    )


def _passed(own: Ours | Theirs, case: Case, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Risen, Risen]:
    """A refresh and two steps; the cost of the refresh and of the first step."""
    refresh = _risen(lambda: own.refresh(*batches[0]))
    step = _risen(lambda: own.step(*batches[1]))
    own.step(*batches[0])
    return refresh, step


def _risen(action: Callable[[], object]) -> Risen:
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is set to what is held
    held, began = _status("VmRSS"), time.perf_counter()
    action()
    return Risen(time.perf_counter() - began, _status("VmHWM") - held)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _give_all_back() -> None:
    """From here on malloc keeps nothing of what is freed, but for small pieces."""
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_THRESHOLD, 2**16)
    library.mallopt(TRIM_THRESHOLD, 0)


def _median(action: Callable[[], object]) -> float:
    """Of three to fifteen runs, as 0.4 seconds allow, after a first one; a slow first one alone."""
    began = time.perf_counter()
    action()
    first = time.perf_counter() - began
    if first > SLOW:
        return first
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < 15 and sum(taken) < 0.4):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def in_turn(one: Found, clients: int) -> Found:
    """The figures of one client for so many in turn: transient memory stays that of one."""
    return replace(
        one,
        gradient_s=clients * one.gradient_s,
        step_s=clients * one.step_s,
        refresh_s=clients * one.refresh_s,
        state_bytes=clients * one.state_bytes,
    )


def apart(case: Case, ours: Factors, theirs: Factors) -> tuple[float, float, int]:
    """One client's two changes: their difference by the length of theirs, the largest sine between two rows of the
    bases, and how many rows have the other sign."""
    (L, R), (M, S) = ([torch.from_numpy(x).double() for x in pair] for pair in (ours, theirs))
    left, right = torch.cat([L, -M], dim=1), torch.cat([R, S])

    def length(left: Tensor, right: Tensor) -> float:  # of left @ right, which is large
        return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))

    rows, others = (R, S) if case.m >= case.n else (L.T, M.T)
    cosine_r = (rows * others).sum(1)
    sine = (rows - cosine_r.sign()[:, None] * others).norm(dim=1).max()
    return length(left, right) / length(M, S), float(sine), int((cosine_r < 0).sum())


def rows_of(m: int, n: int) -> Iterator[dict[str, Any]]:
    """A shape's rows, as they are found.  Raises SystemExit where the updates do not agree."""
    alone: dict[Case, Found] = {}
    for case in cases(m, n):
        one = replace(case, clients=1)
        ours = measured(Ours, case)
        slow = one in alone and alone[one].refresh_s > SLOW
        theirs = in_turn(alone[one], case.clients) if slow else measured(Theirs, case)
        alone[case] = theirs
        pairs = [apart(case, *pair) for pair in zip(ours.change, theirs.change, strict=False)]
        update, sine = max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
        turned = sum(pair[2] for pair in pairs)
        if not (update <= UPDATE_TOLERANCE and sine <= BASIS_TOLERANCE):
            raise SystemExit(f"{case}: updates are {update:.1e} apart, bases {sine:.1e}")
        yield {
            **asdict(case),
            **{f"{who}_{name}": x for who, f in (("ours", ours), ("theirs", theirs)) for name, x in _figures(f)},
            "update_apart": update,
            "basis_apart": sine,
            "signs_turned": turned,
            "compared": len(pairs),
        }


def _figures(found: Found) -> list[tuple[str, float]]:
    return [(name, getattr(found, name)) for name in Found.__dataclass_fields__ if name != "change"]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Times and memory."""
    case = ("shape", "rank", "tokens", "clients")
    print("Times, ms, rayfed_sub / galore_torch; the gradient is a part of the step")
    times = ("gradient", "", "step", "", "refresh", "", "merge", "update apart", "basis apart")
    print_table((*case, *times), [_times(row) for row in rows])
    print("Memory, rayfed_sub / galore_torch: state, and what comes on top of it")
    print_table((*case, "state", "", "step", "", "refresh", ""), [_memory(row) for row in rows])


def _named(row: dict[str, Any]) -> tuple[object, ...]:
    return f"{row['m']}x{row['n']}", row["rank"], row["tokens"], row["clients"]


def _times(row: dict[str, Any]) -> tuple[object, ...]:
    cells: list[str] = []
    for name in ("gradient", "step", "refresh"):
        ours, theirs = row[f"ours_{name}_s"], row[f"theirs_{name}_s"]
        cells += [f"{1e3 * ours:.4g} / {1e3 * theirs:.4g}", f"{theirs / ours:.1f}x"]
    away = (f"{row[f'{of}_apart']:.0e}" for of in ("update", "basis"))
    return *_named(row), *cells, f"{1e3 * row['ours_merge_s']:.3g}", *away


def _memory(row: dict[str, Any]) -> tuple[object, ...]:
    cells: list[str] = []
    for name in ("state", "step_peak", "refresh_peak"):
        ours, theirs = row[f"ours_{name}_bytes"], row[f"theirs_{name}_bytes"]
        cells += [f"{size(ours)} / {size(theirs)}", f"{theirs / ours:.1f}x" if ours else "-"]
    return *_named(row), *cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", default=SHAPES)
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in asked.shapes:
        m, n = map(int, shape.split("x"))
        for row in rows_of(m, n):
            rows.append(row)
            print(*_named(row), *_times(row)[4:], flush=True)
            if asked.out is not None:
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                table = pd.DataFrame([{**row, **machine()}])
                table.to_csv(asked.out, mode="a", header=not asked.out.exists(), index=False)
    show(rows)


if __name__ == "__main__":
    main()
