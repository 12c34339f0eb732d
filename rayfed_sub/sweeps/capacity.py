"""Number of concurrent trials: limited by room for workers and by this machine's memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rayfed_sub.core.errors import UserError
from rayfed_sub.planning.job import Job
from rayfed_sub.planning.machines import Machine, Node, most_workers
from rayfed_sub.planning.needs import DRIVER, RAY, Need, need
from rayfed_sub.planning.packs import most_clients
from rayfed_sub.planning.plan import UnplannedError, here, job_parts, walking
from rayfed_sub.planning.traffic import FEW
from rayfed_sub.storage.remote import Place
from rayfed_sub.sweeps.tuner import TRIALS

log = logging.getLogger(__name__)


def at_once(jobs: Sequence[Job], there: Sequence[Node], most: int, free: int | None = None) -> int:
    """Number of concurrent trials, at least 1 and at most `most`, if all were the most demanding of `jobs`.

    The memory of a cluster's other nodes is not known: there only CPUs and GPUs for workers count; on this node the
    trials' processes count too.  free: bytes of its memory, as in `plan.check`.  A model that cannot be planned has one
    trial at a time.
    """
    return max(1, min(most, *(_places(job, there) for job in jobs), *(_memory(job, there, free) for job in jobs)))


def check_disk(jobs: Sequence[Job], count: int, side_by_side: int, place: Place, *, resumed: bool) -> None:
    """UserError where the run folders to come of a sweep of `count` trials do not fit the disk: those that a resumed
    one has not begun, and in an object store, whose trials have a temporary folder each, those side by side."""
    there, one = here(jobs[0], place.path).disk, max(need(job_parts(job), rounds=2, most=FEW).disk for job in jobs)
    if place.mirror is None:
        to_come = count - (len(list(place.path.glob(f"{TRIALS}/*/config.yaml"))) if resumed else 0)
        field, asked, advice = "sweep.trials", count, "make fewer, or choose --out on a larger disk"
    else:
        to_come = asked = side_by_side
        field, advice = "sweep.concurrent", "set fewer, or TMPDIR on a larger disk"
    taken = to_come * one
    if taken > there:
        allowed = f"what fits into {there / 1e9:.1f} GB of disk; {to_come} run folders may take {taken / 1e9:.1f} GB"
        raise UserError(field, asked, allowed, advice)


def _places(job: Job, there: Sequence[Node]) -> int:
    resources = job.config.resources
    return most_workers(there, resources.cpus_per_worker, resources.gpus_per_worker) // resources.trainers


def _memory(job: Job, there: Sequence[Node], free: int | None) -> int:
    try:
        with walking():
            return _trials(job, there, free)
    except UnplannedError as error:
        log.warning("trials run one at a time, for their memory is not known before they train: %s", error)
        return 1


def _trials(job: Job, there: Sequence[Node], free: int | None) -> int:
    """Trials like this one whose processes this machine's memory holds."""
    needed, machine = need(job_parts(job), rounds=2, most=FEW), here(job)
    once = needed.backbone + needed.data + needed.libraries + DRIVER + RAY
    pack = most_clients(job.config, needed.cohort, free=job.any_pack)
    memory = machine.memory if free is None else free
    return int((memory - once) // trial_bytes(needed, machine, pack, workers_here=len(there) == 1))


def trial_bytes(needed: Need, machine: Machine, pack: int, workers_here: bool) -> int:
    """Bytes of another trial on this machine: its process, its coordinator, and where they are here its workers, with
    packs of this size."""
    resources = needed.config.resources
    once = needed.backbone + needed.data + needed.libraries + needed.bare[0]
    processes = needed.fixed(resources.trainers, pack) - once
    if not workers_here:
        return processes
    process = 0 if machine.gpu is not None else needed.worker(pack).process
    return processes + resources.trainers * (needed.bare[2] + process)
