"""A Ray of this machine alone, for one run: started, announced and taken down.

Light: the command line starts it before any library is there (`front.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rayfed_sub.core.errors import RunError
from rayfed_sub.runtime.front import front_of_this_process

_OWN: list[bool] = []  # of a session that this process has started for itself, or its front


def alone() -> bool:
    """Whether the current session is one of `ray_session`'s own, which no other machine can join."""
    return bool(_OWN)


@contextmanager
def ray_session_aside(forks: str | None = None) -> Iterator[Callable[[], None]]:
    """As `ray_session`, which comes up in a thread; yields the function that waits for it.  Leaving waits for it too,
    and takes it down."""
    # Ray's processes end with the thread that has started them: the pool is left last.
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        coming = pool.submit(stack.enter_context, ray_session(forks))
        try:
            yield coming.result
        finally:
            wait([coming])


@contextmanager
def ray_session(forks: str | None = None) -> Iterator[None]:
    """The current Ray session, or a local one for this run alone (never somebody's cluster by accident): in a driver
    that of its front.

    forks: the command by which its worker processes start, of `fork_server`; None: as Ray starts them."""
    if ray.is_initialized():
        yield
        return
    set_up()
    front = front_of_this_process()
    # In a container Ray may count fewer CPUs than `check_resources` did, and workers would wait for the rest for ever.
    cpus, started = os.cpu_count(), {} if forks is None else {"py_executable": forks}
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    with our_signals(), _few_processes():
        where = {"address": "local", "num_cpus": cpus} if front is None else {"address": front.address()}
        try:
            ray.init(**where, runtime_env=started, **quiet)
        except Exception as error:  # Ray raises a bare one where its processes are too slow
            raise RunError("start of Ray", str(error).partition("\n")[0] or type(error).__name__) from error
    _OWN.append(True)
    try:
        if front is None:
            _tighten_token()
            _announce()
        yield
    finally:
        _OWN.pop()
        ray.shutdown()
        if front is not None:
            front.over()


def set_up() -> None:
    """Set environment variables that Ray reads when it starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray frees in batches, up to a second late: meanwhile each new broadcast takes new pages, which stay taken.
    os.environ.setdefault("RAY_free_objects_batch_size", "1")
    # Ray would start processes of its own accord, which are no forks and wait in vain.
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


@contextmanager
def our_signals() -> Iterator[None]:
    """Keeps this process's SIGTERM handler.  Ray's in Python would end the process without a checkpoint, and could be
    set by the main thread alone; the one of its core would end it three seconds later, in the middle of one."""
    from ray._private import ray_constants, utils

    theirs, log = utils.set_sigterm_handler, logging.getLogger("ray")
    utils.set_sigterm_handler = lambda handler: None
    disabled = ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    level = log.level
    log.setLevel(logging.ERROR)  # in another thread Ray warns of it
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = disabled
        log.setLevel(level)


@contextmanager
def _few_processes() -> Iterator[None]:
    """Leaves out three of Ray's processes, each a Python of 60 MB and a second of CPU, for which nothing here asks: one
    that sends logs to the driver, one that adds nodes to a cluster, and the dashboard's server, which Ray starts even
    without a dashboard.  `ray.init` has no argument for any of them."""
    from ray._private import node, parameter

    records, server = parameter.RayParams, node.Node.start_api_server
    parameter.RayParams = partial(records, no_monitor=True, include_log_monitor=False)
    node.Node.start_api_server = lambda self, **asked: None
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server = records, server


def _announce() -> None:
    """Writes the file with which Prometheus finds this session's metrics; Ray writes it only with its dashboard."""
    from ray._private.metrics_agent import PrometheusServiceDiscoveryWriter

    node = ray._private.worker._global_node
    PrometheusServiceDiscoveryWriter(node.gcs_address, node.temp_dir, node.get_session_dir_path()).write()


def _tighten_token() -> None:
    """Makes Ray's token, which opens the cluster and which Ray writes readable for everyone, private."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)
