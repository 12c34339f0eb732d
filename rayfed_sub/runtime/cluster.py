"""The nodes that a run can have: this machine, or those of the cluster that this process is connected to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rayfed_sub.planning.machines import Node

HEAD = "node:__internal_head__"
_BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the cluster's file, on its head


def nodes() -> tuple[Node, ...]:
    """The nodes that are there, and those that the cluster's autoscaler may add."""
    import ray  # `plan` does without

    if not ray.is_initialized():
        import torch

        return (Node(float(os.cpu_count() or 1), float(torch.cuda.device_count())),)
    there: list[Mapping[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    heads, file = [resources for resources in there if HEAD in resources], _BOOTSTRAP.expanduser()
    if heads and file.exists():
        grown = [*heads, *grown_by(yaml.safe_load(file.read_text(encoding="utf-8")))]
        there = max(there, grown, key=_sizes)  # the file of machines of one's own says nothing of their sizes
    return tuple(Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in there)


def grown_by(cluster: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The resources of the worker nodes of a grown cluster, given what `ray up` made of its YAML file; the largest
    first, where it may not have all of them at once.

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
        own = kind.get("max_workers", 0 if name == cluster.get("head_node_type") else most)
        yield from [kind.get("resources", {})] * own


def _sizes(nodes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    return sum(_size(own)[0] for own in nodes), sum(_size(own)[1] for own in nodes)


def _size(resources: Mapping[str, Any]) -> tuple[float, float]:
    return float(resources.get("GPU", 0)), float(resources.get("CPU", 0))
