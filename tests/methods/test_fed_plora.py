"""Fed-PLoRA by hand: modules that a client trains over the others, and a mean over those that trained one."""

from __future__ import annotations

import torch

from rayfed_sub.core.types import Client
from rayfed_sub.methods import build
from rayfed_sub.methods.components import chosen
from tests.helpers.by_hand import walked
from tests.helpers.tiny_models import distance, llama, run_pack, run_reference
from tests.methods.test_fslora import FACTORS, SHAPE, START
from tests.methods.test_protocol import OPTIMIZER, begun, clients_data, walk


def test_two_clients_by_hand() -> None:
    """Ranks 1 and 2 of 2, s = alpha / r = 2, p = 1/4, 3/4.  Client 0 has drawn module j and ends with b = (9, 9),
    a = (5, 5); client 1 has both and ends with ones and twos."""
    method = build({"name": "fed-plora", "rank": 2, "client_ranks": [1, 2], "alpha": 4.0})
    server = method.init_server(START, SHAPE, seed=0).advance(FACTORS)
    j = int(chosen(0, 1, 0, SHAPE.targets[0], 1, 2))
    ends = {
        0: {"up/left": [[9], [9]], "up/right": [[5, 5]], "score/weight": [[4, 0]]},
        1: {"up/left": torch.ones(2, 2), "up/right": torch.full((2, 2), 2.0), "score/weight": [[0, 4]]},
    }
    done = walked(method, SHAPE, server, ends, {0: 1.0, 1: 3.0})
    assert [start.scale_of("up") for start in done.starts.values()] == [2.0, 2.0]
    # The folded module, s in its left factor; both together are the global model.
    start = done.starts[0]
    assert torch.equal(start.frozen["up/left"], 2.0 * FACTORS["up/left"][:, [1 - j]])
    assert torch.equal(start.frozen["up/right"], FACTORS["up/right"][[1 - j]])
    both = 2.0 * start.tensors["up/left"] @ start.tensors["up/right"]
    both += start.frozen["up/left"] @ start.frozen["up/right"]
    assert torch.equal(both, method.model(server, SHAPE)["up"].apply(START["up/weight"]))
    assert done.starts[1].frozen["up/left"].shape == (2, 0)
    # j: (9 + 3 * 1) / 4 and (5 + 3 * 2) / 4; the other by client 1 alone.
    left, right = torch.ones(2, 2), torch.full((2, 2), 2.0)
    left[:, j], right[j] = 3.0, 2.75
    assert torch.equal(done.server.tensors["up/left"], left)
    assert torch.equal(done.server.tensors["up/right"], right)
    assert done.server.tensors["score/weight"].tolist() == [[1.0, 3.0]]
    # k (m + n) = 4 and 8 numbers and the head's 2 up, r (m + n) and the head down.
    assert [update.wire_bytes for update in done.updates.values()] == [24, 40]
    assert [method.download_bytes(done.server, SHAPE, Client(k, 0), since=0) for k in (0, 1)] == [40, 40]
    # Without client 1 nobody has drawn the other module: it stays.
    alone = walked(method, SHAPE, server, {0: ends[0]}, {0: 1.0})
    assert torch.equal(alone.server.tensors["up/left"][:, 1 - j], FACTORS["up/left"][:, 1 - j])
    assert alone.server.tensors["up/left"][:, j].tolist() == [9.0, 9.0]


def test_clients_of_unequal_ranks_have_the_same_bits_in_any_pack_and_train_as_in_the_reference() -> None:
    """Frozen blocks of rank 2, 1 and 0."""
    tiny = llama()
    method = build({"name": "fed-plora", "rank": 3, "client_ranks": [1, 2, 3]})
    broadcast = method.broadcast(begun(method, tiny))
    starts = [method.start_client(broadcast, None, Client(k, 0), tiny.shape) for k in range(3)]
    data = [batches[:2] for batches in clients_data(tiny, 3)]
    optimizer = OPTIMIZER.model_copy(update={"eps": 1e-4})
    together = run_pack(tiny, starts, data, optimizer, lr=0.01)
    theirs = run_reference(tiny, starts[:2], data[:2], optimizer, lr=0.01)
    for k, start in enumerate(starts):
        (alone,) = run_pack(tiny, [start], [data[k]], optimizer, lr=0.01, clients=[k])
        for name in start.trained:
            assert torch.equal(alone.tensors[name], together[k].tensors[name])
            for other in theirs[k : k + 1]:
                moved = (result.tensors[name] - start.tensors[name] for result in (together[k], other))
                assert distance(*moved) < 1e-4


def test_with_equal_ranks_it_is_fedit() -> None:
    tiny, data = llama(), clients_data(llama(), 2)
    servers = []
    for name in ("fed-plora", "fedit"):
        method = build({"name": name, "rank": 2})
        first = walk(method, tiny, method.init_server(tiny.weights, tiny.shape, seed=0), data, weights=[1, 2])
        servers.append(walk(method, tiny, first.server, data, weights=[1, 2]).server.tensors)  # without its moments
    for layer in tiny.shape.targets:
        for role in ("left", "right"):
            assert torch.allclose(*(tensors[f"{layer.name}/{role}"] for tensors in servers), atol=1e-6)
