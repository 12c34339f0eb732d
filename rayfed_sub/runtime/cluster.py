"""Ray sessions and their nodes: a cluster to join, the current session, or a local one for this run alone."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.planning.machines import Node
from rayfed_sub.runtime.fork_server import MODULES

HEAD = "node:__internal_head__"
_OWN: list[bool] = []  # of a session that this process has started for itself
_BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the cluster's file, on its head


def nodes() -> tuple[Node, ...]:
    """The current nodes, and those that the cluster's autoscaler may add."""
    import ray  # `plan` does without

    if not ray.is_initialized():
        import torch

        return (Node(float(os.cpu_count() or 1), float(torch.cuda.device_count())),)
    there: list[Mapping[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    heads, file = [resources for resources in there if HEAD in resources], _BOOTSTRAP.expanduser()
    if heads and file.exists():
        grown = [*heads, *grown_by(yaml.safe_load(file.read_text(encoding="utf-8")))]
        there = max(there, grown, key=_sizes)  # a file of on-premise machines does not hold their sizes
    return tuple(Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in there)


def put_rows(dataset: Dataset) -> Any:
    """Puts a data set into the object store; its tokens too, where they lie in a file, unless the session is one that
    `ray_session` has started here, which no other machine can join."""
    return ray.put(dataset if _OWN else dataset.in_memory())


def grown_by(cluster: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Resources of the worker nodes of a fully grown cluster, from the YAML file that `ray up` left on its head; the
    largest nodes where it may not have all at once.

    >>> grown_by({"max_workers": 3, "head_node_type": "head", "available_node_types": {
    ...     "head": {"resources": {"CPU": 2}, "max_workers": 0},
    ...     "small": {"resources": {"CPU": 4}, "max_workers": 2},
    ...     "large": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2}}})
    [{'CPU': 8, 'GPU': 1}, {'CPU': 8, 'GPU': 1}, {'CPU': 4}]
    """
    most = int(cluster.get("max_workers", 2))  # Ray's own default
    return sorted(_workers(cluster, most), key=_size, reverse=True)[:most]


def _workers(cluster: Mapping[str, Any], most: int) -> Iterator[Mapping[str, Any]]:
    for name, kind in cluster.get("available_node_types", {}).items():
        count = kind.get("max_workers", 0 if name == cluster.get("head_node_type") else most)
        yield from [kind.get("resources", {})] * count


def _sizes(nodes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    return sum(_size(node)[0] for node in nodes), sum(_size(node)[1] for node in nodes)


def _size(resources: Mapping[str, Any]) -> tuple[float, float]:
    return float(resources.get("GPU", 0)), float(resources.get("CPU", 0))


def available_first(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[float, ...] | None:
    """Score of a new node of `node_type` for the waiting `resources`, the higher the better; None: it does not fit.

    Availability of the type counts first, then Ray's own score.  Of equals Ray takes the last name in the alphabet.
    """
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

    suits = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    last_try = node_availability_summary.node_availabilities.get(node_type)
    return None if suits is None else (last_try is None or last_try.is_available, *suits)


_TCP_SECONDS = 5.0
_TOGETHER = 0.3  # seconds within which Ray asks for all processes of tasks that begin together

_GCS_SECONDS = 20.0  # most of them for the import of ray


@contextmanager
def joined(address: str | None = None) -> Iterator[None]:
    """Joins the cluster at `address`, or at the environment variable RAY_ADDRESS; does nothing where neither is set, or
    where this process is connected already.

    Raises UserError where no such cluster can be joined.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized() or address in (None, "", "local"):
        yield
        return
    allowed = "auto, or HOST:PORT of a Ray cluster that this machine belongs to"
    if "://" in str(address):
        advice = "run this on a node of the cluster, e.g. by ray job submit"
        raise UserError("--address", address, allowed, advice)
    _set_up()
    try:
        found = _found(str(address))
        with _our_signals():
            ray.init(address=found, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError("--address", address, allowed, str(error).strip().partition("\n")[0]) from None
    try:
        yield
    finally:
        ray.shutdown()


def _found(address: str) -> str:
    """HOST:PORT of a cluster that answers.  Raises OSError or ValueError within seconds where none does.

    `ray.init` waits a quarter of an hour for a missing cluster, and prints messages meanwhile.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die

    if ":" in address and not address.rpartition(":")[0].strip(" []"):  # Ray would print a traceback
        raise ValueError("no host is named before the port")
    found: str = canonicalize_bootstrap_address_or_die(address)
    host, _, port = found.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"{port} is no port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _TCP_SECONDS).close()
    except OSError as error:
        raise OSError(f"nothing answers at {found}: {error.strerror or error}") from None
    # Something listens there.  Ask in another process, which can be ended, whether it is a cluster's head.
    asks = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", asks, found], capture_output=True, timeout=_GCS_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        answer = None
    if answer is not None and b"AuthToken" in answer.stderr:
        token = "the token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        raise OSError(f"the cluster at {found} asks for its token: set RAY_AUTH_MODE=token, {token}")
    if answer is None or answer.returncode:
        raise OSError(f"what answers at {found} is not the head of a Ray cluster")
    return found


@contextmanager
def ray_session_aside(forks: str | None = None, processes: int = 0) -> Iterator[Callable[[], None]]:
    """As `ray_session`, which comes up in a thread, with so many worker processes ahead; yields the function that waits
    for it.  Leaving waits for it too, and takes it down."""
    # Ray's processes end with the thread that has started them: the pool is left last.
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:

        def come_up() -> None:
            own = not ray.is_initialized()
            stack.enter_context(ray_session(forks))
            if own:
                _start(processes)

        coming = pool.submit(come_up)
        try:
            yield coming.result
        finally:
            wait([coming])


def _start(processes: int) -> None:
    """Lets Ray start so many worker processes, which wait for actors, side by side; returns at once."""
    ready = ray.remote(num_cpus=0, max_retries=0)(_ready)
    for _ in range(processes):
        ready.remote()


def _ready() -> None:
    """Imports what actors need, and waits for the others, or one process would do."""
    for name in (*MODULES, "rayfed_sub.runtime.coordinator"):
        importlib.import_module(name)
    time.sleep(_TOGETHER)


@contextmanager
def ray_session(forks: str | None = None) -> Iterator[None]:
    """The current Ray session, or a local one for this run alone (never somebody's cluster by accident).

    forks: the command by which its worker processes start, of `fork_server`; None: as Ray starts them."""
    if ray.is_initialized():
        yield
        return
    _set_up()
    # In a container Ray may count fewer CPUs than `check_resources` did, and workers would wait for the rest for ever.
    cpus, started = os.cpu_count(), {} if forks is None else {"py_executable": forks}
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    with _our_signals(), _few_processes():
        ray.init(address="local", num_cpus=cpus, runtime_env=started, **quiet)
    _OWN.append(True)
    try:
        _tighten_token()
        _announce()
        yield
    finally:
        _OWN.pop()
        ray.shutdown()


def _set_up() -> None:
    """Set environment variables that Ray reads when it starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray frees in batches, up to a second late: meanwhile each new broadcast takes new pages, which stay taken.
    os.environ.setdefault("RAY_free_objects_batch_size", "1")
    # Ray would start processes of its own accord, which are no forks and wait in vain; `_start` does.
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


@contextmanager
def _our_signals() -> Iterator[None]:
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
