"""Checks of the conformance suite for hooks, as plain functions of a hook, so that a hook in another package can be run
through them.  Each raises AssertionError if the hook fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.arrays import Guard, packed, unpacked
from rayfed_sub.core.types import HOOK, Client, LocalResult, LocalStep, Start, Tensors
from rayfed_sub.methods import METHODS, class_of
from rayfed_sub.methods.hooked import hooked
from rayfed_sub.methods.hooks import LocalHook
from rayfed_sub.methods.protocol import Method
from tests.helpers.tiny_models import Tiny, draw_batches, run_pack
from tests.methods.test_protocol import Round, clients_data, made, walk

CLIENTS, OF = 8, 10
SHARING = [name for name in METHODS if hasattr(class_of(name), "shared_basis")]
SGD = Optimizer(name="sgd")


def bare(name: str, **fields: object) -> Method:
    """The method with a rank at which a client's tensors beside others' begin at other places than alone."""
    return made(name, **({} if name == "fedavg" else {"rank": 5}), **fields)


def hooked_as(name: str, hook: LocalHook, clients: int = OF, **fields: object) -> Method:
    return hooked(bare(name, **fields), hook, clients)


@cache
def rounds_of(hook: LocalHook, name: str, tiny: Tiny) -> tuple[Round, ...]:
    """Two rounds of two clients: all that the hook keeps is in use in the second."""
    method, walked = hooked_as(name, hook), list[Round]()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    for n in range(2):
        states = walked[-1].states if walked else None
        data = clients_data(tiny, 2, seed=100 * n)
        walked.append(walk(method, tiny, server, data, weights=[1, 2], states=states, lr=0.1, optimizer=SGD))
        server = walked[-1].server
    return tuple(walked)


def starts_of(hook: LocalHook, name: str, tiny: Tiny, clients: int) -> list[Start]:
    """Starts of a third round, each with a state of its own."""
    method, last = hooked_as(name, hook), rounds_of(hook, name, tiny)[-1]
    broadcast = method.broadcast(last.server)
    return [
        method.start_client(broadcast, last.states[k % 2] if k % 3 else None, Client(k, 0), tiny.shape)
        for k in range(clients)
    ]


def a_step(start: Start) -> LocalStep:
    rng = torch.Generator().manual_seed(3)
    trained = {name: start.tensors[name] for name in start.trained}
    gradients = {name: torch.randn(tensor.shape, generator=rng) for name, tensor in trained.items()}
    return LocalStep({name: tensor.clone() for name, tensor in trained.items()}, gradients, 0, 0.1)


def check_names(hook: LocalHook, name: str, tiny: Tiny) -> None:
    """Check that tensors that belong to a trained one are called `<trained tensor>/<kind>`, so that a plan knows the
    whole model's from one layer of each shape, and that a step leaves the memory its names and shapes."""
    (start,) = starts_of(hook, name, tiny, 1)
    shapes = {key: tensor.shape for key, tensor in start.memory.items()}
    for key in shapes:
        inside = any(layer.name in key for layer in (*tiny.shape.targets, *tiny.shape.head))
        assert not inside or key.rpartition("/")[0] in start.trained, f"{key} is not named <trained tensor>/<kind>"
    assert start.correct is not None
    _, after = start.correct(start.memory, a_step(start))
    assert {key: tensor.shape for key, tensor in after.items()} == shapes, "a step changes the memory's shapes"


def check_gradients(hook: LocalHook, name: str, tiny: Tiny) -> None:
    """Check that every trained tensor gets a finite gradient of its shape, and equal inputs give equal ones."""
    (start,) = starts_of(hook, name, tiny, 1)
    assert start.correct is not None
    (first, _), (second, _) = (start.correct(start.memory, a_step(start)) for _ in range(2))
    wanted = {key: start.tensors[key].shape for key in start.trained}
    assert {key: gradient.shape for key, gradient in first.items()} == wanted, "gradients are not those of the tensors"
    assert all(torch.equal(first[key], second[key]) for key in first), "equal inputs give other gradients"
    assert all(bool(torch.isfinite(gradient).all()) for gradient in first.values()), "a gradient is not finite"


def check_shared_tensors_stay(hook: LocalHook, name: str, tiny: Tiny) -> None:
    """Check that a round writes neither into the broadcast, nor into states, starts and the server."""
    method, last = hooked_as(name, hook), rounds_of(hook, name, tiny)[-1]
    given = [last.server.tensors, *(state.tensors for state in last.states)]
    guard = Guard(item for tensors in given for item in tensors.items())
    before = [{key: tensor.clone() for key, tensor in tensors.items()} for tensors in given]
    walk(method, tiny, last.server, clients_data(tiny, 2), weights=[1, 2], states=last.states, optimizer=SGD)
    guard.check()
    for tensors, copies in zip(given, before, strict=True):
        assert all(torch.equal(tensors[key], copies[key]) for key in copies), "a shared tensor was written"


def check_bytes(hook: LocalHook, name: str, tiny: Tiny) -> None:
    """Check that uploads and the download have the numbers of the `wire` formula beside the method's own."""
    up, down = hook.wire.split(" / ")
    plain, method = bare(name), hooked_as(name, hook)
    for done in rounds_of(hook, name, tiny):
        for start, update in zip(done.starts, done.updates, strict=True):
            numbers = sum(start.tensors[key].numel() for key in start.trained)
            sent = sum(tensor.numel() for key, tensor in update.tensors.items() if key.startswith(HOOK))
            assert sent == eval(up, {"__builtins__": {}}, {"t": numbers}), f"the upload differs from wire={hook.wire!r}"
            own = {key: tensor for key, tensor in done.server.tensors.items() if not key.startswith(HOOK)}
            servers = ((method, done.server), (plain, replace(done.server, tensors=own)))
            full, without = (m.download_bytes(server, tiny.shape, Client(0, 0), 0) for m, server in servers)
            assert full - without == 4 * eval(down, {"__builtins__": {}}, {"t": numbers}), f"download: {hook.wire!r}"


def check_without_data(hook: LocalHook, name: str, tiny: Tiny) -> None:
    """Check that a step can be planned: on tensors without data, which have names and shapes alone."""
    (start,) = starts_of(hook, name, tiny, 1)

    def emptied(tensors: Tensors) -> Tensors:
        return {key: tensor.to("meta") for key, tensor in tensors.items()}

    step = a_step(start)
    assert start.correct is not None
    try:
        start.correct(
            emptied(start.memory), replace(step, tensors=emptied(step.tensors), gradients=emptied(step.gradients))
        )
    except (NotImplementedError, RuntimeError) as error:
        raise AssertionError(f"values decide what a step computes: {error}") from None


def check_any_pack(hook: LocalHook, name: str, tiny: Tiny, packs: Sequence[Sequence[Sequence[int]]]) -> None:
    """Check that a client's result has the same bits in any pack.  packs: ways of packing CLIENTS clients."""
    starts = starts_of(hook, name, tiny, CLIENTS)
    steps, rows = (3, 2, 3, 1, 2, 3, 1, 2), (1, 2, 2, 2, 1, 3, 1, 3)
    data = [draw_batches(tiny, k, s, rows=b, tokens=9 + k) for k, (s, b) in enumerate(zip(steps, rows, strict=True))]
    found: list[dict[int, LocalResult]] = []
    for way in packs:
        found.append({})
        for pack in way:
            given = ([starts[k] for k in pack], [data[k] for k in pack], Optimizer(name="sgd", clip_norm=0.5))
            found[-1] |= {r.client: r for r in run_pack(tiny, *given, lr=0.1, clients=pack)}
    first, *others = found
    for other in others:
        for k, theirs in first.items():
            for mine, its in ((other[k].tensors, theirs.tensors), (other[k].memory, theirs.memory)):
                assert all(torch.equal(mine[key], its[key]) for key in its), (
                    f"client {k} has other bits in another pack"
                )


def check_stored(hook: LocalHook, name: str, tiny: Tiny) -> None:
    """Check that a client that goes on from what was stored trains as if it had never been."""
    method, last = hooked_as(name, hook), rounds_of(hook, name, tiny)[-1]
    broadcast = method.broadcast(last.server)
    state = last.states[0]
    read = replace(state, tensors=unpacked(packed(state.tensors)))
    starts = [method.start_client(broadcast, one, Client(0, 0), tiny.shape) for one in (state, read)]
    data = [draw_batches(tiny, 5, 2)]
    ends = [run_pack(tiny, [start], data, SGD, lr=0.1)[0] for start in starts]
    assert all(torch.equal(ends[0].tensors[key], ends[1].tensors[key]) for key in ends[0].tensors)


CHECKS = (check_names, check_gradients, check_shared_tensors_stay, check_bytes, check_without_data, check_stored)
