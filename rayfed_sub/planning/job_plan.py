"""A job and this machine, put before `planning/plan.py`.  No Ray."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import psutil
import torch

from rayfed_sub.planning.job import Job
from rayfed_sub.planning.machines import Machine, machine_named
from rayfed_sub.planning.needs import need
from rayfed_sub.planning.parts import FEW, Parts
from rayfed_sub.planning.plan import Plan, plan
from rayfed_sub.planning.refusals import check_fits
from rayfed_sub.planning.sampling import cohort, local_steps

_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
_USED = ("memory.current", "memory/memory.usage_in_bytes")


def plan_of(job: Job, on: str | None = None, folder: Path = Path()) -> Plan:
    """The plan of a job on this machine, or with the GPU `on` (see `machine_named`).

    Raises UserError for a GPU that it does not know; what does not fit is said in the plan, and refused by `check`.
    """
    machine = here(job, folder)
    return plan(job_parts(job), machine if on is None else machine_named(on, machine))


def check(job: Job, folder: Path = Path(), on: str | None = None) -> None:
    """UserError where the job cannot fit this machine; folder: where the run's files will lie, or a parent of it."""
    machine = here(job, folder)
    check_fits(job_parts(job), machine if on is None else machine_named(on, machine))


def memory(job: Job) -> int:
    """Bytes that all processes of the run take on one machine, as in its plan; some seconds for a large model."""
    needed, resources = need(job_parts(job), rounds=2, most=FEW), job.config.resources
    return needed.node(0 if resources.gpus_per_worker else needed.worker(resources.pack_size).process)


def here(job: Job, folder: Path = Path()) -> Machine:
    """This machine, with its GPU where the job uses one."""
    gpu = None
    if job.config.resources.gpus_per_worker and torch.cuda.is_available():
        gpu = torch.cuda.mem_get_info()[1]
    while not folder.exists():
        folder = folder.parent
    name = "this machine" if gpu is None else torch.cuda.get_device_name()
    return Machine(name, _free_memory(), float(os.cpu_count() or 1), shutil.disk_usage(folder).free, gpu)


def job_parts(job: Job) -> Parts:
    """What a plan is made from."""
    config = job.config
    cohorts = [cohort(config, n) for n in range(config.federation.rounds or 0)]
    steps = partial(local_steps, config)
    return Parts(config, job.method, job.architecture, job.dataset, cohorts, steps, job.noise)


def _free_memory() -> int:
    """Bytes that new processes can have: the machine's, or what a container's limit leaves of them."""
    free = psutil.virtual_memory().available
    root = Path("/sys/fs/cgroup")
    for limit, used in zip(_LIMITS, _USED, strict=True):
        if (root / limit).exists() and (text := (root / limit).read_text().strip()).isdigit():
            free = min(free, int(text) - int((root / used).read_text()))
    return free
