"""Which kind of node Ray's autoscaler starts first: none that the cloud has just refused.

Ray 2.60 writes down which kinds of node could not be launched, and neither of its autoscalers reads it: with a spot and
an on-demand kind of the same size both ask for spot for ever.  The first autoscaler lets a function of ours order the
kinds, named in the environment of the head (RAY_AUTOSCALER_UTILIZATION_SCORER, see cluster.yaml).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def available_first(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[float, ...] | None:
    """How well a new node of `node_type` suits the waiting `resources`, the greater the better; None: not at all.

    Ray's own measure, after whether the kind is to be had.
    Of equals Ray takes the one whose name comes last in the alphabet.
    """
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

    suits = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    last_try = node_availability_summary.node_availabilities.get(node_type)
    return None if suits is None else (last_try is None or last_try.is_available, *suits)
