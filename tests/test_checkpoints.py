"""Checkpoints: what is written comes back bit for bit, only the newest stays, and a torn one does not count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rayfed_sub.engine import checkpoints
from rayfed_sub.engine.coordinator import Snapshot
from rayfed_sub.engine.exchange import packed
from rayfed_sub.engine.workers import PackedState
from rayfed_sub.errors import UserError

SERVER = {
    "layer/weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "layer/half": torch.linspace(-1, 1, 6).reshape(2, 3).bfloat16(),
    "history/ranks": torch.tensor([[2**40, -1], [3, 4]]),
    "history/none": torch.zeros(0, 2, dtype=torch.int64),
    "step": torch.tensor(7.5, dtype=torch.float64),
    "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
}
CLIENT = {"layer/left": torch.full((3, 2), 0.1), "layer/left/m1": torch.zeros(0)}


def snapshot(n: int, server: dict[str, Tensor] = SERVER) -> Snapshot:
    """Clients 3 and 12, after round `n`."""
    states = {client: PackedState(n - 1, 4 * n, 4 * n + client, packed(CLIENT)) for client in (3, 12)}
    return Snapshot(n, packed(server), states)


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    final = checkpoints.write(tmp_path, snapshot(5))
    assert final == tmp_path / "checkpoints" / "round-000005"
    server, clients = checkpoints.read(tmp_path)
    assert server.round == 5
    assert bits(dict(server.tensors)) == bits(SERVER)
    assert sorted(clients) == [3, 12]
    state = clients[12]
    assert (state.round, state.cursor, state.step) == (4, 20, 32)  # 5 - 1, 4 * 5, 4 * 5 + 12
    assert bits(dict(state.tensors)) == bits(CLIENT)


def test_a_client_without_tensors_comes_back(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, Snapshot(1, packed(SERVER), {0: PackedState(0, 4, 4, {})}))
    _, clients = checkpoints.read(tmp_path)
    assert (clients[0].cursor, dict(clients[0].tensors)) == (4, {})


def test_views_of_one_tensor_can_be_written(tmp_path: Path) -> None:
    both = torch.arange(6.0).reshape(2, 3)
    parts = {"first": both[0], "second": both[1], "turned": both.T}
    checkpoints.write(tmp_path, snapshot(1, parts))
    server, _ = checkpoints.read(tmp_path)
    assert bits(dict(server.tensors)) == bits(parts)


def test_only_the_newest_stays(tmp_path: Path) -> None:
    for n in (1, 2, 10):
        checkpoints.write(tmp_path, snapshot(n))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"round-{n:06d}"]
    assert checkpoints.read(tmp_path)[0].round == 10


def test_the_same_round_may_be_written_again(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, snapshot(1))
    states = {3: PackedState(0, 4, 4, packed(CLIENT))}
    final = checkpoints.write(tmp_path, Snapshot(1, packed({"layer/weight": torch.ones(2)}), states))
    assert list(checkpoints.read(tmp_path)[0].tensors) == ["layer/weight"]
    assert [path.name for path in (final / "clients").iterdir()] == ["000003.safetensors"]  # nothing of client 12


def test_a_write_that_is_cut_off_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(tmp_path, snapshot(1))

    def cut_off(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise InterruptedError

    with monkeypatch.context() as torn:
        torn.setattr(checkpoints, "save_file", cut_off)
        with pytest.raises(InterruptedError):
            checkpoints.write(tmp_path, snapshot(2))
    assert checkpoints.read(tmp_path)[0].round == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # the old one, and what was left of the new one

    checkpoints.write(tmp_path, snapshot(2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000002"]
    assert bits(dict(checkpoints.read(tmp_path)[0].tensors)) == bits(SERVER)


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "checkpoints" / "round-000009").mkdir()  # without a manifest
    with pytest.raises(UserError, match="a run folder with a checkpoint"):
        checkpoints.read(tmp_path)
    checkpoints.write(tmp_path, snapshot(1))
    assert checkpoints.read(tmp_path)[0].round == 1
    assert (tmp_path / "checkpoints" / "notes.txt").exists()
