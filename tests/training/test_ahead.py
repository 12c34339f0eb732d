"""Batches that are made while the step before is computed, where the device is not the processor's own memory."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping

import pytest
import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.devices import meta_as
from rayfed_sub.training.ahead import in_turn
from rayfed_sub.training.executor import PackResult, train_pack
from rayfed_sub.training.pack_experts import install
from rayfed_sub.training.pack_step import LocalRule
from tests.helpers.second_device import SecondDevice
from tests.helpers.tiny_models import PAD, Tiny, draw_batches, llama, lora_start, works


class Noted(list):
    """Batches that note which thread asks for them; number `torn` cannot be read."""

    def __init__(self, batches: list[Mapping[str, torch.Tensor]], torn: int | None = None) -> None:
        super().__init__(batches)
        self.torn, self.threads = torn, list[str]()

    def __getitem__(self, index):
        self.threads.append(threading.current_thread().name)
        if index == self.torn:
            raise OSError("the file is gone")
        return super().__getitem__(index)


def pack(tiny: Tiny, batches: list[Noted], device: str) -> PackResult:
    model = copy.deepcopy(tiny.model).to(device)
    model.logit_rule = tiny.packed[0].logit_rule
    layers, start = install(model, tiny.shape), lora_start(tiny, 2)
    given = works([start] * len(batches), batches, None)
    if device == "cpu":
        return train_pack(model, layers, tiny.shape, given, LocalRule(Optimizer(), 0.01, 0, PAD))
    with meta_as("cuda"), SecondDevice():
        return train_pack(model, layers, tiny.shape, given, LocalRule(Optimizer(), 0.01, 0, PAD))


def test_things_come_in_turn() -> None:
    """The second is begun before the first is given back, and no third before the second is asked for."""
    begun, second = list[int](), threading.Event()

    def make(n: int) -> int:
        begun.append(n)
        if n == 1:
            second.set()
        if n == 2:
            raise ValueError("no third")
        return n

    turns = in_turn(make, 4, ahead=True)
    assert next(turns) == 0
    assert second.wait(10)
    assert begun == [0, 1]
    assert next(turns) == 1
    with pytest.raises(ValueError, match="no third"):
        next(turns)
    assert list(in_turn(make, 0, ahead=True)) == []
    assert begun == [0, 1, 2]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_client_whose_data_raise_leaves_the_others_alone(device: str) -> None:
    """Batches of a second device are drawn in a thread; on the processor they are drawn where they are used."""
    tiny = llama()
    whole = [draw_batches(tiny, seed, 4) for seed in range(3)]
    batches = [Noted(whole[0]), Noted(whole[1], torn=1), Noted(whole[2][:2])]
    results = pack(tiny, batches, device).results
    assert [result.failure for result in results] == [None, "batch of local step 1: OSError: the file is gone", None]
    assert [result.metrics["steps"] for result in results] == [4, 1, 2]
    assert [len(one.threads) for one in batches] == [4, 2, 2]  # nobody is asked again
    here = {thread == threading.current_thread().name for one in batches for thread in one.threads}
    assert here == {device == "cpu"}
