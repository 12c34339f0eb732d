"""Clusters to join, and the nodes of the current Ray session."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.planning.machines import Node
from rayfed_sub.runtime.local_ray import alone, our_signals, set_up

HEAD = "node:__internal_head__"
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
    """Puts a data set into the object store; its tokens too, where they lie in a file, unless no other machine can join
    the session."""
    return ray.put(dataset if alone() else dataset.in_memory())


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
    set_up()
    try:
        found = _found(str(address))
        with our_signals():
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
