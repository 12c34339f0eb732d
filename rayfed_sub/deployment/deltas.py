"""What crosses from the server to a node: the tensors that its client lacks, in their smallest lossless form.

A node keeps the server's tensors as its client last read them (a version, named by its round).  Of every tensor of the
broadcast that has changed since, it gets the new value; or, for the layers of a method that says `layerwise`, what the
rounds since then have added: the cohort's updates, or their sums, whichever is smaller, which the node adds by the
method's own `accumulate` and `aggregate`, in the server's order, to the server's bits.  Before version 0 lie the
pretrained weights and the seed, which every node holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from rayfed_sub.config.schema import Server
from rayfed_sub.core.arrays import settled
from rayfed_sub.core.types import Accumulator, Client, ModelShape, ServerState, Tensors, Update, wire_bytes
from rayfed_sub.methods import averaging
from rayfed_sub.methods.hooked import unhooked
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import advance

_EMPTY = Accumulator(0.0, {})


@dataclass(frozen=True)
class Round:
    """A finished round as a node repeats it.  added: layers that are repeated from their sum `total`, as it was before
    `aggregate`; updates: in the order of the sum, with the tensors of the other layers; factor: see `advance`."""

    number: int
    updates: tuple[Update, ...] = ()
    added: tuple[str, ...] = ()
    total: Accumulator = _EMPTY
    factor: float = 1.0


@dataclass(frozen=True)
class Download:
    """What a client receives before round `round`, having version `since` (-1: none).  tensors: new values by name;
    rounds: to repeat for the layers `repeated`."""

    round: int
    since: int
    tensors: Tensors
    rounds: tuple[Round, ...] = ()
    repeated: tuple[str, ...] = ()


@dataclass(frozen=True)
class History:
    """The server's memory of earlier rounds.  changed: by name the round at whose start the tensor first had its value,
    0 where it follows from pretrained weights and seed; rounds: those that can be repeated, the oldest first."""

    changed: Mapping[str, int] = field(default_factory=dict)
    rounds: tuple[Round, ...] = ()


def begun(initial: ServerState, server: ServerState) -> History:
    """The history of a server that goes on from a checkpoint; initial: what every node makes itself."""
    same = {name for name, tensor in server.tensors.items() if _equal(initial.tensors.get(name), tensor)}
    return History({name: 0 if name in same else server.round for name in server.tensors})


def continued(
    history: History,
    method: Method,
    shape: ModelShape,
    before: ServerState,
    after: ServerState,
    done: Round | None,
) -> History:
    """The history with a round more.  done: of `repeatable`, None where a node cannot repeat it."""
    same = {name for name, tensor in after.tensors.items() if _equal(before.tensors.get(name), tensor)}
    changed = {name: history.changed.get(name, 0) if name in same else after.round for name in after.tensors}
    if done is None:
        return History(changed)
    kept, room = list[Round](), dict(_sizes(method.broadcast(after).tensors))
    for one in (done, *reversed(history.rounds)):  # the newest first
        taken = _sizes(one.total.tensors, *(update.tensors for update in one.updates))
        room = {layer: size - taken[layer] for layer, size in room.items()}
        fits = {layer for layer, size in room.items() if size > 0}  # else the layer's own tensors are no larger
        if not fits:
            break
        kept.append(_of_layers(one, fits, shape))
    return History(changed, tuple(reversed(kept)))


def repeatable(
    method: Method, shape: ModelShape, number: int, updates: Sequence[Update], total: Accumulator, factor: float
) -> Round | None:
    """The round with each layer in the smaller of its forms, what its clients sent or their sum `total`, before that is
    used up; None for methods that are not `layerwise`."""
    if not getattr(method, "layerwise", False):
        return None
    of_updates, of_total = _sizes(*(update.tensors for update in updates)), _sizes(total.tensors)
    waiting = {_owner(name) for name in total.waiting}
    smaller = {layer for layer, size in of_total.items() if size < of_updates[layer]} - waiting
    added = [layer.name for layer in shape.targets if layer.name in smaller]
    one = _of_layers(Round(number, tuple(updates), tuple(added), total, factor), _layers(shape), shape)
    return replace(one, total=_copied(one.total))


def download(
    method: Method, shape: ModelShape, server: ServerState, history: History, client: Client, since: int
) -> Download:
    """What brings the client from version `since` to the server's present one."""
    first = max(since, 0)
    sent = received(method, method.broadcast(server).tensors, shape, client)
    lacking = {name: tensor for name, tensor in sent.items() if history.changed.get(name, server.round) > first}
    missed = [one for one in history.rounds if one.number >= first]
    values, repeated = _sizes(lacking), list[str]()
    if len(missed) == server.round - first:
        parts = [_sizes(one.total.tensors, *(update.tensors for update in one.updates)) for one in missed]
        for layer in (target.name for target in shape.targets if target.name in values):
            whole = all(layer in part or not one.updates for one, part in zip(missed, parts, strict=True))
            if whole and sum(part[layer] for part in parts) < values[layer]:
                repeated.append(layer)
        lacking = _without(lacking, set(repeated))
    rounds = tuple(_of_layers(one, set(repeated), shape) for one in missed) if repeated else ()
    return Download(server.round, since, lacking, rounds, tuple(repeated))


def received(method: Method, tensors: Tensors, shape: ModelShape, client: Client) -> Tensors:
    """What the client reads of the broadcast's tensors."""
    part = getattr(unhooked(method), "received", None)
    if part is None:
        return tensors
    return {**_without(tensors, _layers(shape)), **cast(Any, part)(tensors, shape, client)}


def applied(method: Method, shape: ModelShape, rule: Server, version: ServerState, got: Download) -> ServerState:
    """The client's version of the server at the start of round got.round."""
    again = _repeated(method, shape, rule, version, got) if got.repeated else {}
    return ServerState(got.round, settled({**version.tensors, **again, **got.tensors}))


def _repeated(
    method: Method, shape: ModelShape, rule: Server, version: ServerState, got: Download
) -> dict[str, torch.Tensor]:
    """The tensors of the layers got.repeated after the rounds."""
    layers = set(got.repeated)
    tensors = _without(version.tensors, _layers(shape) - layers)
    for one in got.rounds:
        after = dict(tensors)
        for names in (layers & set(one.added), layers - set(one.added)):
            if not names:
                continue
            part = ModelShape(tuple(layer for layer in shape.targets if layer.name in names))
            own = _without(tensors, layers - names)
            before = ServerState(one.number, own | (averaging.no_history(part) if averaging.RANKS in own else {}))
            total = _copied(one.total)
            if not names <= set(one.added):
                total = method.accumulator(before, part)
                for update in one.updates:
                    total = method.accumulate(total, update, part)
            moved, _ = advance(rule, before, method.aggregate(before, total, part), {}, one.factor)
            after |= {name: tensor for name, tensor in moved.tensors.items() if _owner(name) in names}
        tensors = settled(after)
    return {name: tensor for name, tensor in tensors.items() if _owner(name) in layers}


def _copied(total: Accumulator) -> Accumulator:
    """The sum in memory of its own, for `aggregate` uses it up."""
    return replace(total, tensors={name: tensor.clone() for name, tensor in total.tensors.items()})


def _of_layers(one: Round, names: set[str], shape: ModelShape) -> Round:
    """The round with the tensors of these layers alone, and those that belong to no layer; no head, which travels as it
    is."""

    def kept(tensors: Tensors, layers: set[str]) -> dict[str, torch.Tensor]:
        return _without(tensors, _layers(shape) - layers) if layers else {}

    added = {layer for layer in one.added if layer in names}
    targets = {layer.name for layer in shape.targets}
    updates = tuple(replace(update, tensors=kept(update.tensors, names & targets - added)) for update in one.updates)
    total = replace(one.total, tensors=kept(one.total.tensors, added), waiting={})
    return replace(one, updates=updates, added=tuple(sorted(added)), total=total)


def _sizes(*parts: Tensors) -> Counter[str]:
    """Bytes of each layer's tensors in all parts; 0 for layers that are in none."""
    sizes = Counter[str]()
    for tensors in parts:
        for name, tensor in tensors.items():
            sizes[_owner(name)] += tensor.numel() * tensor.element_size()
    return sizes


def _layers(shape: ModelShape) -> set[str]:
    """The names of all layers, the head's too."""
    return {layer.name for layer in (*shape.targets, *shape.head)}


def _without(tensors: Tensors, layers: set[str]) -> dict[str, torch.Tensor]:
    """The tensors of no layer of these."""
    return {name: tensor for name, tensor in tensors.items() if _owner(name) not in layers}


def _owner(name: str) -> str:
    """The layer whose tensor this is, if it is one's.

    >>> _owner("layers.0.up/left/m1"), _owner("base_scale")
    ('layers.0.up', 'base_scale')
    """
    return name.partition("/")[0]


def _equal(old: torch.Tensor | None, new: torch.Tensor) -> bool:
    """Whether the bits are the same."""
    if old is None or old is new:
        return old is new
    return old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)


def wire(got: Download) -> int:
    """Bytes of the tensors as sent."""
    return sum(wire_bytes(tensors) for tensors in _all(got))


def _all(got: Download) -> Iterable[Tensors]:
    yield got.tensors
    for one in got.rounds:
        yield one.total.tensors
        yield from (update.tensors for update in one.updates)
