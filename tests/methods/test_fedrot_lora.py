"""FedRot-LoRA by hand: factors of rank 2 that one turn brings together."""

from __future__ import annotations

import math

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, ModelShape, ServerState
from rayfed_sub.methods import build
from rayfed_sub.methods.fedrot_lora import towards
from tests.helpers.by_hand import walked

SHAPE = ModelShape((Layer("up", m=2, n=2),))
WEIGHTS = {0: 3.0, 1: 1.0}  # p = 3/4, 1/4
UNIT, QUARTER = torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]])
B = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
# Client 1 has turned its factors by 90 degrees: (B Q^T, Q A) with A = I, the same product B.
RETURNED = {0: {"up/left": B, "up/right": UNIT}, 1: {"up/left": B @ QUARTER.T, "up/right": QUARTER}}
HALF = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)  # 45 degrees


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize(
    ("rotation", "right"),
    [
        (1.0, UNIT),  # both clients end at A' = I
        (0.5, 0.75 * UNIT + 0.25 * HALF),  # client 1 turns half of its way back
        (0.0, 0.75 * UNIT + 0.25 * QUARTER),  # FedIT
    ],
)
def test_one_round_by_hand(round: int, rotation: float, right: torch.Tensor) -> None:
    """Round 1 looks at A' = I, round 2 at B' = B: of client 1 both ask for the same turn, R = Q.  With (1 - c) I + c Q,
    c = 1/2, the nearest rotation is that by 45 degrees, and Q^T of it, times Q, is that by 45 degrees too."""
    method = build({"name": "fedrot-lora", "rank": 2, "alpha": 2.0, "rotation": rotation})
    server = ServerState(round, {"up/left": B, "up/right": UNIT})
    done = walked(method, SHAPE, server, RETURNED, WEIGHTS)
    torch.testing.assert_close(done.server.tensors["up/right"], right)
    for k, sent in done.updates.items():  # the product travels unchanged, whatever the turn
        torch.testing.assert_close(sent.tensors["up/left"] @ sent.tensors["up/right"], B)
        assert sent.wire_bytes == 2 * (2 + 2) * 4, k
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == 2 * (2 + 2) * 4
    exact = torch.dist(done.server.tensors["up/left"] @ done.server.tensors["up/right"], B)
    assert (exact < 1e-6) == (rotation == 1.0)  # then nothing is left of the cross term


@pytest.mark.parametrize("round", [0, 2])
def test_no_turn_towards_a_mean_of_zero(round: int) -> None:
    """Before anything was learned B' = 0; so may it be later, when every client failed until then."""
    method = build({"name": "fedrot-lora", "rank": 2, "rotation": 1.0})
    server = ServerState(round, {"up/left": torch.zeros(2, 2), "up/right": UNIT})
    done = walked(method, SHAPE, server, RETURNED, WEIGHTS)
    assert torch.equal(done.updates[1].tensors["up/right"], QUARTER)


def test_round_0_does_not_turn_towards_a_start_that_is_not_zero() -> None:
    """As in the authors' code, whose first round never turns."""
    method = build({"name": "fedrot-lora", "rank": 2, "rotation": 1.0})
    done = walked(method, SHAPE, ServerState(0, {"up/left": B, "up/right": UNIT}), RETURNED, WEIGHTS)
    assert torch.equal(done.updates[1].tensors["up/right"], QUARTER)


def test_a_rotation_in_place_of_a_nearer_reflection() -> None:
    """diag(1, -1) would map the one onto the other; of the rotations I is the nearest, for its trace is least negative
    where the smaller singular value pays: |diag(2, 1) R - diag(2, -1)|."""
    R = towards(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([2.0, -1.0])), 1.0)
    torch.testing.assert_close(R, UNIT)
