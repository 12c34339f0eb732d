"""FSLoRA by hand: drawn components, their scale, and a mean in which who did not draw counts as unmoved."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub import UserError, load_config
from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.components import chosen
from tests.helpers.by_hand import walked

SHAPE = ModelShape((Layer("up", m=2, n=2),), (Layer("score", m=1, n=2),))
START = {"up/weight": torch.zeros(2, 2), "score/weight": torch.zeros(1, 2)}
FACTORS = {"up/left": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "up/right": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}


def test_two_clients_by_hand() -> None:
    """Ranks 1 and 2 of 2, alpha 2, p = 1/4, 3/4.  Client 0 has drawn component j and ends with b = (9, 9), a = (5, 5);
    client 1 has both and ends with zeros."""
    method = build({"name": "fslora", "rank": 2, "client_ranks": [1, 2], "alpha": 2.0})
    server = method.init_server(START, SHAPE, seed=0).advance(FACTORS)
    j = int(chosen(0, 1, 0, SHAPE.targets[0], 1, 2))
    zeros = {"up/left": torch.zeros(2, 2), "up/right": torch.zeros(2, 2), "score/weight": [[0, 4]]}
    ends = {0: {"up/left": [[9], [9]], "up/right": [[5, 5]], "score/weight": [[4, 0]]}, 1: zeros}
    done = walked(method, SHAPE, server, ends, {0: 1.0, 1: 3.0})
    assert torch.equal(done.starts[0].tensors["up/left"], FACTORS["up/left"][:, [j]])
    assert torch.equal(done.starts[0].tensors["up/right"], FACTORS["up/right"][[j]])
    assert [start.scale_of("up") for start in done.starts.values()] == [2.0, 1.0]  # (alpha / r) r / k
    # j: (9 + 3 * 0) / 4 and (5 + 3 * 0) / 4; the other: (old + 3 * 0) / 4, for client 0 did not draw it.
    left, right = FACTORS["up/left"] / 4, FACTORS["up/right"] / 4
    left[:, j], right[j] = 2.25, 1.25
    assert torch.equal(done.server.tensors["up/left"], left)
    assert torch.equal(done.server.tensors["up/right"], right)
    assert done.server.tensors["score/weight"].tolist() == [[1.0, 3.0]]
    # k (m + n) = 4 and 8 numbers, and the head's 2, both ways.
    assert [update.wire_bytes for update in done.updates.values()] == [24, 40]
    assert [method.download_bytes(done.server, SHAPE, Client(k, 0), since=0) for k in (0, 1)] == [24, 40]


def test_draws_differ_between_rounds_clients_and_layers_and_are_even() -> None:
    layer, other = Layer("a", 8, 8), Layer("b", 8, 8)
    assert chosen(0, 1, 2, layer, 3, 8).tolist() == sorted(set(chosen(0, 1, 2, layer, 3, 8).tolist()))
    draws = [chosen(s, n, k, x, 3, 8) for s, n, k, x in ((0, 0, 0, layer), (0, 1, 0, layer), (0, 0, 1, layer))]
    draws += [chosen(0, 0, 0, other, 3, 8), chosen(1, 0, 0, layer, 3, 8)]
    assert len({tuple(draw.tolist()) for draw in draws}) > 3
    counts = torch.zeros(8)
    for n in range(400):
        counts[chosen(0, n, 0, layer, 2, 8)] += 1  # 100 each in the mean, deviation 9
    assert counts.min() > 60
    assert counts.max() < 140


def test_sketch_is_right_in_the_mean() -> None:
    """E[s B S A] = s B A: k / r of the draws have a component, each with r / k of its scale."""
    method = build({"name": "fslora", "rank": 2, "client_ranks": [1], "alpha": 2.0, "use_rslora": True})
    server, mean = method.init_server(START, SHAPE, seed=0).advance(FACTORS), torch.zeros(2, 2)
    broadcast = method.broadcast(server)
    starts = [method.start_client(broadcast, None, Client(k, 0), SHAPE) for k in range(400)]
    for start in starts:
        mean += start.scale_of("up") * start.tensors["up/left"] @ start.tensors["up/right"] / len(starts)
    whole = method.model(server, SHAPE)["up"].apply(START["up/weight"])
    assert whole == pytest.approx(2.0 / 2**0.5 * FACTORS["up/left"] @ FACTORS["up/right"])
    assert torch.allclose(mean, whole, rtol=0.2)


def test_largest_seed_fits_the_server_s_tensor() -> None:
    largest = load_config({"name": "a", "seed": 2**63 - 1}).seed
    server = build({"name": "fslora", "rank": 2}).init_server(START, SHAPE, largest)
    assert int(server.tensors["seed"]) == largest
    with pytest.raises(UserError, match="seed: got 9223372036854775808"):
        load_config({"name": "a", "seed": 2**63})
