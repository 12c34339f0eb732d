"""A run before it starts: what a plan is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rayfed_sub.config.schema import Config
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.architecture import Architecture
from rayfed_sub.planning.traffic import Traffic, traffic

FEW = 64
"""Clients of a cohort that are walked where a sample of them will do."""


@dataclass(frozen=True, eq=False)
class Parts:
    """config: resolved.  cohorts: the clients of every round; steps: how many local steps a client takes in a round;
    noise: under privacy."""

    config: Config
    method: Method
    architecture: Architecture
    dataset: Dataset
    cohorts: Sequence[Sequence[int]]
    steps: Callable[[int], int]
    noise: float | None = None

    @property
    def name(self) -> str:
        """The method's."""
        return str(self.config.method["name"])

    @property
    def trained(self) -> int:
        """Clients that ever train."""
        return len(set().union(*map(set, self.cohorts)))

    def first(self, rounds: int, most: int | None = None) -> Parts:
        """With no more than the first rounds that have clients, `most` in each; with client 0 where none has any."""
        return replace(self, cohorts=[cohort[:most] for cohort in self.cohorts if cohort][:rounds] or [[0]])

    def traffic(self) -> Traffic:
        """The bytes of all its rounds."""
        return traffic(self.method, self.architecture.shape, self.config, self.cohorts, self.steps)
