"""Packs of a round: one canonical order of the cohort, of which packs are contiguous runs.

The order follows from configuration and rows alone.  Where a client's result has the same bits in any pack, the cuts
are free: they follow the workers that are there, and a pack that is lost comes back in halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from rayfed_sub.config.schema import Config
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.data.rows import Rows
from rayfed_sub.models.architecture import Architecture
from rayfed_sub.planning.sampling import local_steps


def any_pack(config: Config, architecture: Architecture) -> bool:
    """True where a client's result has the same bits in any pack: on a processor, with one thread of torch, on models
    of the types for which the tests show it."""
    resources = config.resources
    return not resources.gpus_per_worker and resources.threads == 1 and architecture.any_pack


def ordered(config: Config, dataset: Dataset, cohort: Sequence[int]) -> list[int]:
    """The cohort in the order in which updates are added: clients of like work side by side, by their local steps, the
    length of their rows (in powers of two) and their number."""
    return sorted(cohort, key=lambda client: (local_steps(config, client), _length(dataset, client), client))


def _length(dataset: Dataset, client: int) -> int:
    if not isinstance(dataset.train, Rows):
        return 0
    return int(dataset.train.lengths[dataset.rows_of(client)].mean()).bit_length()


def cuts(clients: Sequence[int], most: int, workers: int, *, free: bool) -> list[list[int]]:
    """The clients as packs of at most `most`; free: as even as they go in as many turns of all workers, the larger ones
    first.

    >>> cuts(range(10), 4, 2, free=False), cuts(range(10), 4, 2, free=True)
    ([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]])
    """
    if not free:
        return [list(clients[i : i + most]) for i in range(0, len(clients), most)]
    packs = min(len(clients), ceil(len(clients) / (most * workers)) * workers)
    found, first = list[list[int]](), 0
    for left in range(packs, 0, -1):
        size = ceil((len(clients) - first) / left)
        found.append(list(clients[first : first + size]))
        first += size
    return found
