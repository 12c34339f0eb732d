"""Tensors across process boundaries: the same bits, aligned, and no write goes undetected."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from rayfed_sub.core.arrays import Guard, checksum, packed, unpacked
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.types import Broadcast, ClientState, Update
from rayfed_sub.diagnostics.client_change import ClientChange
from rayfed_sub.runtime.object_store import get, put

T = TypeVar("T")
TENSORS = {
    "float32": torch.linspace(-1, 1, 6).reshape(2, 3),
    "float64": torch.tensor(0.1, dtype=torch.float64),
    "bfloat16": torch.tensor([[1.0, -0.0], [float("inf"), 3e-39]]).bfloat16(),
    "bfloat16 scalar": torch.tensor(1.5).bfloat16(),
    "int64": torch.tensor([2**40, -1]),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def through_pickle(value: T) -> T:
    """A copy as from the object store: every array over a read-only buffer of its own."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    back: T = pickle.loads(head, buffers=[bytes(buffer.raw()) for buffer in buffers])
    return back


@pytest.mark.parametrize("name", TENSORS)
def test_bits_survive_the_object_store(name: str) -> None:
    tensor = TENSORS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = unpacked(through_pickle(packed({name: tensor})))[name]
    assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor))
    assert back.is_contiguous()


def test_small_view_is_sent_without_its_storage() -> None:
    large = torch.zeros(1000, 1000)
    assert len(pickle.dumps(Broadcast(0, {"row": large[3]}))) < 10_000  # 4 kB of numbers, not 4 MB


RECORDS = [
    ClientState(3, 8, 7, TENSORS),
    Update(5, 2.0, TENSORS, {"loss": 1.5}, "why"),
    Broadcast(4, TENSORS),
    ClientChange("dense", TENSORS, 1.0, turned=0.5),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_record_keeps_its_type_and_its_tensors_are_sent_outside_the_pickle(record: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(record, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == len(TENSORS)
    back = through_pickle(record)
    assert type(back) is type(record)
    for field in fields(record):
        if field.name != "tensors":
            assert getattr(back, field.name) == getattr(record, field.name)
    assert {name: (t.dtype, t.shape, bits(t)) for name, t in back.tensors.items()} == {
        name: (t.dtype, t.shape, bits(t)) for name, t in TENSORS.items()
    }


def test_small_state_is_sent_alone_and_keeps_nothing_else_in_memory() -> None:
    result = torch.arange(10_000.0)  # a worker's result for an entire pack
    state = ClientState(3, 8, 8, {"a/m1": result[:24]})  # 96 bytes of it: no object in the store
    kept = get(put(state))
    assert (kept.round, kept.cursor, kept.step) == (3, 8, 8)
    assert torch.equal(kept.tensors["a/m1"], result[:24])
    assert kept.tensors["a/m1"].untyped_storage().nbytes() == 96


def test_larger_state_is_sent_through_the_store(ray_session: None) -> None:
    import ray

    state = ClientState(3, 8, 8, {"a/m1": torch.arange(25_000.0)})  # 100 kB
    stored = put(state)
    assert isinstance(stored, ray.ObjectRef)
    back = get(stored, timeout=30)
    assert (back.round, back.cursor, back.step) == (3, 8, 8)
    assert bits(back.tensors["a/m1"]) == bits(torch.arange(25_000.0))


def test_trained_tensor_is_sent_without_its_graph() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert not unpacked(packed({"w": tensor * 2}))["w"].requires_grad


@pytest.mark.parametrize("shift", [0, 4, 32, 60])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_begin_at_multiples_of_64_bytes_in_any_buffer(shift: int, dtype: str) -> None:
    buffer = np.zeros(1024, np.uint8)
    begin = -buffer.ctypes.data % 64 + shift
    kind = np.dtype(np.int16 if dtype == "bfloat16" else dtype)
    array = buffer[begin : begin + 8 * kind.itemsize].view(kind)
    array[:] = np.arange(8)
    assert array.ctypes.data % 64 == shift
    tensor = unpacked({"w": (dtype, array)})["w"]
    assert tensor.data_ptr() % 64 == 0
    assert tensor.dtype == getattr(torch, dtype)
    assert bits(tensor) == array.tobytes()
    assert (tensor.data_ptr() == array.ctypes.data) == (shift == 0)  # copied only if necessary


def in_place(tensor: Tensor) -> None:
    tensor.add_(1)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "itself": in_place,
    "a row": lambda w: w[1].zero_(),
    "a slice": lambda w: w[:, 1:].mul_(2),
    "an element": lambda w: w.__setitem__((0, 0), 5.0),
    "transposed": lambda w: in_place(w.T),
    "reshaped": lambda w: in_place(w.view(-1)),
    "detached": lambda w: in_place(w.detach()),
    "a view of a view": lambda w: in_place(w.T[0].unsqueeze(0)),
    "as out=": lambda w: torch.add(w, 1, out=w),
    "copied into": lambda w: w.copy_(torch.ones_like(w)),
    "under no_grad": torch.no_grad()(in_place),
}
READS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda w: w @ w.T + 1,
    "views": lambda w: (w.T, w[0], w.view(-1), w.detach()),
    "a changed copy": lambda w: in_place(w.clone()),
    "a changed conversion": lambda w: in_place(w.double()),
    "a gradient": lambda w: (w.clone().requires_grad_() ** 2).sum().backward(),
    "as bytes": lambda w: w.numpy().tobytes(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_guard_detects_writes(write: Callable[[Tensor], object]) -> None:
    shared = unpacked({"quiet": ("float32", np.ones(3, np.float32)), "w": ("float32", np.ones((2, 3), np.float32))})
    guard = Guard(shared.items())
    guard.check()
    write(shared["w"])
    with pytest.raises(RunError, match=r"^shared memory: tensor w was written in place"):
        guard.check()


def test_guard_detects_a_write_to_bfloat16() -> None:
    shared = unpacked(packed({"w": torch.ones(2, 3).bfloat16()}))
    guard = Guard(shared.items())
    in_place(shared["w"][0])
    with pytest.raises(RunError, match="tensor w "):
        guard.check()


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_guard_ignores_reads(read: Callable[[Tensor], object]) -> None:
    shared = unpacked({"w": ("float32", np.ones((2, 3), np.float32))})
    guard = Guard(shared.items())
    read(shared["w"])
    guard.check()


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "empty"])
def test_checksum_detects_every_single_bit(name: str) -> None:
    arrays = {key: (dtype, array.copy()) for key, (dtype, array) in packed(TENSORS).items()}
    before = checksum(arrays)
    flat = arrays[name][1].reshape(-1).view(np.uint8)
    for byte in range(len(flat)):
        for bit in range(8):
            flat[byte] ^= 1 << bit
            assert checksum(arrays) != before, f"byte {byte}, bit {bit}"
            flat[byte] ^= 1 << bit
    assert checksum(arrays) == before


def test_checksum_is_the_sum_of_words_and_of_the_remaining_bytes() -> None:
    # 3 int32 are 12 bytes: one word, 1 + 2 * 2^32, and the bytes 3, 0, 0, 0
    assert checksum({"w": ("int32", np.array([1, 2, 3], np.int32))}) == 1 + 2 * 2**32 + 3
    # 2^63 + 2^63 = 2^64, which is 0 modulo 2^64
    words = np.array([2**63, 2**63], np.uint64)
    assert checksum({"a": ("uint64", words), "b": ("uint8", np.array([5], np.uint8))}) == 5
