"""Client diagnostics on their way: selected clients and layers, what travels, and what the coordinator keeps."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rayfed_sub.config.schema import Diagnostics
from rayfed_sub.core.types import Layer, LocalResult, ModelShape, Start
from rayfed_sub.diagnostics.client_diagnostics import (
    ClientDiagnostics,
    due,
    gradient_watch,
    kept,
    measured,
    rows,
    watched,
)
from rayfed_sub.diagnostics.gradients import GradientWatch
from rayfed_sub.diagnostics.server_change import ServerChange

SHAPE = ModelShape(tuple(Layer(f"block.{i}.up", m=6, n=4) for i in range(5)))
NOBODY = GradientWatch({}, frozenset())


def factors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"left": (6, 2), "right": (2, 4)}
    return {
        f"{layer.name}/{role}": torch.randn(size, generator=draw)
        for layer in SHAPE.targets
        for role, size in sizes.items()
    }


def a_round(client: int) -> tuple[Start, LocalResult]:
    """LoRA of rank 2 before and after."""
    before, after = factors(client), factors(100 + client)
    return Start(before, tuple(before)), LocalResult(client, after, {}, 4, {}, 1.0, 1, {}, trained=tuple(before))


def diagnostics_of(client: int, asked: Diagnostics) -> ClientDiagnostics:
    return measured(asked, SHAPE, *a_round(client), 1.0, NOBODY)


def test_empty_cohorts_are_not_measured() -> None:
    assert watched(Diagnostics(), 0, 3, []) == []
    assert watched(Diagnostics(every=0), 2, 3, [1, 2]) == []


def test_initial_tensors_can_be_on_another_device() -> None:
    class OnDevice:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def cpu(self) -> Tensor:
            return self.tensor

    start, result = a_round(0)
    there = Start({name: cast(Tensor, OnDevice(x)) for name, x in start.tensors.items()}, start.trained)
    found = measured(Diagnostics(), SHAPE, there, result, 1.0, NOBODY)
    expected = diagnostics_of(0, Diagnostics())
    assert found.layers.keys() == expected.layers.keys()
    for name, change in found.layers.items():
        assert change.norm == expected.layers[name].norm
        assert all(torch.equal(x, expected.layers[name].tensors[role]) for role, x in change.tensors.items())


def test_coordinator_keeps_no_view_of_received_data() -> None:
    came = diagnostics_of(0, Diagnostics())
    own = kept(came)
    for name, change in own.layers.items():
        for role, tensor in change.tensors.items():
            theirs = came.layers[name].tensors[role]
            assert torch.equal(tensor, theirs)
            assert tensor.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def test_layers_are_selected_evenly_and_reported_in_order() -> None:
    asked = Diagnostics(layers=2)
    layers, clients = rows(
        7, SHAPE, [diagnostics_of(k, asked) for k in (3, 4, 5)], {"block.2.up": ServerChange(4, 0.5)}
    )
    assert [(row.round, row.layer, row.clients) for row in layers] == [(7, "block.0.up", 3), (7, "block.2.up", 3)]
    assert [(row.server_rank, row.accumulated) for row in layers] == [(None, None), (4, 0.5)]
    assert [(row.layer, row.client) for row in clients] == [
        (name, k) for name in ("block.0.up", "block.2.up") for k in (3, 4, 5)
    ]


def test_gradients_are_measured_for_the_examined_clients_in_selected_layers() -> None:
    starts = [a_round(k)[0] for k in (3, 4, 5)]
    watch = gradient_watch(Diagnostics(layers=2, gradient_layers=4), SHAPE, {4: starts[1], 5: starts[2]})
    assert watch.ranks == {4: 2, 5: 2}
    assert watch.layers == {"block.0.up", "block.2.up"}
    nowhere = gradient_watch(Diagnostics(gradient_layers=0), SHAPE, {3: starts[0]})
    assert nowhere.layers == frozenset()
    dense: Any = Start({f"{layer.name}/weight": torch.zeros(6, 4) for layer in SHAPE.targets}, ())
    assert gradient_watch(Diagnostics(), SHAPE, {3: dense}).ranks == {3: 8}


def test_measured_rounds() -> None:
    assert [due(Diagnostics(every=2), n, 5) for n in range(5)] == [False, True, False, True, True]
    assert not any(due(Diagnostics(every=0), n, 5) for n in range(5))
