"""Packs of a round: one canonical order of the cohort, of which packs are contiguous runs.

The order follows from configuration and rows alone.  Where a client's result has the same bits in any pack, the cuts
are free: each is made when a worker has a place for it, and a pack that is lost comes back in halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import ceil

from rayfed_sub.clock.fleet import Fleet
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


def most_clients(config: Config, cohort: int, *, free: bool) -> int:
    """The largest pack that a run may cut; free: whether the cuts are.

    A pack of more than a worker's share of the cohort would leave other workers idle."""
    resources = config.resources
    if resources.pack_size != "auto" or not free:
        return min(resources.first_pack, cohort)
    return max(min(resources.first_pack, cohort), ceil(cohort / resources.trainers))


def ordered(config: Config, dataset: Dataset, cohort: Sequence[int]) -> list[int]:
    """The cohort in the order in which updates are added: clients of like work side by side, the most work first, by
    their local steps, the length of their rows (in powers of two) and their number."""

    return sorted(cohort, key=lambda client: (*place(config, dataset, client), client))


def place(config: Config, dataset: Dataset, client: int) -> tuple[int, int]:
    """A client's place in the order of `ordered`, before its number."""
    return -local_steps(config, client), -int(tokens(dataset, client)).bit_length()


def work(config: Config, dataset: Dataset, client: int) -> float:
    """A client's work in a round, to compare clients with each other: its local steps times the length of its rows."""
    return local_steps(config, client) * tokens(dataset, client)


def tokens(dataset: Dataset, client: int) -> float:
    """The mean number of tokens of the client's rows; 1 for images, which are all of one size."""
    if not isinstance(dataset.train, Rows):
        return 1.0
    return float(dataset.train.lengths[dataset.rows_of(client)].mean())


def round_work(config: Config, dataset: Dataset, client: int) -> tuple[int, float]:
    """A client's work in a round for the virtual clock: its local steps, and the tokens of their rows on average (of
    images, their number)."""
    steps = local_steps(config, client)
    return steps, steps * step_tokens(config, dataset, client)


def semi_synchronous_steps(config: Config, dataset: Dataset, fleet: Fleet | None) -> dict[str, tuple[int, ...]]:
    """federation.local_steps of federation.mode=semi-sync: as many steps as each client takes in local_seconds, one at
    least.  Empty in other modes."""
    federation = config.federation
    if federation.local_seconds is None or fleet is None:
        return {}
    seconds = (
        fleet.compute_seconds(client, 1, step_tokens(config, dataset, client)) for client in range(federation.clients)
    )
    return {"local_steps": tuple(max(1, int(federation.local_seconds / each + 1e-9)) for each in seconds)}


def step_tokens(config: Config, dataset: Dataset, client: int) -> float:
    """Tokens of the rows of a client's local step on average (of images, their number)."""
    return min(config.federation.batch_size, len(dataset.rows_of(client))) * tokens(dataset, client)


def fixed_cuts(clients: Sequence[int], size: int) -> list[Sequence[int]]:
    """The clients as packs of one size, the last one of the rest."""
    return [clients[i : i + size] for i in range(0, len(clients), size)]


def free_cuts(work: Sequence[float], workers: int, most: Callable[[], int], *, finer: bool = False) -> Iterator[range]:
    """The packs of a round as ranges of the cohort's places, where the cuts are free.

    Packs have equal work, as far as none has more than `most()` clients, which is asked anew for each.  finer: a round
    of several turns of all workers ends with packs of half the work, so that no worker waits long for another one.

    >>> [len(pack) for pack in free_cuts([1] * 7, workers=2, most=lambda: 4)]
    [4, 3]
    >>> [len(pack) for pack in free_cuts([1] * 24, workers=2, most=lambda: 8, finer=True)]
    [6, 6, 3, 3, 3, 3]
    """
    sums, begin, by, packs, halves = [0.0, *accumulate(work)], 0, 0, 0, 0
    while begin < len(work):
        left, size = len(work) - begin, most()
        if size != by:
            turns = ceil(left / (size * workers))
            halves = 2 * workers if finer and (begin or turns > 1) else 0
            by, packs = size, turns * workers + halves // 2
        mine = 0.5 if packs <= halves else 1.0
        share = (sums[-1] - sums[begin]) * mine / (packs - min(packs, halves) / 2)
        # The cut next to that share: a client belongs to the pack that has room for half of it.
        ends = range(begin + 1, begin + min(size, left) + 1)
        end = begin + max(1, sum((sums[end] + sums[end - 1]) / 2 - sums[begin] <= share for end in ends))
        yield range(begin, end)
        begin, packs = end, max(packs - 1, ceil((len(work) - end) / size))
