"""Local training as the other contestants do it: one client at a time, transformers' model and loss, galore_torch.

Only torch, transformers, numpy and galore_torch: this runs in virtual environments without rayfed_sub.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from galore_torch import GaLoreAdamW
from torch import Tensor
from transformers import AutoModelForCausalLM

from experiments.benchmarks.cases import BETAS, EPS, LR, SCALE, Case
from experiments.benchmarks.marks import case_of

Arrays = list["np.ndarray[Any, Any]"]

_NEVER = 10**9  # steps between refreshes: every round has a new optimiser, which begins with one


class Local:
    """The work's model with its up_proj weights to train, and every client's batches."""

    def __init__(self, case: Case, work: Path) -> None:
        torch.set_num_threads(1)
        self.case = case
        self.model: Any = AutoModelForCausalLM.from_pretrained(work / "model").eval()
        self.model.config.use_cache = False
        self.targets = [(n, p) for n, p in self.model.named_parameters() if n.endswith("up_proj.weight")]
        self.model.requires_grad_(False)
        for _, parameter in self.targets:
            parameter.requires_grad_(True)
        stored = np.load(work / "batches.npz")
        self.ids, self.labels = (torch.from_numpy(stored[name]) for name in ("input_ids", "labels"))

    def weights(self) -> Arrays:
        """Copies of the trained weights, in the model's order."""
        return [p.detach().numpy().copy() for _, p in self.targets]

    def set_weights(self, weights: Sequence[np.ndarray[Any, Any]]) -> None:
        """Sets the trained weights, in the model's order."""
        with torch.no_grad():
            for (_, p), weight in zip(self.targets, weights, strict=True):
                p.copy_(torch.from_numpy(weight))

    def train(self, n: int, client: int) -> None:
        """The client's local steps of round n, from the weights as they are."""
        optimizer = self.optimizer()
        for step in range(self.case.steps):
            self.loss(self.ids[n, client, step], self.labels[n, client, step]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def optimizer(self) -> Any:
        """A new GaLoreAdamW over the trained weights."""
        parameters = [p for _, p in self.targets]
        projector = {"rank": self.case.rank, "update_proj_gap": _NEVER, "scale": SCALE, "proj_type": "std"}
        group = {"params": parameters, **projector}
        return GaLoreAdamW([group], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, no_deprecation_warning=True)

    def loss(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """The mean over the labelled tokens of a batch (B, T), which is cut to its longest row first."""
        longest = int((labels_BT != -100).sum(1).max())
        loss: Tensor = self.model(input_ids=ids_BT[:, :longest], labels=labels_BT[:, :longest]).loss
        return loss

    def named(self, weights: Sequence[np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """The weights by name of the module."""
        return {n.removesuffix(".weight"): w for (n, _), w in zip(self.targets, weights, strict=True)}


@cache
def loaded(work: Path) -> Local:
    """This process's model, loaded once.  Flower's clients come here for it, because their own module is sent along
    with every message, and what it holds is gone with that."""
    return Local(case_of(work), work)
