"""One conformance suite over every method of the table, and the guarantees of each on the server.

Rounds are executed by hand on a small Llama with targets taller and wider than square; no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from rayfed_sub.config.schema import Config, Optimizer
from rayfed_sub.core.arrays import packed, unpacked
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.lowrank import inner_core
from rayfed_sub.core.types import (
    Block,
    Client,
    ClientState,
    Layer,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import METHODS, build
from rayfed_sub.methods.downloads import downloaded, unchanged
from rayfed_sub.methods.protocol import Method
from rayfed_sub.planning.traffic import traffic
from tests.helpers.tiny_models import (
    Tiny,
    bert,
    distance,
    draw_batches,
    gpt2,
    llama,
    mixture,
    own,
    run_pack,
    run_reference,
    vit,
)

RANK, STEPS = 2, 3
OPTIMIZER = Optimizer(lr=0.01)
Data = Sequence[Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Round:
    """One round executed by hand."""

    server: ServerState
    starts: list[Start]
    results: list[LocalResult]
    updates: list[Update]
    states: list[ClientState]


# Where what is kept follows from the data: all of it, so that bytes follow from ranks; or less than all.
KEPT = {"florist": {"threshold": 1.0}, "fedmomentum": {"energy": 0.9}}


def made(name: str, **fields: object) -> Method:
    own = {} if name == "fedavg" else {"rank": RANK, **KEPT.get(name, {})}
    return build({"name": name, **own, **fields})


def walk(
    method: Method,
    tiny: Tiny,
    server: ServerState,
    data: Data,
    *,
    weights: Sequence[float],
    states: Sequence[ClientState | None] | None = None,
    lr: float = 0.01,
    optimizer: Optimizer = OPTIMIZER,
    packs: Sequence[Sequence[int]] | None = None,
    trainer: object = run_pack,
    ids: Sequence[int] | None = None,
) -> Round:
    """start_client, local training, upload, client_state, accumulate, aggregate.  ids: the clients' numbers, from 0 by
    default; equal numbers make equal private draws."""
    shape, clients = tiny.shape, range(len(data))
    broadcast = method.broadcast(server)
    before = list(states or [None] * len(data))
    who = [Client(k, 0) for k in ids or clients]
    starts = [method.start_client(broadcast, state, w, shape) for w, state in zip(who, before, strict=True)]
    base = {name: tensor for name, tensor in broadcast.tensors.items() if name.endswith("/weight")}
    results: list[LocalResult] = []
    for pack in packs or [clients]:
        chosen, batches = [starts[k] for k in pack], [data[k] for k in pack]
        results += trainer(tiny, chosen, batches, optimizer, lr=lr, weights=base, clients=list(pack))  # type: ignore[operator]
    if ids:
        results = [replace(result, client=k) for result, k in zip(results, ids, strict=True)]
    updates = [method.upload(broadcast, result, weight, shape) for result, weight in zip(results, weights, strict=True)]
    kept = [
        ClientState(
            server.round + 1,
            (state.cursor if state else 0) + STEPS,
            result.step,
            method.client_state(broadcast, result, shape),
        )
        for result, state in zip(results, before, strict=True)
    ]
    total = method.accumulator(server, shape)
    for update in updates:
        total = method.accumulate(total, update, shape)
    return Round(method.aggregate(server, total, shape), starts, results, updates, kept)


def effective(method: Method, tiny: Tiny, server: ServerState) -> dict[str, Tensor]:
    """The global model's weights, or those of one fixed client's own model: every target (m, n), and the head."""
    changes = method.personal_model(server, somebody(tiny), tiny.shape) if method.personal else None
    changes = changes or method.model(server, tiny.shape)
    weights = {t.name: changes[t.name].apply(tiny.weights[f"{t.name}/weight"]) for t in tiny.shape.targets}
    return weights | {name: server.tensors[name] for name in tiny.shape.head_names}


def somebody(tiny: Tiny) -> ClientState:
    """The state of a client that does not take part in the round: factors that are not zero."""
    rng = torch.Generator().manual_seed(7)
    left = {f"{t.name}/left": 0.1 * torch.randn(t.m, RANK, generator=rng) for t in tiny.shape.targets}
    right = {f"{t.name}/right": 0.1 * torch.randn(RANK, t.n, generator=rng) for t in tiny.shape.targets}
    return ClientState(1, STEPS, STEPS, {**left, **right, "client": torch.tensor(99)})


def local_change(tiny: Tiny, server: ServerState, done: Round, k: int, layer: str) -> Tensor:
    """dW_k: the change that client k's own round made to a target's effective weight."""
    result, start = done.results[k], done.starts[k]
    if start.subspace is not None:
        W = server.tensors[f"{layer}/weight"]
        left, right = result.blocks[layer]
        return result.base_scale * W + left @ right - W
    if f"{layer}/weight" in start.tensors:
        return result.tensors[f"{layer}/weight"] - start.tensors[f"{layer}/weight"]

    def product(tensors: Tensors) -> Tensor:
        left, right = tensors[f"{layer}/left"], tensors[f"{layer}/right"]
        return Block(left, right, start.scale_of(layer), inner_core(tensors, layer)).dense()

    return product(result.tensors) - product(start.tensors)


@cache
def begun(method: Method, tiny: Tiny) -> ServerState:
    """A server after one finished round, so that no factor is zero; the same one for all tests."""
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    return walk(method, tiny, server, clients_data(tiny, 2, seed=90), weights=[1, 2]).server


def clients_data(tiny: Tiny, clients: int, seed: int = 0) -> Data:
    return [draw_batches(tiny, seed + k, STEPS) for k in range(clients)]


def copies(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


every_method = pytest.mark.parametrize("name", list(METHODS))


@every_method
def test_inputs_are_not_modified_and_equal_inputs_give_equal_outputs(name: str) -> None:
    method, tiny = made(name), llama()
    server = begun(method, tiny)
    data = clients_data(tiny, 2)
    states = walk(method, tiny, server, data, weights=[1, 2]).states
    held = [copies(server.tensors), *(copies(state.tensors) for state in states)]
    first = walk(method, tiny, server, data, weights=[1, 2], states=states)
    second = walk(method, tiny, server, data, weights=[1, 2], states=states)
    assert all(same(a, b) for a, b in zip(held, [server.tensors, *(s.tensors for s in states)], strict=True))
    assert same(first.server.tensors, second.server.tensors)
    assert all(same(a.tensors, b.tensors) for a, b in zip(first.states, second.states, strict=True))


@every_method
def test_updates_and_states_survive_the_object_store(name: str) -> None:
    method, tiny = made(name), llama()
    done = walk(method, tiny, begun(method, tiny), clients_data(tiny, 1), weights=[1])
    for tensors in (done.updates[0].tensors, done.states[0].tensors, done.server.tensors):
        assert same(unpacked(packed(tensors)), tensors)


@every_method
def test_identical_clients_match_one_client(name: str) -> None:
    method, tiny = made(name), llama()
    server, data = begun(method, tiny), clients_data(tiny, 1)
    one = effective(method, tiny, walk(method, tiny, server, data, weights=[1]).server)
    four = effective(method, tiny, walk(method, tiny, server, list(data) * 4, weights=[1, 2, 3, 4], ids=[0] * 4).server)
    before = effective(method, tiny, server)
    for layer in one:
        assert distance(four[layer] - before[layer], one[layer] - before[layer]) < 1e-4


@every_method
def test_learning_rate_zero_is_a_fixed_point(name: str) -> None:
    method, tiny = made(name), llama()
    one_step = [batches[:1] for batches in clients_data(tiny, 3, seed=50)]
    first = walk(method, tiny, begun(method, tiny), one_step, weights=[1, 2, 3])
    server = first.server
    if name == "florist":  # one such round takes what the server has beyond the clients' ranks
        server = walk(method, tiny, server, clients_data(tiny, 1), weights=[1], lr=0.0).server
    given = {"weights": [1, 2, 3], "states": first.states}  # a new client's own factors would count in the others' mean
    after = walk(method, tiny, server, clients_data(tiny, 3), lr=0.0, **given).server
    before, now = effective(method, tiny, server), effective(method, tiny, after)
    for layer in before:
        assert torch.allclose(before[layer], now[layer], atol=1e-6)


@every_method
def test_only_the_ratio_of_the_weights_counts(name: str) -> None:
    method, tiny = made(name), llama()
    server, data = begun(method, tiny), clients_data(tiny, 2)
    a = effective(method, tiny, walk(method, tiny, server, data, weights=[1, 3]).server)
    b = effective(method, tiny, walk(method, tiny, server, data, weights=[25, 75]).server)
    c = effective(method, tiny, walk(method, tiny, server, data, weights=[3, 1]).server)
    assert all(torch.allclose(a[layer], b[layer], atol=1e-6) for layer in a)
    assert any(not torch.allclose(a[layer], c[layer], atol=1e-5) for layer in a)


@every_method
def test_sum_shares_no_memory_with_its_inputs(name: str) -> None:
    """`accumulate` and `aggregate` write to the sum's tensors: neither updates nor the server may be among them."""
    method, tiny = made(name), llama()
    server = begun(method, tiny)
    updates = walk(method, tiny, server, clients_data(tiny, 2), weights=[1, 3]).updates
    given = [server.tensors, *(update.tensors for update in updates)]
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in given]
    total = method.accumulator(server, tiny.shape)
    for update in (*updates, *updates):
        total = method.accumulate(total, update, tiny.shape)
    method.aggregate(server, total, tiny.shape)
    assert all(same(old, new) for old, new in zip(before, given, strict=True))


@every_method
def test_client_of_weight_zero_has_no_effect(name: str) -> None:
    method, tiny = made(name), llama()
    server, data = begun(method, tiny), clients_data(tiny, 2)
    both = effective(method, tiny, walk(method, tiny, server, data, weights=[1, 0]).server)
    alone = effective(method, tiny, walk(method, tiny, server, data[:1], weights=[1]).server)
    assert all(torch.allclose(both[layer], alone[layer], atol=1e-6) for layer in both)


@every_method
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_exact_methods_average_the_changes_and_the_others_are_marked(name: str, decay: float) -> None:
    """Server change = sum_k p_k dW_k, with alpha / r = 8 and unequal p = (1, 2, 5) / 8."""
    method, tiny = made(name), llama()
    server = begun(method, tiny)
    optimizer = OPTIMIZER.model_copy(update={"weight_decay": decay})
    done = walk(method, tiny, server, clients_data(tiny, 3), weights=[1, 2, 5], optimizer=optimizer)
    before, after = effective(method, tiny, server), effective(method, tiny, done.server)
    for target in tiny.shape.targets:
        mean = sum(p / 8 * local_change(tiny, server, done, k, target.name) for k, p in enumerate([1, 2, 5]))
        gap = distance(after[target.name] - before[target.name], mean)
        assert (gap < 1e-5) if method.exact else (gap > 1e-3)


KINDS_OF_TRAINING = ("fedftg", "fedavg", "fedit", "ffa-lora", "fed-sb", "shared-galore", "fedex-lora", "hetlora")
"""GaLore, dense, both of LoRA's factors, one of them, a core between them, GaLore in a fixed basis, factors over a
weight of the server's, a penalty; others train in one of these ways, and on all kinds of models in slow tests."""


def quick(name: str, *models: object) -> list[object]:
    """A method with every model, slow where neither the way it trains nor the model is the first of its kind."""
    first = name in KINDS_OF_TRAINING
    return [
        pytest.param(name, tiny, marks=() if tiny is llama or (first and tiny is not mixture) else pytest.mark.slow)
        for tiny in models
    ]


@pytest.mark.parametrize(
    ("name", "tiny"), [x for name in METHODS for x in quick(name, llama, gpt2, bert, vit, mixture)]
)
def test_packs_and_the_reference_agree(name: str, tiny: object) -> None:
    """Compare the change of the global model.  eps = 1e-4: with a smaller one Adam amplifies the rounding of entries
    whose gradient is nearly zero, in both executors, and the comparison would measure that."""
    model: Tiny = tiny()  # type: ignore[operator]
    method = made(name)
    server = begun(method, model)
    data = clients_data(model, 2)
    optimizer = OPTIMIZER.model_copy(update={"eps": 1e-4})
    ours, theirs = (
        effective(
            method, model, walk(method, model, server, data, weights=[1, 2], optimizer=optimizer, trainer=t).server
        )
        for t in (run_pack, run_reference)
    )
    before = effective(method, model, server)
    for layer in ours:
        assert distance(ours[layer] - before[layer], theirs[layer] - before[layer]) < 1e-4


@pytest.mark.parametrize(("name", "tiny"), [x for name in METHODS for x in quick(name, own)])
def test_modules_of_the_caller_s_own_train_as_in_the_reference(name: str, tiny: object) -> None:
    """A loss of the caller's own, one client at a time; torch's Transformer layers call their linear layers."""
    model, method = tiny(), made(name)  # type: ignore[operator]
    how = {"weights": [1, 2], "packs": [[0], [1]], "optimizer": OPTIMIZER.model_copy(update={"eps": 1e-4})}
    server, data = method.init_server(model.weights, model.shape, seed=0), clients_data(model, 2)
    server = walk(method, model, server, clients_data(model, 2, seed=90), **how).server  # type: ignore[arg-type]
    ours, theirs = (
        effective(method, model, walk(method, model, server, data, trainer=t, **how).server)  # type: ignore[arg-type]
        for t in (run_pack, run_reference)
    )
    before = effective(method, model, server)
    for layer in ours:
        assert distance(ours[layer] - before[layer], theirs[layer] - before[layer]) < 1e-4
        if not method.personal:
            assert not torch.equal(ours[layer], before[layer])


@every_method
def test_server_has_the_same_bits_for_any_packs(name: str) -> None:
    """Clients of unequal rows and tokens; clipped, since that is a sum over all of a client's tensors."""
    method, tiny = made(name), llama()
    server, weights = begun(method, tiny), [1.0, 2.0, 3.0, 4.0]
    data = [draw_batches(tiny, k, STEPS, rows=1 + k % 3, tokens=9 + 4 * k) for k in range(4)]
    optimizer = OPTIMIZER.model_copy(update={"clip_norm": 0.05})
    first, *others = (
        walk(method, tiny, server, data, weights=weights, packs=packs, optimizer=optimizer).server
        for packs in ([[0, 1, 2, 3]], [[0], [1, 2], [3]])
    )
    for other in others:
        assert [name for name in first.tensors if not torch.equal(first.tensors[name], other.tensors[name])] == []


@every_method
def test_rank_above_the_matrix_is_refused(name: str) -> None:
    tiny = llama(hidden=16, inner=24)
    if name == "fedavg":
        made(name).check(tiny.shape)
        return
    made(name, rank=16).check(tiny.shape)
    with pytest.raises(UserError, match=r"method\.rank: got 17; allowed: 1 to 16"):
        made(name, rank=17).check(tiny.shape)


def test_upload_bytes_match_the_formulas() -> None:
    """Targets of the small Llama: numbers per layer by each method's rule, 4 bytes each."""
    tiny = llama()
    dense = sum(t.m * t.n for t in tiny.shape.targets)
    both = sum(t.m + t.n for t in tiny.shape.targets)
    rows = sum(t.m for t in tiny.shape.targets)
    columns, longer = (sum(sizes) for sizes in zip(*((t.n, max(t.m, t.n)) for t in tiny.shape.targets), strict=True))
    formulas = {"fedftg": RANK * both, "fedavg": dense, "fedit": RANK * both, "ffa-lora": RANK * rows}
    formulas |= {"rolora": RANK * rows, "fedsa-lora": RANK * columns, "fedsvd": RANK * rows, "lora-fair": RANK * both}
    formulas |= {"fed-sb": RANK**2 * len(tiny.shape.targets), "shared-galore": RANK * longer}
    formulas |= {"fedkrso": RANK * rows, "fedsub": 2 * RANK * rows}
    formulas |= {"ravan": 4 * formulas["fed-sb"], "fed-sb-gradient": dense}  # four heads; round 0
    downward = {"fedsvd": RANK * both}  # the round ended with a factorisation
    downward |= {"fed-sb-gradient": RANK * both + formulas["fed-sb"]}  # the factors that it brought
    alike = ("flexlora", "flora", "hetlora", "fslora", "fed-plora", "fedex-lora", "fedalt")
    alike += ("fedrot-lora", "florist", "raflora", "fedmomentum", "frlora", "flora-na")
    formulas |= dict.fromkeys(alike, RANK * both)  # one client: no residual
    for name, numbers in formulas.items():
        method = made(name)
        server = method.init_server(tiny.weights, tiny.shape, seed=0)
        done = walk(method, tiny, server, clients_data(tiny, 1), weights=[1])
        assert done.updates[0].wire_bytes == wire_bytes(done.updates[0].tensors) == 4 * numbers
        down = method.download_bytes(done.server, tiny.shape, Client(0, 0), since=0)
        assert down == 4 * downward.get(name, numbers)  # fedftg: one client's block was missed


FIRST = {  # wire numbers per layer of a client that joins after one round of one client, which sent rank 2 blocks
    "fedftg": lambda m, n: RANK * (m + n),
    "fedavg": lambda m, n: m * n,
    "fedit": lambda m, n: RANK * (m + n),
    "fedrot-lora": lambda m, n: RANK * (m + n),
    "florist": lambda m, n: RANK * (m + n),  # one client: the pair has its rank
    "raflora": lambda m, n: RANK * (m + n),
    "fedmomentum": lambda m, n: RANK * (m + n),  # one client: no residual
    "frlora": lambda m, n: RANK * (m + n),  # its averages; the first factors follow from the pretrained weight
    "flora-na": lambda m, n: RANK * (m + n),
    "ffa-lora": lambda m, n: RANK * m,  # A still follows from the seed
    "flexlora": lambda m, n: RANK * (m + n),
    "flora": lambda m, n: RANK * (m + n),
    "hetlora": lambda m, n: RANK * (m + n),
    "fslora": lambda m, n: RANK * (m + n),
    "fed-plora": lambda m, n: RANK * (m + n),
    "fedex-lora": lambda m, n: RANK * (m + n),  # one client: no residual
    "rolora": lambda m, n: RANK * m,  # round 0 trains B
    "fedsa-lora": lambda m, n: RANK * n,
    "fedalt": lambda m, n: RANK * (m + n),
    "fedsvd": lambda m, n: RANK * (m + n),  # the server has factorised: A is another one
    "lora-fair": lambda m, n: RANK * (m + n),
    "fed-sb": lambda m, n: RANK**2,  # the outer factors follow from the pretrained weight
    "fed-sb-gradient": lambda m, n: RANK * (m + n + RANK),  # the gradient's factors, and the core
    "ravan": lambda m, n: 4 * RANK**2,  # the outer factors are drawn from the seed
    "fedkrso": lambda m, n: RANK * m,  # the projections are drawn from the seed
    "fedsub": lambda m, n: 2 * RANK * m,  # so is the basis
    "shared-galore": lambda m, n: RANK * max(m, n),  # so is the basis
}


def test_every_method_has_the_formula_of_its_first_download() -> None:
    assert set(FIRST) == set(METHODS)


@every_method
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_is_downloaded_before_anything_is_learned(name: str, make: object, mixed: bool) -> None:
    """No client downloads anything before round 0, a classifier's head included, nor after a round without change."""
    tiny: Tiny = make()  # type: ignore[operator]
    method, new = made(name), Client(7, 0)
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    still = method.aggregate(server, method.accumulator(server, tiny.shape), tiny.shape)
    assert downloaded(method, server, tiny.shape, new, -1, learned=False, mixed=mixed) == 0
    assert downloaded(method, still, tiny.shape, new, -1, learned=False, mixed=mixed) == 0
    assert unchanged(method, server, still) == (name != "fedsvd")  # which factorises anew after every round


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("mixed", [False, True])
def test_tensors_that_follow_from_pretrained_weights_and_seed_are_not_downloaded(
    name: str, make: object, mixed: bool
) -> None:
    """A client that joins before round 1 downloads the change, with the head: a server that mixes sends complete dense
    weights."""
    tiny: Tiny = make()  # type: ignore[operator]
    method, new = made(name), Client(7, 0)
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    after = walk(method, tiny, server, clients_data(tiny, 1), weights=[1]).server
    assert not unchanged(method, server, after)
    head = sum(tiny.weights[key].numel() for key in tiny.shape.head_names)
    dense = mixed and any(f"{t.name}/weight" in method.broadcast(server).tensors for t in tiny.shape.targets)
    formula = (lambda m, n: m * n) if dense else FIRST[name]
    over = ("fedex-lora", "fedmomentum", "frlora")  # factors over the dense weight
    beside = {name: [RANK * (t.m + t.n) for t in tiny.shape.targets] for name in over}  # in a complete broadcast
    beside |= {"fedsub": [2, *(RANK * t.m for t in tiny.shape.targets)]}
    more = sum(beside.get(name, [])) if dense else 0
    numbers = head + more + sum(formula(t.m, t.n) for t in tiny.shape.targets)
    assert downloaded(method, after, tiny.shape, new, -1, learned=True, mixed=mixed) == 4 * numbers


@every_method
def test_plan_excludes_the_first_download_and_reports_its_size(name: str) -> None:
    """Three clients, the last of which joins in round 1; a first download counted in full is the entire broadcast."""
    tiny, method = bert(), made(name)
    found = traffic(method, tiny.shape, Config(), [[0, 1], [1, 2]], lambda client: STEPS)
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    whole = wire_bytes(method.broadcast(server).tensors)
    assert [(found.rounds[0][k].down, found.rounds[0][k].down_counted) for k in (0, 1)] == [(0, whole)] * 2
    again, new = found.rounds[1][1], found.rounds[1][2]
    assert again.down == again.down_counted > 0
    assert 0 < new.down <= new.down_counted >= whole


def test_fedftg_sends_the_matrix_if_its_blocks_are_larger() -> None:
    """Three periods of rank 8 on layers of at least 16 x 16: R (m + n) = 24 * 32 > 256 = m n."""
    tiny = llama()
    method = made("fedftg", rank=8, refresh_every=1)
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    done = walk(method, tiny, server, clients_data(tiny, 1), weights=[1])
    assert {name.rpartition("/")[2] for name in done.updates[0].tensors} == {"weight"}
    after = effective(method, tiny, done.server)
    for target in tiny.shape.targets:
        W = tiny.weights[f"{target.name}/weight"]
        assert distance(after[target.name] - W, local_change(tiny, server, done, 0, target.name)) < 1e-5


@pytest.mark.parametrize("decayed", [False, True])
def test_what_weight_decay_left_is_downloaded_with_the_blocks(decayed: bool) -> None:
    """A layer and two experts' matrices of 8 x 8, rank 1: 16 numbers of 64 each, and what is left of the pretrained
    weight as 8 bytes for the layer and for each expert.  After 4 rounds the matrices are no larger than the blocks."""
    names = ("up", "e.0", "e.1")
    shape = ModelShape(tuple(Layer(name, 8, 8, expert=name != "up") for name in names))
    method = build({"name": "fedftg", "rank": 1})
    blocks = {f"{name}/left": torch.ones(8, 1) for name in names} | {
        f"{name}/right": torch.ones(1, 8) for name in names
    }
    scales = ("base_scale", "e.0/base_scale", "e.1/base_scale") if decayed else ()
    sent = blocks | {name: torch.tensor(0.5, dtype=torch.float64) for name in scales}
    server = method.init_server({f"{name}/weight": torch.ones(8, 8) for name in names}, shape, seed=0)
    for n in range(4):
        total = method.accumulate(method.accumulator(server, shape), Update(0, 2.0, sent), shape)
        server = method.aggregate(server, total, shape)
        if n < 3:
            down = method.download_bytes(server, shape, Client(0, 0), since=-1)
            assert down == 4 * 3 * 16 * (n + 1) + 8 * len(scales)
    assert method.download_bytes(server, shape, Client(0, 0), since=-1) == 4 * 3 * 64
    assert method.download_bytes(server, shape, Client(0, 0), since=3) == 4 * 3 * 16 + 8 * len(scales)
    assert set(method.broadcast(server).tensors) == {f"{name}/weight" for name in names}


def test_fedftg_returning_client_downloads_missed_blocks() -> None:
    """One 40 x 30 matrix would hold 1,200 numbers; blocks of rank 2 cost 2 * 70 = 140 each."""
    tiny = llama()
    method = made("fedftg")
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    for seed in range(3):  # three rounds of two clients: summed rank 4 a round
        server = walk(method, tiny, server, clients_data(tiny, 2, seed=10 * seed), weights=[1, 1]).server
    for since, rounds in ((-1, 3), (0, 3), (1, 2), (2, 1)):
        numbers = sum(min(t.m * t.n, 4 * rounds * (t.m + t.n)) for t in tiny.shape.targets)
        assert method.download_bytes(server, tiny.shape, Client(0, 0), since) == 4 * numbers


def test_fedit_misses_exactly_the_cross_term() -> None:
    """Cross term: sum p_k B_k A_k - B'A' = sum p_k (B_k - B')(A_k - A'), of rank <= (N - 1) r = 4."""
    method, tiny = made("fedit"), llama()
    server = begun(method, tiny)
    done = walk(method, tiny, server, clients_data(tiny, 3), weights=[1, 2, 5])
    p = [1 / 8, 2 / 8, 5 / 8]
    for target in tiny.shape.targets:
        B = [result.tensors[f"{target.name}/left"].double() for result in done.results]
        A = [result.tensors[f"{target.name}/right"].double() for result in done.results]
        B_mean, A_mean = (sum(w * x for w, x in zip(p, xs, strict=True)) for xs in (B, A))
        cross = sum(w * (b - B_mean) @ (a - A_mean) for w, b, a in zip(p, B, A, strict=True))
        scale = done.starts[0].scale
        missed = (
            scale * sum(w * b @ a for w, b, a in zip(p, B, A, strict=True))
            - effective(method, tiny, done.server)[target.name].double()
        )
        missed += tiny.weights[f"{target.name}/weight"].double()
        assert distance(missed, scale * cross) < 1e-3  # the server's float32 weights hold the difference
        assert torch.linalg.matrix_rank(cross) <= (3 - 1) * RANK


def test_rank_inflation_is_kept() -> None:
    """The mean of N = 4 changes of rank r = 2 has rank 8 = N r, while each has rank 2."""
    method, tiny = made("fedftg"), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    done = walk(method, tiny, server, clients_data(tiny, 4), weights=[1, 1, 1, 1])
    for target in tiny.shape.targets:
        assert torch.linalg.matrix_rank(local_change(tiny, server, done, 0, target.name).double(), rtol=1e-4) == RANK
        change = (done.server.tensors[f"{target.name}/weight"] - server.tensors[f"{target.name}/weight"]).double()
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4 * RANK


@pytest.mark.parametrize("name", ["fedavg", "fedit", "ffa-lora", "lora-fair", "fed-sb", "shared-galore"])
def test_averaged_moments_are_the_weighted_mean_and_travel(name: str) -> None:
    method, tiny = made(name, optimizer_state="average"), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    done = walk(method, tiny, server, clients_data(tiny, 2), weights=[1, 3])
    again = method.start_client(method.broadcast(done.server), done.states[0], Client(0, 0), tiny.shape)
    for moment in done.results[0].moments:
        mean = (done.results[0].moments[moment] + 3 * done.results[1].moments[moment]) / 4
        assert torch.allclose(again.moments[moment], mean, atol=1e-7)
    assert again.step == STEPS
    plain = made(name).upload(method.broadcast(server), done.results[0], 1.0, tiny.shape)
    trained = sum(done.results[0].tensors[n].numel() for n in done.starts[0].trained)
    assert done.updates[0].wire_bytes == plain.wire_bytes + 2 * 4 * trained + 8  # m1, m2, the step count


def test_fedftg_refuses_to_average_moments_of_different_subspaces() -> None:
    with pytest.raises(UserError, match=r"method\.optimizer_state: got 'average'; allowed: keep or reset"):
        made("fedftg", optimizer_state="average")


def remembers(name: str) -> bool:
    """True if the method does not fix Adam's moments in a new round."""
    return hasattr(made(name), "optimizer_state")


@pytest.mark.parametrize("name", [name for name in METHODS if not remembers(name)])
def test_methods_that_always_reset(name: str) -> None:
    method, tiny = made(name), llama()
    done = walk(method, tiny, begun(method, tiny), clients_data(tiny, 1), weights=[1])
    start = method.start_client(method.broadcast(done.server), done.states[0], Client(0, 0), tiny.shape)
    assert (start.step, start.moments) == (0, {})


@pytest.mark.parametrize("name", [name for name in METHODS if remembers(name)])
def test_reset_clears_the_optimizer_state_and_keep_keeps_it(name: str) -> None:
    tiny = llama()
    for rule, step in (("keep", STEPS), ("reset", 0)):
        method = made(
            name, optimizer_state=rule, **({"period": 2} if name == "fedsvd" else {})
        )  # no factorisation in between
        server = method.init_server(tiny.weights, tiny.shape, seed=0)
        if name == "fed-sb-gradient":  # whose round 0 trains nothing
            server = begun(method, tiny)
        done = walk(method, tiny, server, clients_data(tiny, 1), weights=[1])
        start = method.start_client(method.broadcast(done.server), done.states[0], Client(0, 0), tiny.shape)
        assert start.step == step
        assert bool(start.moments) == (rule == "keep")
        if rule == "keep":
            assert same(start.moments, {n: t for n, t in done.results[0].moments.items() if n in start.moments})


def test_one_sgd_step_per_round_is_large_batch_sgd() -> None:
    """For the dense method one SGD step each, equal weights, is one step on the mean gradient."""
    method, tiny = made("fedavg"), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    sgd = Optimizer(name="sgd")
    data = [batches[:1] for batches in clients_data(tiny, 2)]
    lr = 0.5
    after = walk(method, tiny, server, data, weights=[1, 1], lr=lr, optimizer=sgd).server
    alone = [walk(method, tiny, server, [batches], weights=[1], lr=lr, optimizer=sgd).server for batches in data]
    for target in tiny.shape.targets:
        name = f"{target.name}/weight"
        gradients = [(server.tensors[name] - one.tensors[name]) / lr for one in alone]
        step = -lr * (gradients[0] + gradients[1]) / 2
        assert distance(after.tensors[name] - server.tensors[name], step) < 1e-4


def test_unknown_names_fields_and_values_are_refused() -> None:
    for fields, words in (
        ({"name": "fedfgt"}, r"method\.name: got 'fedfgt'; allowed: fedftg, "),
        ({"name": "fedftg", "rnk": 4}, r"method\.rnk: got 4; .* did you mean rank"),
        ({"name": "fedftg", "rank": 0}, r"method\.rank: got 0"),
        ({"name": "nowhere.to:Be"}, r"method\.name: got 'nowhere.to:Be'"),
    ):
        with pytest.raises(UserError, match=words):
            build(fields)


def test_ranks_can_differ_within_a_pack() -> None:
    """A client of rank 1 beside one of rank 3: each has the same result as alone."""
    tiny = llama()
    data = clients_data(tiny, 2)
    starts = []
    for rank in (1, 3):
        method = made("fedftg", rank=rank)
        server = method.init_server(tiny.weights, tiny.shape, seed=0)
        starts.append(method.start_client(method.broadcast(server), None, Client(0, 0), tiny.shape))
    together = run_pack(tiny, starts, data, OPTIMIZER, lr=0.01)
    for k in range(2):
        alone = run_pack(tiny, [starts[k]], [data[k]], OPTIMIZER, lr=0.01, clients=[k])[0]
        for layer, (left, right) in alone.blocks.items():
            assert left.shape == together[k].blocks[layer][0].shape
            assert distance(together[k].blocks[layer][0] @ together[k].blocks[layer][1], left @ right) < 1e-5
