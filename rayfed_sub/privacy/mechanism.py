"""Central differential privacy for clients: clipped changes, a fixed denominator, Gaussian noise (McMahan, Ramage,
Talwar, Zhang, Learning Differentially Private Recurrent Language Models, arXiv 1710.06963: DP-FedAvg with flat
clipping).

Rule: d = (sum over the cohort of c_k d_k + N(0, (z C)^2)) / (q K), c_k = min(1, C / |d_k|).  The cohort takes each of K
clients by itself with chance q.  d_k is by how much the server's learned tensors would move if client k's update were
the only one, and |.| its norm over all of them together: LoRA's factors where the server holds factors, dense weights
where it holds those, the head with either.  Everything is released in this form, so the noise goes there too.  It fits
methods with `supports_server_optimizer` set: for them the mean of updates at weights c_k moves the server by sum c_k
d_k / sum c_k.

Protected is whether a client takes part at all, with all its rows: neighbouring federations differ by one client more
or less, which moves the sum by C at most.  Covered by (epsilon, delta) are the server's tensors after every round, and
everything computed from them alone.  Not covered are records that only a simulation writes (losses, steps, cohorts,
clients' states, a held-out loss on clients' rows), nor anything against those who know the seed, from which cohorts and
noise come.  The proof is about real numbers, the arithmetic float32's: fit for a simulation, not for a release under
attack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rayfed_sub.core.errors import RunError
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Client, LocalResult, ModelShape, ServerState, Update
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import moved


def clipped(method: Method, server: ServerState, update: Update, shape: ModelShape, clip: float) -> Update:
    """The update at weight c = min(1, clip / |d|); its tensors stay as they are.

    server: with all tensors, those of the past (`history/...`) included.  The weight is NaN where |d| is not finite.
    Raises RunError where the method would release anything else.
    """
    square = sum(
        float(torch.linalg.vector_norm(d, dtype=torch.float64)) ** 2
        for d in change(method, server, update, shape).values()
    )
    norm = square**0.5
    if not math.isfinite(norm):
        return replace(update, weight=math.nan)
    return replace(update, weight=clip / norm if norm > clip else 1.0)


def change(method: Method, server: ServerState, update: Update, shape: ModelShape) -> dict[str, Tensor]:
    """d of the update, by name: the server's learned tensors after a round of this update alone, less what they were.

    Raises RunError where `aggregate` changes more than these and tensors of the past, which never leave the server.
    """
    alone = method.aggregate(server, method.accumulate(method.accumulator(server, shape), update, shape), shape)
    names = moved(server, alone)
    for name, tensor in alone.tensors.items():
        if tensor is not server.tensors.get(name) and name not in names and not name.startswith("history/"):
            cause = f"the server's {name} would be released without noise; choose another method"
            raise RunError("privacy", cause, round=server.round, client=update.client, resume=None)
    return {name: alone.tensors[name] - server.tensors[name] for name in names}


def at_rest(method: Method, server: ServerState, shape: ModelShape, seed: int) -> Update:
    """The update, at weight 1, of a client that trained nothing: d = 0.

    With it every sum begins, so that noise is released for an empty cohort too; the denominator is fixed, so it costs
    nothing.
    """
    broadcast = method.broadcast(server)
    start = method.start_client(broadcast, None, Client(0, seed), shape)
    blocks = {layer.name: (torch.zeros(layer.m, 0), torch.zeros(0, layer.n)) for layer in shape.targets}
    result = LocalResult(0, start.tensors, start.moments, start.step, blocks, 1.0, 1, {}, trained=start.trained)
    return method.upload(broadcast, result, 1.0, shape)


def noise(seed: int, round: int, deviation: float, name: str, shape: Sequence[int]) -> Tensor:
    """The round's noise on one of the server's tensors, float32, of the given shape and standard deviation."""
    drawn = stream(seed, "privacy", round, name).standard_normal(tuple(shape), dtype=np.float32)
    return deviation * torch.from_numpy(drawn)
