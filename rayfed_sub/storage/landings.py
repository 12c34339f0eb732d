"""Results of clients that are under way when a round of an asynchronous run ends, as a checkpoint holds them: their
tensors beside the server's, named `flight/<client>/update/...` and `flight/<client>/state/...`, all else in the
manifest's `clock`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rayfed_sub.clock.virtual_clock import Clock, Flight
from rayfed_sub.core.types import ClientState, Tensors, Update

_FLIGHT = "flight/"


@dataclass(frozen=True)
class Landing:
    """What a client under way will bring: its update and its next state, None where it failed.  relative: tensors that
    are values of the server's hold their change since the client began (`Method.sent_values`)."""

    update: Update
    state: ClientState | None
    relative: bool = False


def landing_tensors(landings: Mapping[int, Landing]) -> dict[str, Tensor]:
    """All tensors by the names of a checkpoint."""
    named: dict[str, Tensor] = {}
    for client, landing in landings.items():
        named |= {f"{_FLIGHT}{client}/update/{name}": x for name, x in landing.update.tensors.items()}
        kept = {} if landing.state is None else landing.state.tensors
        named |= {f"{_FLIGHT}{client}/state/{name}": x for name, x in kept.items()}
    return named


def clock_entry(clock: Clock | None, landings: Mapping[int, Landing]) -> dict[str, Any] | None:
    """The manifest's entry: plain values, from which `landed` makes the same records again."""
    if clock is None:
        return None
    flights = [(dict(vars(flight)), landings.get(flight.client)) for flight in clock.flights]  # asdict copies values
    entries = [{"flight": flight, "result": _result(landing)} for flight, landing in flights]
    return {"now": clock.now, "flights": entries}


def _result(landing: Landing | None) -> dict[str, Any] | None:
    if landing is None:
        return None
    update, state = landing.update, landing.state
    sent = {"weight": update.weight, "metrics": dict(update.metrics), "failure": update.failure}
    kept = None if state is None else [state.round, state.cursor, state.step]
    return {**sent, "state": kept, "relative": landing.relative}


def landed(
    tensors: Tensors, entry: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], Clock | None, dict[int, Landing]]:
    """The other tensors of a checkpoint, its clock and its landings."""
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(_FLIGHT)}
    if entry is None:
        return others, None, {}
    flights = [Flight(**one["flight"]) for one in entry["flights"]]
    results = {f.client: one["result"] for f, one in zip(flights, entry["flights"], strict=True)}
    landings = {client: _landing(client, result, tensors) for client, result in results.items() if result is not None}
    return others, Clock(entry["now"], tuple(flights)), landings


def _landing(client: int, result: Mapping[str, Any], tensors: Tensors) -> Landing:
    sent, kept = (_under(tensors, f"{_FLIGHT}{client}/{part}/") for part in ("update", "state"))
    update = Update(client, result["weight"], sent, result["metrics"], result["failure"])
    if result["state"] is None:
        return Landing(update, None, result["relative"])
    round, cursor, step = result["state"]
    return Landing(update, ClientState(round, cursor, step, kept), result["relative"])


def _under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
