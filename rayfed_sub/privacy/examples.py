"""Differential privacy for single training rows: DP-SGD at every client (Abadi et al., arXiv 1607.00133).

Rule: in local step t of client k every row of it is drawn by itself with chance q = min(1, B / n_k), B the batch size
and n_k the client's rows; the optimizer gets g = (sum over the drawn rows of c_i g_i + N(0, (z C)^2)) / (q n_k), with
g_i the gradient of row i's own loss, which for texts is the mean over its own labelled tokens, and c_i = min(1, C /
|g_i|), the norm over all trained tensors together, as they are trained: GaLore's coefficients times the scale.  A step
without rows releases noise all the same.  The optimizer, weight decay, proximal terms, a method's own penalty, hooks
and uploads work on g alone, so whatever a method makes of it is covered.

Protected is a training row, of plain text one chunk and not the whole text: neighbouring federations differ by one row
more or less at one client, which moves a sum by C at most.  No row is at two clients.  Covered by (epsilon, delta) is
all that clients upload, round by round, against the server too, and all that follows from it; steps are counted client
by client, since no row meets another client's mechanism, and nothing is gained from clients that stay away, which
everybody can see.  Numbers of rows are taken to be known: they are in q, in the batches' denominators and in p_k.  Not
covered are rows that are judged, the choice of classes, of a vocabulary or of a partition by data, the failure of a
client, records that only a simulation writes (losses, labels per round), nor anything against those who know the seed,
from which draws and noise come.  The proof is about real numbers, the arithmetic float32's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rayfed_sub.core.devices import sent
from rayfed_sub.core.rng import stream

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Privacy


@dataclass(frozen=True)
class RowPrivacy:
    """clip: C, the norm of a row's gradient at most; noise: the deviation on the clipped sum in multiples of it."""

    clip: float
    noise: float

    def drawn(self, seed: int, client: int, step: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """The noise on a client's sums in one local step of its life, float32, by name; like: tensors of their shapes.

        Every tensor has a stream of its own, so the others decide nothing about it.
        """
        found = {}
        for name, tensor in like.items():
            draw = stream(seed, "example privacy", client, step, name).standard_normal(tuple(tensor.shape), np.float32)
            found[name] = sent(self.noise * self.clip * torch.from_numpy(draw), tensor.device)
        return found


def row_privacy(privacy: Privacy, noise: float | None) -> RowPrivacy | None:
    """The rule of a configuration with this noise; None where it protects no rows."""
    if not privacy.of_examples or privacy.clip is None or noise is None:
        return None
    return RowPrivacy(privacy.clip, noise)
